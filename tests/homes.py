"""A cluster in this process: shards with data directories and their checkpoint services."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from stores import MEMORY, Direct, Home, change, push, schema

from psproto import ps_pb2 as pb
from psproto import routing
from psserver.checkpoints import Checkpoints
from psserver.loading import settle_load
from psserver.replay import restore_excess
from psserver.restore import Restores
from psserver.swap import COMMITTED, State, failed, loaded, settle
from storage.errors import StorageError
from storage.optimizers import make_optimizer
from storage.schema import TableSchema
from storage.store import Store

Step = pb.RestoreRequest
Continue = pb.ContinueRequest


class Node:
    """One shard: a server without its network. It restarts when a restore asks for it."""

    def __init__(self, directory: Path, number: int, shards: int, url: str, **shard: Any) -> None:
        self.directory = directory
        self._settings = {"number": number, "shard_map": routing.even_map(shards), **shard}
        self._store = Store(url)
        self.engine = Direct()
        self.again = False

    def open(self) -> Self:
        self.directory.mkdir(exist_ok=True, parents=True)
        state = settle(self.directory)
        if state is not None and state.phase == COMMITTED:
            try:
                self._open_home(restore_excess(self._settings.get("memory_bytes", MEMORY)))
            except StorageError as error:
                state = failed(self.directory, state, str(error))
                self._open_home()
            else:
                state = self._loaded(state)
        else:
            self._open_home()
        self._serve(state)
        return self

    def _loaded(self, state: State) -> State:
        try:
            return loaded(self.directory, state)
        except BaseException:
            self.home.close()
            raise

    def _open_home(self, excess: int | None = None) -> None:
        self.home = Home(self.directory, engine=self.engine, excess=excess, **self._settings).open()
        settle_load(self.directory, self.home.shard, self.home.log)

    def serve(self, home: Home) -> None:
        """Begin to serve a shard that is open already."""
        self.home = home
        self._serve(None)

    def _serve(self, state: State | None) -> None:
        home = self.home
        self.shard = home.shard
        self.checkpoints = Checkpoints(
            home.shard,
            self.engine,
            home.log,
            home.flusher,
            self._store,
            now=lambda: 1.5,
            directory=self.directory,
        )
        self.restores = Restores(
            home.shard, self.engine, self.checkpoints, self.directory, state, self._restart
        )

    def _restart(self) -> None:
        self.again = True

    def close(self) -> None:
        self.home.close()

    def reopen(self) -> Self:
        self.close()
        return self.open()

    def prepare(self, name: str, id: str, *, replace: bool = False) -> int:
        request = pb.PrepareRestoreRequest(name=name, id=id, replace=replace)
        return int(self.restores.prepare(request, self.checkpoints.work.progress()).rows)

    def step(self, id: str, step: int) -> pb.RestoreStatus:
        """Run a step of a restore, and restart if the step asks for it."""
        self.restores.step(pb.RestoreRequest(id=id, step=step))
        if self.again:
            self.again = False
            self.reopen()
        return self.restores.step(pb.RestoreRequest())


class Homes:
    """The shards of a cluster."""

    def __init__(self, directory: Path, shards: int, url: str, **shard: Any) -> None:
        self.url = url
        self.nodes = [
            Node(directory / f"shard-{number}", number, shards, url, **shard)
            for number in range(shards)
        ]
        self.map = routing.even_map(shards)

    def __enter__(self) -> Self:
        for node in self.nodes:
            node.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for node in self.nodes:
            node.close()

    def create(self, schema: TableSchema) -> None:
        for node in self.nodes:
            node.shard.create_table(schema)

    def drop(self, name: str) -> None:
        for node in self.nodes:
            node.shard.drop_table(name)

    def push(self, keys: Sequence[int], value: float = 1.0, **more: Any) -> None:
        for node, some in self._split(keys):
            item = push(some, value, **more)
            dim = node.shard.describe(item.table)[0].dim
            gradients = np.full((len(some), dim), value, np.float32)
            node.shard.exchange([replace(item, gradients=gradients)], [])

    def delete(self, keys: Sequence[int], **more: Any) -> None:
        for node, some in self._split(keys):
            node.shard.delete(change(some, **more))

    def _split(self, keys: Sequence[int]) -> list[tuple[Node, list[int]]]:
        array = np.array(keys, np.uint64)
        owners = routing.owners(array, self.map)
        return [
            (node, array[owners == shard].tolist())
            for shard, node in enumerate(self.nodes)
            if (owners == shard).any()
        ]

    def rows(self) -> dict[str, dict[int, tuple[Any, ...]]]:
        """Return the row, key, version, step and frequency of every key, by table and key."""
        found: dict[str, dict[int, tuple[Any, ...]]] = {}
        for node in self.nodes:
            for name, dump in node.shard.dump().items():
                table = found.setdefault(name, {})
                for key, row, meta in zip(
                    dump.keys.tolist(), dump.rows.tolist(), dump.meta.tolist(), strict=True
                ):
                    assert key not in table
                    table[key] = (row, meta)
        return found

    def waiting(self) -> dict[int, int]:
        """Return the counted occurrences of table t, by key."""
        dumps = [node.shard.dump()["t"] for node in self.nodes]
        return {key: total for dump in dumps for key, total, _ in dump.counters.tolist()}

    def versions(self) -> list[int]:
        return [node.shard.version for node in self.nodes]

    # ---- checkpoints

    def write(self, name: str, base: str = "", attempt: str | None = None) -> list[Any]:
        attempt = attempt or secrets.token_hex(8)
        request = pb.WriteCheckpointRequest(name=name, attempt=attempt, parent=base)
        parts = []
        for node in self.nodes:
            done = node.checkpoints.write(request, node.checkpoints.work.progress())
            parts.append(done.part)
        return [attempt, parts]

    def checkpoint(self, name: str, base: str = "") -> pb.CheckpointInfo:
        attempt, parts = self.write(name, base)
        return self.complete(name, attempt, parts, base)

    def complete(self, name: str, attempt: str, parts: Any, base: str = "") -> pb.CheckpointInfo:
        return self.nodes[0].checkpoints.completion.complete(
            pb.CompleteCheckpointRequest(name=name, attempt=attempt, parent=base, parts=parts)
        )

    def verify(self, name: str) -> int:
        request = pb.VerifyCheckpointRequest(name=name)
        work = [node.checkpoints for node in self.nodes]
        return sum(each.catalog.verify(request, each.work.progress()).bytes for each in work)

    def restore(self, name: str, *, replace: bool = False) -> int:
        id = secrets.token_hex(8)
        rows = sum(node.prepare(name, id, replace=replace) for node in self.nodes)
        for step in (Step.STEP_HOLD, Step.STEP_COMMIT, Step.STEP_RELEASE):
            for node in self.nodes:
                node.step(id, step)
        return rows

    def load(self, name: str, table: str, into: str, *, replace: bool = False, **hooks: Any) -> int:
        """Fill a table as a client does; ``hooks`` are called at "ready" and at "done"."""
        with Load(self, name, table, into, replace=replace) as load:
            for stage, step in (("ready", Continue.STEP_START), ("done", Continue.STEP_FINISH)):
                load.reach(stage)
                hooks.get(stage, lambda: None)()
                load.proceed(step)
            return load.rows()


class Load:
    """LoadTable on all shards of a cluster, one thread each; left early, the client is gone."""

    def __init__(
        self, cluster: Homes, name: str, table: str, into: str, *, replace: bool = False
    ) -> None:
        self.nodes = cluster.nodes
        self.id = secrets.token_hex(8)
        self.request = pb.LoadTableRequest(
            name=name, table=table, into=into, id=self.id, replace=replace
        )
        self.progress = [node.checkpoints.work.progress() for node in self.nodes]
        self.pool = ThreadPoolExecutor(len(self.nodes))

    def __enter__(self) -> Self:
        self.running = [
            self.pool.submit(node.checkpoints.loader.load, self.request, progress)
            for node, progress in zip(self.nodes, self.progress, strict=True)
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for progress in self.progress:
            progress.given_up = True
        self.pool.shutdown()

    def reach(self, stage: str) -> None:
        """Wait until all shards are at a stage; raise what one of them raises."""
        wanted = pb.CheckpointProgress.Stage.Value(f"STAGE_{stage.upper()}")
        while min(progress.stage for progress in self.progress) < wanted:
            for each in self.running:
                if each.done():
                    each.result()
            time.sleep(0.001)

    def proceed(self, step: int) -> None:
        request = pb.ContinueRequest(id=self.id, step=step)  # type: ignore[arg-type]
        for node in self.nodes:
            node.checkpoints.calls.proceed(request)

    def rows(self) -> int:
        return sum(each.result().rows for each in self.running)


def fill(cluster: Homes) -> None:
    """Write rows of two tables: with state, several steps, frequencies and versions, and gaps."""
    cluster.create(schema(max_step_ahead=0))
    cluster.create(schema("adam", optimizer=make_optimizer("adam", None, {}), dim=5))
    cluster.push(range(400), 1.0, step=1)
    cluster.push(range(100, 300), 2.0, step=-7)
    cluster.push(range(50, 900), 0.5, table="adam", step=9)
    cluster.push([0, 2**64 - 1, 2**63], 3.0, step=2**40)
    cluster.delete(range(200, 250))
    cluster.push(range(240, 245), 8.0, step=3)
