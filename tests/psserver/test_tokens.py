"""Tokens that a shard accepts and refuses."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from feeds import (
    Copy,
    Node,
    refused,
    run,
    with_node,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import copy_of

from psproto import codec
from psproto import ps_pb2 as pb
from psserver.errors import (
    BadRequest,
    LogDiverged,
    VersionCompacted,
    VersionInFuture,
)
from psserver.position import Phase, Position, decode
from storage.base import Base
from storage.errors import DiskFull


@run
async def test_tokens_of_another_history_are_refused(node: Node) -> None:
    await node.create()
    await node.durable()
    async with node.subscribe() as reader:
        await reader.up_to(1)
    here = decode(reader.token)
    other = replace(here, lineage=bytes(16)).encode()
    assert isinstance(await refused(node, token=other), LogDiverged)
    other = replace(here, epoch=here.epoch + 1).encode()
    assert isinstance(await refused(node, token=other), LogDiverged)
    error = await refused(node, token=replace(here, version=2).encode())
    assert isinstance(error, VersionInFuture)
    assert str(error) == (
        "the token has version 2, but the newest durable version of shard 0 is 1: subscribe again"
        " with a snapshot"
    )
    error = await refused(node, token=reader.token, tables=["t"])
    assert isinstance(error, BadRequest)
    expected = (
        "the token belongs to a subscription to other tables: request the same tables, or subscribe"
        " without the token"
    )
    assert str(error) == expected


@run
async def test_no_byte_of_a_token_can_be_changed(node: Node) -> None:
    await node.create()
    await node.durable()
    async with node.subscribe() as reader:
        await reader.up_to(1)
    token = reader.token
    for at in range(len(token)):
        bad = token[:at] + bytes([token[at] ^ 0x41]) + token[at + 1 :]
        error = await refused(node, token=bad)
        assert isinstance(error, BadRequest)
        assert str(error).startswith(f"token {bad[:16].hex()}... is malformed")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"content": 9}, "content must be one of [0, 1, 2, 3], got 9"),
        ({"start": 9}, "start must be one of [0, 1, 2, 3], got 9"),
        (
            {"tables": ["no good"]},
            "table name must be 1..128 letters, digits or any of _ . / -, and each part between"
            " slashes must start with a letter, a digit or _, got 'no good'",
        ),
        ({"tables": ["t"] * 5000}, "at most 4096 tables may be named, got 5000"),
        ({"tables": ["x" * 700_000]}, "a request may have at most 655360 bytes, got 700004"),
        ({"progress_ms": 99}, "progress_ms must be 0 or at least 100, got 99"),
        ({"coalesce_ms": 60_001}, "coalesce_ms must be in 0..60000, got 60001"),
        ({"chunk_bytes": 1 << 25}, "chunk_bytes must be in 0..16777216, got 33554432"),
        (
            {"content": pb.CONTENT_VALUES_AND_STATE, "dtype": pb.DTYPE_FLOAT16},
            "dtype must be 1 (float32) for embeddings with optimizer state, got 3",
        ),
    ],
)
def test_bad_requests_are_refused_by_name(tmp_path: Path, fields: Any, why: str) -> None:
    async def test(node: Node) -> None:
        error = await refused(node, **fields)
        assert isinstance(error, BadRequest)
        assert str(error) == f"subscription: {why}"

    asyncio.run(with_node(tmp_path / "shard", test))


@run
async def test_what_is_no_request_is_malformed(node: Node) -> None:
    with pytest.raises(codec.Malformed, match="SubscribeRequest"):
        await node.feed.serve(b"\xff", lambda _: asyncio.sleep(0))
    with pytest.raises(codec.Malformed, match=r"dtype.* must be one of .*, got 9"):
        raise await refused(node, dtype=9)


class Blind(Copy):
    """A copy that ignores what it is sent, since it does not have what its token says."""

    def take(self, delta: codec.Delta) -> None:
        pass


# ---- epochs


def put_back(node: Node, copy: Path) -> None:
    """Replace the data directory of a closed node by a copy."""
    shutil.rmtree(node.home.directory)
    shutil.copytree(copy, node.home.directory)


async def token_of(node: Node) -> bytes:
    """A token at the newest version."""
    await node.durable()
    async with node.subscribe(Blind(), start=pb.START_LATEST, content=pb.CONTENT_KEYS) as reader:
        return (await reader.next()).header.token


async def accepted(node: Node, token: bytes) -> bool:
    async with node.subscribe(Blind(), token=token, content=pb.CONTENT_KEYS) as reader:
        try:
            await reader.next()
        except LogDiverged:
            return False
    return True


@run
async def test_tokens_of_every_earlier_start_stay_valid(node: Node) -> None:
    await node.create()
    tokens = []
    for key in range(4):
        await node.push([key])
        tokens.append(await token_of(node))
        await (node.reopen() if key % 2 else node.die(copy_of))
    assert [await accepted(node, token) for token in tokens] == [True] * 4
    assert len({decode(token).epoch for token in tokens}) == 4


@pytest.mark.parametrize("starts", [0, 1, 2])
def test_tokens_of_a_future_that_was_abandoned_are_refused(tmp_path: Path, starts: int) -> None:
    """The data directory is put back from a copy, which was taken ``starts`` starts earlier."""

    async def test(node: Node) -> None:
        await node.create()
        await node.push([1])
        kept = await token_of(node)
        copy = tmp_path / "copy"
        copy_of(node.home.directory, copy)
        for _ in range(starts):
            await node.reopen()
        await node.push([2])
        await node.push([3])
        abandoned = await token_of(node)
        await node.close()
        put_back(node, copy)
        await node.open()
        node.history = {}
        assert await accepted(node, kept)
        assert not await accepted(node, abandoned)
        for key in range(10):  # the versions come again, with other changes
            await node.push([key], 5.0)
        await node.durable()
        assert await accepted(node, kept)
        assert not await accepted(node, abandoned)
        await node.reopen()
        assert await accepted(node, kept)
        assert not await accepted(node, abandoned)

    asyncio.run(with_node(tmp_path / "shard", test))


@run
async def test_a_full_disk_at_a_start_makes_no_token_pass_that_should_not(node: Node) -> None:
    await node.create()
    kept = await token_of(node)
    await node.close()
    full = pytest.MonkeyPatch()
    full.setattr(Base, "commit", lambda *_: (_ for _ in ()).throw(DiskFull("base", 1)))
    await node.open()
    full.undo()
    lost = await token_of(node)
    assert await accepted(node, kept)
    await node.reopen()
    assert await accepted(node, kept)
    assert not await accepted(node, lost)


# ---- forged tokens


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_forged_token_is_refused_or_leads_to_a_state(data: st.DataObject) -> None:
    """Whatever the fields are, if the checksum is right: no endless stream, no other error."""
    number = st.sampled_from((0, 1, 2, 5, 7, 8, 2**31, 2**32, 2**40, 2**63, 2**64 - 1))

    async def test(node: Node) -> None:
        await node.create()
        for key in range(6):
            await node.push([key, key + 9])
        await node.durable()
        boot, history = node.feed.source.boot, node.home.log.history
        forged = Position(
            lineage=node.home.log.lineage,
            epoch=data.draw(st.sampled_from((history.epoch, 1))),
            tables=0,
            phase=data.draw(st.sampled_from(Phase)),
            version=data.draw(number),
            after=data.draw(number),
            until=data.draw(number),
            table=data.draw(number.filter(lambda value: value < 2**32)),
            slot=data.draw(number),
            boot=data.draw(st.sampled_from((0, boot, boot ^ 2))),
        )
        async with node.subscribe(
            Blind(), token=forged.encode(), content=pb.CONTENT_KEYS
        ) as reader:
            for _ in range(20):
                try:
                    delta = await reader.next()
                except (BadRequest, LogDiverged, VersionInFuture, VersionCompacted):
                    return
                if not delta.header.more and delta.header.version == node.shard.version:
                    return
            raise AssertionError(f"no end of {forged}")

    with TemporaryDirectory() as directory:
        asyncio.run(with_node(Path(directory) / "shard", test))
