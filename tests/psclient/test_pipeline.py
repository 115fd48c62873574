"""The pipeline: what the rows of each batch contain, its bounds, and what it does after errors."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from psclient import Client, Pipeline, Table
from psclient.errors import (
    InvalidArgument,
    PsError,
    PushFailed,
    ResourceExhausted,
    SessionExpired,
)
from psclient.stream import StreamLink
from psclient.ticket import Ticket

EVERY = np.arange(60)  # the keys of ``batches``
STEPS = 40  # of the runs with a digit for each step
WRONG = 5  # a batch with wrong keys


class Digits:
    """A table whose row of a key has a 1 in column v if the push of step v is in it."""

    def __init__(self, client: Client, name: str, steps: int = STEPS) -> None:
        self.table = client.create_table(name, steps, optimizer="sgd", lr=1.0, initializer="zeros")
        self.pushed: dict[int, set[int]] = {}  # by step: the keys

    def gradients(self, ticket: Ticket) -> np.ndarray[Any, Any]:
        keys = ticket.keys[self.table.name].keys
        self.pushed[ticket.step] = set(keys.tolist())
        gradients = np.zeros((len(keys), self.table.dim), np.float32)
        gradients[:, ticket.step] = -1
        return gradients

    def expected(self, keys: Any, last: int) -> np.ndarray[Any, Any]:
        """The rows of ``keys`` with the pushes up to that of step ``last``."""
        rows = np.zeros((len(keys), self.table.dim), np.float32)
        for step, some in self.pushed.items():
            if step <= last:
                rows[[key in some for key in keys.tolist()], step] = 1
        return rows

    def check(self, ticket: Ticket, staleness: int) -> int:
        """Check the rows of a batch; return how many of them lack a push that was made."""
        keys, rows = ticket.keys[self.table.name].keys, ticket.rows[self.table.name]
        due = max(ticket.step - staleness, 0)  # number of pushes that must be in the rows
        assert_array_equal(rows[:, :due], self.expected(keys, due - 1)[:, :due])
        every = self.expected(keys, ticket.step - 1)
        assert (rows <= every).all()  # nothing that was not pushed
        return int((rows < every).any(1).sum())


def batches(seed: int, count: int, *sizes: int, among: int = 60) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [[rng.integers(0, among, size) for size in sizes] for _ in range(count)]


def first(batch: Any) -> dict[str, Any]:
    return {"f": batch[0]}


@pytest.fixture(params=["stream", "unary"])
def client2(request: pytest.FixtureRequest, cluster2: Any, connect: Any) -> Client:
    return connect(cluster2, transport=request.param)


@pytest.fixture
def client(cluster2: Any, connect: Any) -> Client:
    return connect(cluster2)


TABLES = {"a": ("adagrad", 5, {}), "b": ("adam", 3, {}), "c": ("ftrl", 8, {})}
FEATURES = {"x": "a", "y": "b", "z": "a", "w": "c"}


def make(client: Client, name: str) -> dict[str, Table]:
    return {
        table: client.create_table(
            f"{name}.{table}",
            dim,
            optimizer=optimizer,
            lr=0.05,
            optimizer_args=arguments,
            initializer="normal",
            seed=3,
        )
        for table, (optimizer, dim, arguments) in TABLES.items()
    }


def keys_of(batch: Any) -> dict[str, Any]:
    x, y, z, w = batch
    return {"x": x.reshape(-1, 2), "y": y, "z": z, "w": w}


def gradient(rows: np.ndarray[Any, Any], step: int) -> np.ndarray[Any, Any]:
    return np.sin(rows * (step + 1)).astype(np.float32)


def blocking(client: Client, tables: dict[str, Table], data: list[Any]) -> list[Any]:
    """Train without a pipeline; return the rows of each step."""
    seen = []
    for step, batch in enumerate(data):
        keys = keys_of(batch)
        given: dict[str, list[Any]] = {table.name: [] for table in tables.values()}
        for feature, short in FEATURES.items():
            given[tables[short].name].append(keys[feature].reshape(-1))
        distinct = {name: client.batch(np.concatenate(each)) for name, each in given.items()}
        rows = client.pull_distinct(distinct)
        seen.append(rows)
        client.push_distinct(
            {name: (distinct[name], gradient(each, step)) for name, each in rows.items()},
            step=step,
        )
    return seen


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


def refuse(
    monkeypatch: pytest.MonkeyPatch, steps: set[int], kind: type[PsError] = ResourceExhausted
) -> None:
    """Let the pushes of some steps be refused at first, as by a server without memory.

    The client sends them again, after the requests that were sent in the meantime.

    kind  SessionExpired: as by a server that has lost the client's session
    """
    inner = StreamLink._send

    def send(self: StreamLink, call: Any) -> None:
        pushes = call.exchange.pushes
        first = call.attempts == 0 and not call.renewed
        if pushes and pushes[0].header.step in steps and first:
            call.attempts = 1
            error = kind("memory is short")
            if kind is ResourceExhausted:
                error.reason, error.retry_after = "OVERLOADED", 0.001
            self._settle(call, None, error)
        else:
            inner(self, call)

    monkeypatch.setattr(StreamLink, "_send", send)


class TestErrors:
    @pytest.mark.parametrize("kind", [ResourceExhausted, SessionExpired])
    @pytest.mark.parametrize("staleness", [0, 1, 3])
    def test_a_push_that_is_sent_again_is_in_the_rows(
        self,
        client: Client,
        name: str,
        monkeypatch: pytest.MonkeyPatch,
        staleness: int,
        kind: type[PsError],
    ) -> None:
        digits = Digits(client, name)
        refuse(monkeypatch, {2, 3, 9, 20, 22, 24}, kind)
        with Pipeline(client, {"f": digits.table}, staleness=staleness) as pipe:
            for ticket in pipe.over(first, batches(10, STEPS, 25)):
                digits.check(ticket, staleness)
                pipe.push(ticket, {name: digits.gradients(ticket)})
        assert_array_equal(digits.table.pull(EVERY), digits.expected(EVERY, STEPS))
        assert bool(pipe.stats.repeated_rows) == (staleness > 1)  # with 1, nothing overtakes a push

    def test_invalid_gradients_are_refused_at_once(self, client: Client, name: str) -> None:
        digits = Digits(client, name)
        with Pipeline(client, {"f": digits.table}) as pipe:
            for ticket in pipe.over(first, batches(11, 5, 25)):
                good = digits.gradients(ticket)
                bad = good.copy()
                bad[1, 1] = np.nan
                for wrong, message in (
                    ({name: bad}, f"table '{name}': the gradient of key .* is nan"),
                    ({name: good[1:]}, "gradients must have shape"),
                    ({}, f"gradients of step {ticket.step} must have the tables"),
                ):
                    with pytest.raises(InvalidArgument, match=message):
                        pipe.push(ticket, wrong)
                if ticket.step == 3:
                    digits.pushed.pop(3)
                    pipe.skip(ticket)
                else:
                    pipe.push(ticket, {name: good})
        assert_array_equal(digits.table.pull(EVERY), digits.expected(EVERY, STEPS))

    @pytest.mark.parametrize("later", [False, True])
    @pytest.mark.parametrize("staleness", [0, 2])
    def test_a_refused_push_is_raised_by_the_next_turns(
        self, client: Client, name: str, staleness: int, later: bool
    ) -> None:
        digits = Digits(client, name)
        pipe = Pipeline(client, {"f": digits.table}, staleness=staleness)
        seen = []

        def run() -> None:
            for ticket in pipe.over(first, batches(12, 20, 25)):
                seen.append(ticket.step)
                gradients = digits.gradients(ticket)
                given = (lambda it=gradients: it) if later else gradients
                pipe.push(ticket, {name: given}, lr=np.nan if ticket.step == 4 else None)

        expected = rf"the push of step 4 to table '{name}' failed: .*lr"
        with pytest.raises(PushFailed, match=expected) as caught:
            run()
        assert (caught.value.step, caught.value.table) == (4, name)
        assert isinstance(caught.value.__cause__, InvalidArgument)
        assert str(copy.copy(caught.value)) == str(caught.value)
        assert max(seen) <= 4 + staleness + later
        for call in (pipe.flush, lambda: next(pipe.over(first, [[1]]))):
            with pytest.raises(PushFailed, match="step 4"):
                call()
        pipe.close()

    def test_an_error_in_the_loop_leaves_its_pushes(self, client: Client, name: str) -> None:
        digits = Digits(client, name)

        def run() -> None:
            with Pipeline(client, {"f": digits.table}, staleness=2) as pipe:
                for ticket in pipe.over(first, batches(13, STEPS, 25)):
                    if ticket.step == 7:
                        raise KeyError("mine")
                    pipe.push(ticket, {name: digits.gradients(ticket)})

        with pytest.raises(KeyError, match="mine"):
            run()
        assert len(digits.pushed) == 7
        assert_array_equal(digits.table.pull(EVERY), digits.expected(EVERY, STEPS))

    def test_an_error_of_the_loader_is_raised_in_its_turn(self, client: Client, name: str) -> None:
        digits = Digits(client, name)

        def loader() -> Iterator[Any]:
            yield from batches(14, 6, 25)
            raise OSError("no more")

        pipe = Pipeline(client, {"f": digits.table}, staleness=2)
        seen = []

        def run() -> None:
            for ticket in pipe.over(first, loader()):
                seen.append(ticket.step)
                pipe.push(ticket, {name: digits.gradients(ticket)})

        with pytest.raises(OSError, match="no more"), pipe:
            run()
        assert seen == list(range(6))
        assert_array_equal(digits.table.pull(EVERY), digits.expected(EVERY, STEPS))

    def test_no_batch_follows_one_with_wrong_keys(self, client: Client, name: str) -> None:
        """Also if the loop reads it while the worker looks for the distinct keys of the wrong."""
        digits = Digits(client, name)
        pipe = Pipeline(client, {"f": digits.table}, staleness=2)
        planning, reading = threading.Event(), threading.Event()

        def wrong() -> Any:
            planning.set()
            assert reading.wait(60)
            raise KeyError("mine")

        def loader() -> Iterator[Any]:
            for step in range(STEPS):
                if step == WRONG + 1:
                    reading.set()
                    while pipe._schedule._source_error is None:
                        time.sleep(0.001)
                yield step

        seen = []

        def run() -> None:
            for ticket in pipe.over(
                lambda step: {"f": wrong if step == WRONG else [step, 50]}, loader()
            ):
                seen.append(ticket.batch)
                if ticket.batch == WRONG - 3:
                    assert planning.wait(60)
                pipe.push(ticket, {name: digits.gradients(ticket)})

        with pytest.raises(KeyError, match="mine"), pipe:
            run()
        assert seen == list(range(WRONG))

    def test_an_old_loop_does_not_end_a_new_one(self, client: Client, name: str) -> None:
        digits = Digits(client, name)
        pipe = Pipeline(client, {"f": digits.table})
        old = pipe.over(first, batches(16, 5, 25))
        pipe.push(ticket := next(old), {name: digits.gradients(ticket)})
        pipe.close()
        with pipe:
            for ticket in pipe.over(first, batches(17, 5, 25)):
                pipe.push(ticket, {name: digits.gradients(ticket)})
                old.close()  # type: ignore[attr-defined]
        assert pipe.stats.pushes == 6
        assert_array_equal(digits.table.pull(EVERY), digits.expected(EVERY, STEPS))

    def test_an_interruption_does_not_lose_pushes(
        self, client: Client, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those that were sent before the interrupted wait are in the rows."""
        digits = Digits(client, name)
        pipe = Pipeline(client, {"f": digits.table}, staleness=0)
        inner = StreamLink.wait

        def wait(self: StreamLink, call: Any) -> Any:
            if call.exchange.pushes and call.exchange.pushes[0].header.step == 6:
                raise KeyboardInterrupt
            return inner(self, call)

        monkeypatch.setattr(StreamLink, "wait", wait)

        def run() -> None:
            for ticket in pipe.over(first, batches(15, STEPS, 25)):
                pipe.push(ticket, {name: digits.gradients(ticket)})

        with pytest.raises(KeyboardInterrupt), pipe:
            run()
        rows = digits.table.pull(EVERY)
        for step in digits.pushed:
            if step != 6:  # once or not at all
                assert_array_equal(rows[:, step], digits.expected(EVERY, step)[:, step])
        with pytest.raises(PushFailed, match="step 6"):
            pipe.flush()

    def test_wrong_arguments(self, client: Client, connect: Any, cluster2: Any, name: str) -> None:
        table = client.create_table(name, 2)
        elsewhere = connect(cluster2).table(name)
        for features, options, message in (
            ({}, {}, r"features must be a mapping"),
            ({"f": elsewhere}, {}, r"feature 'f': table .* must belong to the client"),
            ({"f": table}, {"staleness": -1}, r"staleness must be an integer in 0..1023"),
            ({"f": table}, {"lookahead": 1.5}, r"lookahead must be an integer in 0..1023"),
            ({"f": table}, {"unpushed": 2}, r"unpushed must be an integer in 1..1"),
            ({"f": table}, {"durability": "x"}, r"durability must be one of"),
        ):
            with pytest.raises(InvalidArgument, match=message):
                Pipeline(client, features, **options)
        pipe = Pipeline(client, {"f": table})
        turns = pipe.over(lambda batch: {"g": batch}, [[1]])
        with pytest.raises(
            InvalidArgument, match=r"must return a mapping with the features \['f'\]"
        ):
            next(turns)
        turns = pipe.over(lambda batch: {"f": batch}, [[1], [2]])
        next(turns)
        with pytest.raises(InvalidArgument, match=r"this pipeline is in a loop already"):
            next(pipe.over(lambda batch: {"f": batch}, [[1]]))


