"""Damage a stopped shard's directory or a checkpoint. Each damage must be refused or harmless.

    python -m tests.fault.flips --count 10000 --seed 7             one byte each time
    python -m tests.fault.flips --count 10000 --seed 7 --harder    and cuts, holes, lost files

A start that refuses must name the file and the offset in it. A start that succeeds must recover
exactly the state that was stopped: then the byte had no meaning, as in a free page or after the end
of the log. Or the damage is reported when a row is read from the disk, and all other rows are as
they were. A start between two steps of a restore may also recover the earlier state, if it reports
that the restore failed. Every byte of a named checkpoint has a meaning, so its verification must
name the damaged file.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs by itself
sys.path.extend(str(Path(__file__).parents[2] / each) for each in ("", "proto"))

import numpy as np
from homes import Homes, Node, Step
from stores import Home, change, contents, copy_of, push, schema

from psproto import ps_pb2 as pb
from psserver import swap
from storage.admission.rules import Counter as Admission
from storage.errors import Corrupt, StorageError
from storage.optimizers import make_optimizer

MEMORY = Path("/dev/shm")  # noqa: S108  a disk that syncs at once, if there is one
PLACES = ("data.mdb", ".log", "SYNCED", ".spare", "base/spare", "STATE")  # an error names one
PARTS = (".blocks", ".records", ".counters", ".sessions", "MANIFEST.json", ".json")
WHOLE = ("log", "base")  # directories that an error names, and that may be lost
BYTE = ("bit", "bit", "bit", "byte")
HARDER = (*BYTE, "zeros", "noise", "cut", "swap", "gone", "lost")
MOVES = 3  # by which a restore exchanges base and log
RESTORE = "0123456789abcdef"
TORN = "a torn tail was cut off"


@contextmanager
def a_directory() -> Iterator[Path]:
    where = MEMORY if MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="ps-flips-", dir=where) as directory:
        yield Path(directory)


def make(directory: Path, seed: int, *, clean: bool) -> tuple[Path, dict[str, Any]]:
    """A shard's directory with every kind of content, and its expected state.

    clean  stopped; else as kill -9 leaves it, all of it synced
    """
    rng = random.Random(seed)
    home = Home(directory / "made", segment_bytes=1 << 14, keep=(1 << 14, 0.0), max_tombstones=20)
    home.open()
    shard = home.shard
    shard.create_table(schema("t"))
    shard.create_table(schema("adam", optimizer=make_optimizer("adam", 0.1, {}), dim=9))
    shard.create_table(schema("gone"))
    for sequence in range(1, 120):
        keys = rng.sample(range(300), 12)
        who = {"client": 1 + sequence % 3, "sequence": sequence}
        wide = np.full((12, 9), float(sequence), np.float32)
        match sequence % 4:
            case 0:
                shard.delete(change(keys, **who))
            case 1:
                shard.exchange([push(keys, table="adam", gradients=wide, **who)], [])
            case _:
                shard.exchange([push(keys, float(sequence), **who)], [])
        if sequence == 50:
            shard.exchange([push([1], table="gone")], [])
            shard.drop_table("gone")
        if sequence % 23 == 0:
            shard.barrier(f"b{sequence}")
            home.flush()
    home.written()
    want = contents(shard)
    if not clean:
        copy_of(home.directory, directory / "killed")
    home.close()
    if clean:
        copy_of(home.directory, directory / "stopped")
    return directory / ("stopped" if clean else "killed"), want


def half_restored(directory: Path, moves: int) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A directory whose process died between two of the moves of a restore; what it is to hold,
    and what it held before.
    """
    with Homes(directory / "cluster", 1, f"file://{directory}/checkpoints") as cluster:
        cluster.create(schema("t"))
        cluster.push(range(60), client=7, incarnation=1, sequence=1)
        cluster.checkpoint("a")
        cluster.push(range(30, 90), client=7, incarnation=1, sequence=2)
        cluster.create(schema("later"))
        node = cluster.nodes[0]
        before = contents(node.shard)
        node.prepare("a", RESTORE, replace=True)
        node.step(RESTORE, Step.STEP_HOLD)
        node.restores.step(pb.RestoreRequest(id=RESTORE, step=Step.STEP_COMMIT))
        node.home.written()
        made = copy_of(node.directory, directory / "half")
        node.reopen()
        after = contents(node.shard)
    left, move = [moves], swap._move

    def dying(source: Path, target: Path) -> None:
        if not left[0]:
            raise InterruptedError
        left[0] -= 1
        move(source, target)

    swap._move = dying
    try:
        with suppress(InterruptedError):
            swap.settle(made)
    finally:
        swap._move = move
    return made, after, before


