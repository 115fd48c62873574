"""The pipeline: what it does after errors, and what it refuses."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
import time
from collections.abc import Iterator
from typing import Any

import loops
import numpy as np
import pytest
from loops import EVERY, STEPS, WRONG, Digits, batches, first
from numpy.testing import assert_array_equal

from psclient import Client, Pipeline
from psclient.errors import InvalidArgument, PsError, PushFailed, ResourceExhausted, SessionExpired
from psclient.stream import StreamLink
from psclient.ticket import Ticket

client, client2 = loops.client, loops.client2


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