def test_a_closed_client(cluster2: Any, connect: Any, name: str) -> None:
    client = connect(cluster2)
    pipe = Pipeline(client, {"a": Digits(client, name).table}, staleness=1)
    client.close()
    with pytest.raises(InvalidArgument, match="the client is closed"):
        next(iter(pipe.over(lambda keys: {"a": keys}, [[1]])))
    pipe.close()


def test_it_is_neither_pickled_nor_copied(client: Client, name: str) -> None:
    pipe = Pipeline(client, {"a": Digits(client, name).table})
    for how in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot pickle"):
            how(pipe)


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_is_refused(client: Client, name: str) -> None:
    digits = Digits(client, name)
    told, tell = multiprocessing.Pipe(duplex=False)

    def use(pipe: Pipeline, ticket: Ticket) -> None:
        said = []
        for do in (pipe.flush, lambda: pipe.skip(ticket), lambda: next(pipe.over(dict, []))):
            try:
                do()
            except InvalidArgument as error:
                said.append(str(error))
        pipe.close()
        tell.send(said)

    with Pipeline(client, {"a": digits.table}, staleness=1) as pipe:
        for ticket in pipe.over(lambda keys: {"a": keys}, [[1], [2], [3]]):
            if ticket.step == 1:
                child = multiprocessing.get_context("fork").Process(target=use, args=(pipe, ticket))
                child.start()
                assert told.poll(60)
                said = told.recv()
                child.join(60)
                assert len(said) == 3
                assert all("made before a fork" in text for text in said)
            pipe.push(ticket, {digits.table.name: digits.gradients(ticket)})
    assert_array_equal(digits.table.pull([1, 2, 3])[:, :3], np.eye(3))