class Checkpoint:
    """An incremental checkpoint of two shards, its parent, and its verification."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "checkpoints"
        self._cluster = Homes(directory / "cluster", 2, f"file://{self.directory}")

    def __enter__(self) -> Checkpoint:
        cluster = self._cluster.__enter__()
        cluster.create(schema("t"))
        cluster.create(schema("adam", optimizer=make_optimizer("adam", 0.1, {}), dim=9))
        cluster.create(schema("waiting", admission=Admission(threshold=3)))
        cluster.push(range(100), table="waiting")
        cluster.push(range(300), client=7, incarnation=1, sequence=1)
        cluster.push(range(50), table="adam")
        cluster.checkpoint("a")
        capture = cluster.nodes[0].shard.capture

        def captured() -> Any:  # what comes while rows are copied is added as records
            found = capture()
            cluster.nodes[0].shard.capture = capture  # type: ignore[method-assign]
            cluster.push(range(20), client=7, incarnation=1, sequence=2)
            return found

        cluster.nodes[0].shard.capture = captured  # type: ignore[method-assign]
        cluster.delete(range(7, 12))
        cluster.push(range(50, 150), table="waiting")
        cluster.checkpoint("b", "a")
        self.verify()
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.__exit__(None, None, None)

    def verify(self) -> None:
        """Verify the checkpoint. StorageError if it is damaged."""
        self._cluster.verify("b")

    def damaged(self, rng: random.Random, kinds: Sequence[str]) -> tuple[str, str, str | None]:
        """Damage the checkpoint, verify, repair. Return the damage, the outcome and any error."""
        whole = {p: p.read_bytes() for p in self.directory.rglob("*") if p.is_file()}
        done = damage(rng, self.directory, kinds)
        name = done.partition(": ")[0]
        try:
            self.verify()
        except StorageError as error:
            text, outcome = str(error), type(error).__name__
            named = name in text or (outcome == "UnknownCheckpoint" and name.split("/")[0] in text)
            wrong = None if named else f"does not name the file: {text}"
        except Exception as error:
            outcome = type(error).__name__
            wrong = f"{outcome}: {error}"
        else:
            outcome = "verified"
            same = all(p.exists() and p.read_bytes() == data for p, data in whole.items())
            wrong = None if same else "verified, though it is damaged"
        for path, data in whole.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        return done, outcome, wrong


def damage(rng: random.Random, directory: Path, kinds: Sequence[str]) -> str:
    """Damage one file of a directory. Return a description of the damage."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    paths = [path for path in paths if path.stat().st_size and path.name != "lock.mdb"]
    path = rng.choice(paths)
    name, size = path.relative_to(directory), path.stat().st_size
    data = bytearray(path.read_bytes())
    used = len(bytes(data).rstrip(b"\0")) or 1
    at = rng.randrange(used if rng.random() < 0.9 else size)
    match rng.choice(kinds):
        case "bit":
            bit = rng.randrange(8)
            data[at] ^= 1 << bit
            what = f"bit {bit} of byte {at} flipped"
        case "byte":
            data[at] = (data[at] + rng.randrange(1, 256)) % 256
            what = f"byte {at} changed to {data[at]}"
        case "zeros":
            count = rng.choice((8, 64, 512, 4096))
            data[at : at + count] = bytes(len(data[at : at + count]))
            what = f"{count} bytes from {at} on zeroed"
        case "noise":
            count = rng.choice((2, 8, 512))
            data[at : at + count] = rng.randbytes(len(data[at : at + count]))
            what = f"{count} bytes from {at} on made noise"
        case "lost" if path.name != "STATE":  # with which there would be nothing left
            tops = [directory / part for part in WHOLE if directory / part in path.parents]
            whole = tops[0] if tops else path.parent
            shutil.rmtree(whole)
            return f"{whole.relative_to(directory)}: lost, {name} included"
        case "gone" | "lost":
            path.unlink()
            return f"{name}: deleted"
        case "cut":
            del data[at:]
            what = f"cut at byte {at}"
        case _:
            count = rng.choice((8, 512, 4096))
            other = rng.randrange(size)
            chunk = bytes(data[other : other + count])
            data[at : at + len(chunk)] = chunk
            del data[size:]
            what = f"{len(chunk)} bytes from {other} on copied to {at}"
    path.write_bytes(data)
    return f"{name}: {what}"


