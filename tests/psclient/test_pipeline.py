"""The pipeline: what the rows of each batch contain, and its bounds."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import loops
import numpy as np
import pytest
from loops import EVERY, FEATURES, STEPS, Digits, batches, blocking, first, gradient, keys_of, make
from numpy.testing import assert_array_equal

from psclient import Client, Pipeline
from psclient.errors import InvalidArgument
from psclient.ticket import Ticket

client, client2 = loops.client, loops.client2


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_without_staleness_training_equals_the_blocking_loop(
    client: Client, name: str, lookahead: int
) -> None:
    data = batches(1, 200, 20, 10, 7, 30)
    tables = make(client, name)
    seen = blocking(client, tables, data)
    wanted = [table.pull_rows(np.arange(60)) for table in tables.values()]
    for table in tables.values():
        client.drop_table(table.name)
    tables = make(client, name)  # the same names, so the same initial rows
    features = {feature: tables[short] for feature, short in FEATURES.items()}
    with Pipeline(client, features, lookahead=lookahead) as pipe:
        for ticket in pipe.over(keys_of, data):
            for table, rows in ticket.rows.items():
                assert_array_equal(rows, seen[ticket.step][table])
            for feature, keys in keys_of(ticket.batch).items():
                distinct = ticket.keys[features[feature].name].keys
                assert_array_equal(distinct[ticket.places[feature]].view(np.int64), keys)
            pipe.push(ticket, {n: gradient(rows, ticket.step) for n, rows in ticket.rows.items()})
    assert (pipe.stats.batches, pipe.stats.pushes, pipe.stats.stale_rows) == (200, 200, 0)
    for table, theirs in zip(tables.values(), wanted, strict=True):
        rows = table.pull_rows(np.arange(60))
        for field in ("embeddings", "steps", "frequencies"):
            assert_array_equal(getattr(rows, field), getattr(theirs, field))


@pytest.mark.parametrize("lookahead", [0, 1, 2, 5])
@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
def test_rows_lack_no_more_pushes_than_allowed(
    client2: Client, name: str, staleness: int, lookahead: int
) -> None:
    digits = Digits(client2, name)
    pipe = Pipeline(client2, {"f": digits.table}, lookahead=lookahead, staleness=staleness)
    lacking = 0
    with pipe:
        for ticket in pipe.over(first, batches(2, STEPS, 25)):
            lacking += digits.check(ticket, staleness)
            pipe.push(ticket, {digits.table.name: digits.gradients(ticket)})
    assert_array_equal(digits.table.pull(EVERY), digits.expected(EVERY, STEPS))
    assert pipe.stats.stale_rows == lacking
    assert bool(lacking) == bool(staleness and lookahead)


class TestTurn:
    def test_a_batch_must_be_pushed_or_skipped_before_the_next(
        self, client: Client, name: str
    ) -> None:
        digits = Digits(client, name)
        pipe = Pipeline(client, {"f": digits.table})
        turns = pipe.over(first, batches(3, 5, 10))
        ticket = next(turns)
        with pytest.raises(InvalidArgument, match=r"the batch of step 0 was neither pushed nor"):
            next(turns)
        pipe.push(ticket, {name: digits.gradients(ticket)})
        with pytest.raises(InvalidArgument, match=r"ticket of step 0: .* no batch is at hand"):
            pipe.push(ticket, {name: digits.gradients(ticket)})

    def test_a_skipped_batch_pushes_nothing(self, client: Client, name: str) -> None:
        digits = Digits(client, name)
        with Pipeline(client, {"f": digits.table}) as pipe:
            for ticket in pipe.over(first, batches(4, STEPS, 25)):
                digits.check(ticket, 0)
                if ticket.step % 3:
                    pipe.skip(ticket)
                else:
                    pipe.push(ticket, {name: digits.gradients(ticket)})
        assert_array_equal(digits.table.pull(EVERY), digits.expected(EVERY, STEPS))
        assert (pipe.stats.pushes, pipe.stats.skipped) == (14, 26)

    @pytest.mark.parametrize("staleness", [0, 1, 3])
    def test_gradients_of_several_batches_go_with_the_last(
        self, client: Client, name: str, staleness: int
    ) -> None:
        digits = Digits(client, name)
        pipe = Pipeline(client, {"f": digits.table}, lookahead=3, staleness=staleness)
        some: list[Ticket] = []
        with pipe:
            for ticket in pipe.over(first, batches(5, STEPS, 25)):
                digits.check(ticket, staleness)
                some.append(ticket)
                if len(some) < 4:
                    pipe.skip(ticket)
                    continue
                batch = client.batch(np.concatenate([each.keys[name].keys for each in some]))
                gradients = np.zeros((len(batch.keys), STEPS), np.float32)
                gradients[:, ticket.step] = -1
                digits.pushed[ticket.step] = set(batch.keys.tolist())
                pipe.push(ticket, {name: (batch, gradients)})
                some.clear()
        assert_array_equal(digits.table.pull(EVERY), digits.expected(EVERY, STEPS))

    def test_worker_sends_what_a_function_returns(self, client: Client, name: str) -> None:
        """Also if other pushes have arrays, and one is skipped."""
        digits = Digits(client, name)
        pipe = Pipeline(client, {"f": digits.table}, lookahead=2, staleness=2)
        threads = set[int]()

        def later(gradients: Any) -> Any:
            time.sleep(0.005)
            threads.add(threading.get_ident())
            return gradients

        with pipe:
            for ticket in pipe.over(first, batches(6, STEPS, 25)):
                digits.check(ticket, 2)
                if ticket.step == 5:
                    pipe.skip(ticket)
                    continue
                gradients = digits.gradients(ticket)
                pipe.push(
                    ticket, {name: partial(later, gradients) if ticket.step % 4 else gradients}
                )
        assert_array_equal(digits.table.pull(EVERY), digits.expected(EVERY, STEPS))
        assert len(threads) == 1
        assert threading.get_ident() not in threads

    def test_arrays_beside_functions_are_checked_and_copied_at_once(
        self, client: Client, name: str
    ) -> None:
        a, b = f"{name}.a", f"{name}.b"
        for each in (a, b):
            client.create_table(each, 1, optimizer="sgd", lr=1.0, initializer="zeros")
        free = threading.Event()

        def later() -> Any:
            assert free.wait(60)
            return np.ones((1, 1))

        with Pipeline(client, {"x": a, "y": b}) as pipe:
            for ticket in pipe.over(lambda _: {"x": [1], "y": [1]}, [0]):
                with pytest.raises(InvalidArgument, match=f"table '{b}': the gradient .* is nan"):
                    pipe.push(ticket, {a: later, b: np.full((1, 1), np.nan)})
                gradient = np.ones((1, 1), np.float32)
                pipe.push(ticket, {a: later, b: gradient})
                gradient[:] = 1000
                free.set()
        assert client.pull({a: [1], b: [1]}) == {a: [[-1]], b: [[-1]]}

    @pytest.mark.parametrize("lookahead", [1, 2, 3])
    def test_a_turn_may_begin_before_the_last_is_pushed(
        self, client: Client, name: str, lookahead: int
    ) -> None:
        digits = Digits(client, name)
        pipe = Pipeline(client, {"f": digits.table}, lookahead=lookahead, staleness=2, unpushed=3)
        hand: list[Ticket] = []
        with pipe:
            for ticket in pipe.over(first, batches(7, STEPS, 25)):
                digits.check(ticket, 2)
                hand.append(ticket)
                if len(hand) == 3:
                    ticket = hand.pop(0)
                    pipe.push(ticket, {name: digits.gradients(ticket)})
            for ticket in hand:
                pipe.push(ticket, {name: digits.gradients(ticket)})
        assert_array_equal(digits.table.pull(EVERY), digits.expected(EVERY, STEPS))

    def test_epochs(self, client: Client, name: str) -> None:
        """Each begins while pushes of the last are unanswered; one ends early."""
        digits = Digits(client, name)
        pipe = Pipeline(client, {"f": digits.table}, staleness=1, step=3)
        for epoch in range(3):
            for turn, ticket in enumerate(pipe.over(first, batches(epoch, 8, 25))):
                digits.check(ticket, 1)
                pipe.push(ticket, {name: digits.gradients(ticket)})
                if (epoch, turn) == (1, 4):
                    break
        pipe.flush()
        assert pipe.step == 3 + 8 + 5 + 8
        assert_array_equal(digits.table.pull(EVERY), digits.expected(EVERY, STEPS))
        pipe.close()

    def test_buffers_are_used_again(self, client: Client, name: str) -> None:
        """They grow by doubling."""
        shapes: list[tuple[int, int]] = []

        def empty(shape: tuple[int, int]) -> np.ndarray[Any, Any]:
            shapes.append(shape)
            return np.full(shape, np.nan, np.float32)

        digits = Digits(client, name)
        sizes = [10, 200, 257, 700, 20, 900, 3, 4, 5, 1100]
        rng = np.random.default_rng(8)
        data = [[rng.permutation(2000)[:size]] for size in sizes]
        with Pipeline(client, {"f": digits.table}, staleness=1, empty=empty) as pipe:
            for ticket in pipe.over(first, data):
                digits.check(ticket, 1)
                pipe.push(ticket, {name: digits.gradients(ticket)})
        assert set(shapes) <= {(256 << power, STEPS) for power in range(4)}
        assert len(shapes) <= 3 * 4

    def test_state(self, client: Client, name: str) -> None:
        digits = Digits(client, name)
        with Pipeline(client, {"f": digits.table}, staleness=1, step=7) as pipe:
            assert pipe.state()["versions"] == [0, 0]
            for ticket in pipe.over(first, batches(9, 5, 200)):
                assert pipe.state()["step"] == ticket.step
                pipe.push(ticket, {name: digits.gradients(ticket)})
                pipe.flush()
                state = pipe.state()
                assert state["step"] == ticket.step + 1
                assert [each["sequence"] for each in state["sessions"]] == [ticket.step - 6] * 2
                assert state["versions"] == list(digits.table.describe().versions)
