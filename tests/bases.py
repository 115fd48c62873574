"""Bases of tests, and functions of test files that run in processes of their own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from blocks import pack_rows

from storage.base import _SEAL, _STATE, Base
from storage.basestate import BaseState, BaseTable
from storage.block import Block
from storage.history import History
from storage.pages import Pages

KNOWN = frozenset((_STATE, _SEAL))
STATE = BaseState(
    lineage=bytes(range(16)),
    history=History((3, 2**64 - 1), (11,)),
    version=17,
    next_table=4,
    tables=(
        BaseTable(number=1, schema='{"name":"a"}', created=2, policy=b"\0\xff"),
        BaseTable(number=3, schema='{"name":"\u00fc"}', created=9),
    ),
    horizon=5,
    sessions=b"\0sessions",
    blocks=(1, 2**40),
    cells=1,
    logged=True,
    directory=1,
    distinct=True,
)
STATE_GOLDEN = (
    "5053424153450a00 03000000 08010000 0200000000000000 0900000000000000 407f3d4088817f2b"
    + (
        '{"lineage":"000102030405060708090a0b0c0d0e0f","epochs":[3,18446744073709551615],'
        '"ends":[11],"version":17,"next_table":4,'
        '"tables":[[1,"{\\"name\\":\\"a\\"}",2,"00ff"],[3,"{\\"name\\":\\"\u00fc\\"}",9,""]],'
        '"horizon":5,"cells":1,"logged":true,"directory":1,"distinct":true}      '
    )
    .encode()
    .hex()
    + "0100000000000000 0000000000010000 0073657373696f6e73"
)
SECOND_GOLDEN = (  # format 2: no directory
    "5053424153450a00 02000000 e8000000 0200000000000000 0900000000000000 9cd95034f6b51a66"
    + (
        '{"lineage":"000102030405060708090a0b0c0d0e0f","epochs":[3,18446744073709551615],'
        '"ends":[11],"version":17,"next_table":4,'
        '"tables":[[1,"{\\"name\\":\\"a\\"}",2,"00ff"],[3,"{\\"name\\":\\"\u00fc\\"}",9,""]],'
        '"horizon":5,"cells":1,"logged":true}    '
    )
    .encode()
    .hex()
    + "0100000000000000 0000000000010000 0073657373696f6e73"
)
OLDER_GOLDEN = (  # format 1: one epoch
    "5053424153450a00 01000000 c0000000 0200000000000000 0900000000000000 f55372af7f7881f3"
    + (
        '{"lineage":"000102030405060708090a0b0c0d0e0f","epoch":3,"version":17,"next_table":4,'
        '"tables":[[1,"{\\"name\\":\\"a\\"}",2,"00ff"],[3,"{\\"name\\":\\"\u00fc\\"}",9,""]],'
        '"horizon":5,"cells":1,"logged":true}'
    )
    .encode()
    .hex()
    + "0100000000000000 0000000000010000 0073657373696f6e73"
)
FIRST_GOLDEN = (  # the first states, without `logged`
    "5053424153450a00 01000000 b8000000 0200000000000000 0900000000000000 cb7988ec27351086"
    + (
        '{"lineage":"000102030405060708090a0b0c0d0e0f","epoch":3,"version":17,"next_table":4,'
        '"tables":[[1,"{\\"name\\":\\"a\\"}",2,"00ff"],[3,"{\\"name\\":\\"\u00fc\\"}",9,""]],'
        '"horizon":5,"cells":1}      '
    )
    .encode()
    .hex()
    + "0100000000000000 0000000000010000 0073657373696f6e73"
)


def rows(number: int, count: int = 4, width: int = 3) -> memoryview:
    """A block whose every array says its number."""
    numbers = np.arange(number, number + count, dtype=np.uint64)
    values = np.full((count, width), number, np.float32)
    return pack_rows(1, numbers, numbers, numbers.view(np.int64), numbers, values)


def state(version: int, blocks: tuple[int, ...] | list[int], sessions: bytes = b"") -> BaseState:
    return dataclasses.replace(STATE, version=version, blocks=tuple(blocks), sessions=sessions)


def contents(block: Block) -> bytes:
    return block.data.tobytes()


def listed(base: Base) -> dict[int, bytes]:
    return {number: contents(block) for number, block in base.blocks()}


def stored(directory: Path) -> set[int]:
    """Numbers of the blocks in the file, listed or not."""
    with open(directory / "data.mdb", "rb") as file:
        return Pages(file.fileno(), str(directory), KNOWN).numbers


def start(file: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, file, *map(str, arguments)]
    path = os.pathsep.join(sys.path)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, **pipes, **options)


def run(file: str, *arguments: object) -> Any:
    """Run a function of a test file in a process of its own, and return what it prints as JSON."""
    process = start(file, *arguments)
    output, _ = process.communicate(timeout=220)
    assert process.returncode == 0, f"exit status {process.returncode}: {output}"
    return json.loads(output)