def start(
    directory: Path, want: dict[str, Any], before: dict[str, Any] | None = None
) -> tuple[str, str | None]:
    """Start a shard. Return the outcome, and a description of the error if it is wrong.

    before  what it held before a restore that is under way
    """
    node = Node(directory, 0, 1, "file:///nowhere", segment_bytes=1 << 14, max_tombstones=20)
    try:
        node.open()
    except StorageError as error:
        text = str(error)
        named = any(place in text for place in PLACES) or any(
            f"{directory / part}:" in text for part in WHOLE
        )
        return type(error).__name__, None if named else f"does not name a file: {text}"
    except Exception as error:
        return type(error).__name__, f"{type(error).__name__}: {error}"
    try:
        got = contents(node.shard)
    except Corrupt as error:
        return _read_in_part(node, want["rows"], str(error))
    torn = node.home.log.torn_bytes
    failed = node.restores.step(pb.RestoreRequest()).phase == pb.RestoreStatus.PHASE_FAILED
    node.close()
    if got == want:
        return "identical" if not torn else f"identical, {TORN}", None
    if failed and got == before:
        return "the restore failed, identical", None
    differs = [key for key in want if got[key] != want[key]]
    return "another state", f"came up with other {', '.join(differs)}"


def _read_in_part(node: Node, want: dict[str, Any], error: str) -> tuple[str, str | None]:
    """Read each row of a shard of which some are damaged on disk. See ``start`` for the result.

    want   what the shard should have: (keys, rows, ...) by name of the table
    error  what a read of all rows has raised
    """
    wrong = None if any(place in error for place in PLACES) else f"does not name a file: {error}"
    for name, (keys, rows, *_) in want.items():
        store = node.shard._tables.get(name).table.store
        for key, row in zip(keys, rows, strict=True):
            found = np.full((1, len(row)), np.nan, np.float32)
            with suppress(Corrupt):
                store.gather(store.find(np.array([key], np.uint64))[0], found)
                if found[0].tolist() != row:
                    wrong = f"row {key} of {name} is {found[0].tolist()}, not {row}"
    node.close()
    return "Corrupt when rows were read, others identical", wrong


def run(
    count: int,
    seed: int,
    directory: Path,
    kinds: Sequence[str] = HARDER,
    say: Callable[[str], None] = print,
) -> tuple[Counter[str], list[str]]:
    """Return the number of each outcome, and all errors."""
    say(f"seed {seed}, {count} damages")
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    places: list[tuple[Path, dict[str, Any], dict[str, Any] | None]] = []
    for clean in (True, False):
        (directory / str(clean)).mkdir()
        places.append((*make(directory / str(clean), seed, clean=clean), None))
    (directory / "restore").mkdir()
    places.append(half_restored(directory / "restore", 1 + seed % MOVES))
    for source, want, before in places:
        outcome, what = start(copy_of(source, directory / "same"), want, before)
        shutil.rmtree(directory / "same")
        if outcome != "identical":
            wrong.append(f"undamaged, {source}: {outcome}: {what}")
    began = time.monotonic()
    with Checkpoint(directory) as checkpoint:
        for number in range(count):
            at = rng.randrange(4)
            if at == 3:
                done, outcome, what = checkpoint.damaged(rng, kinds)
            else:
                source, want, before = places[at]
                victim = copy_of(source, directory / "victim")
                done = f"{source.name}/{damage(rng, victim, kinds)}"
                outcome, what = start(victim, want, before)
                shutil.rmtree(victim)
            kind = next(place for place in PLACES + PARTS if place in done)
            outcomes[f"{kind}: {outcome}"] += 1
            if what is not None:
                wrong.append(f"number {number}, {done}: {what}")
            if (number + 1) % 1000 == 0:
                spent = time.monotonic() - began
                say(f"{number + 1} damages, {spent:.0f} s, {len(wrong)} wrong")
    return outcomes, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--harder", action="store_true")
    given = parser.parse_args()
    kinds = HARDER if given.harder else BYTE
    with a_directory() as directory:
        outcomes, wrong = run(
            given.count, given.seed, directory, kinds, lambda text: print(text, flush=True)
        )
    for outcome, often in sorted(outcomes.items()):
        print(f"{often:6} {outcome}")
    for line in wrong[:50]:
        print(line, file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
