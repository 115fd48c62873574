"""Sums of the pieces of a block, so that a part of the block can be verified on its own.

    piece 0 = the first 4,080 bytes of the block, with zeros in place of its checksum
    piece i = the next 4,096 bytes; the last piece may be shorter

A block in LMDB begins 16 bytes after the start of a page, so that each piece is in one page of the
file. The sum of a piece is its CRC-32C: it detects up to 3 flipped bits, and bursts of up to 32
bits, for certain, and any other damage with a probability of 1 - 2^-32. Lengths are in words of 8
bytes, because all pieces are whole words.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from storage.kernels import jit

PIECE = 4096  # bytes
SHIFT = 16  # bytes between the start of a page and the start of the block
PIECE_WORDS, SHIFT_WORDS, CHECKSUM_WORD = PIECE // 8, SHIFT // 8, 5

_MACHINE = platform.machine()
_INSTRUCTION = {  # name of the instruction, and whether its state has 64 bits
    "x86_64": ("llvm.x86.sse42.crc32.64.64", 64),
    "aarch64": ("llvm.aarch64.crc32cx", 32),
}


@intrinsic
def _crc_instruction(typingctx: Any, state: Any, word: Any) -> Any:
    """Return the CRC-32C state after 8 more bytes, computed by an instruction of the CPU."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name, bits = _INSTRUCTION[_MACHINE]
        kind, word = ir.IntType(bits), ir.IntType(64)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(kind, [kind, word]), name
        )
        state = args[0] if bits == 64 else builder.trunc(args[0], kind)
        result = builder.call(function, [state, args[1]])
        return result if bits == 64 else builder.zext(result, word)

    return types.uint64(types.uint64, types.uint64), codegen


@jit
def crc_bitwise(state: Any, word: Any) -> Any:
    """Return the CRC-32C state after 8 more bytes, on any machine. Slow."""
    state = np.uint64(state) ^ np.uint64(word)
    for _ in range(64):
        odd = state & np.uint64(1)
        state = (state >> np.uint64(1)) ^ (np.uint64(0x82F63B78) * odd)
    return state


_crc = _crc_instruction if _MACHINE in _INSTRUCTION else crc_bitwise


@jit
def sum_piece(words: Any, first: int, body: int, piece: int) -> Any:
    """Return the sum of one piece of a block.

    words  uint64[]  memory that contains the block
    first  index in ``words`` of the start of the block
    body   words of the block before its sums
    piece  number of the piece
    """
    start = max(piece * PIECE_WORDS - SHIFT_WORDS, 0)
    end = min((piece + 1) * PIECE_WORDS - SHIFT_WORDS, body)
    state = np.uint64(0xFFFFFFFF)
    if start == 0:
        for i in range(CHECKSUM_WORD):
            state = _crc(state, words[first + i])
        state = _crc(state, np.uint64(0))
        start = CHECKSUM_WORD + 1
    for i in range(start, end):
        state = _crc(state, words[first + i])
    return np.uint32(state) ^ np.uint32(0xFFFFFFFF)


@jit
def sum_pieces(words: Any, body: int, sums: Any) -> None:
    """Write the sums of the first pieces of a block to ``sums``, uint32[n].

    words  uint64[]  the block
    body   words of the block before its sums
    """
    for piece in range(sums.shape[0]):
        sums[piece] = sum_piece(words, 0, body, piece)


@jit
def intact(words: Any, first: int, body: int, piece: int) -> Any:
    """Return whether a piece of a block has the sum that the block contains.

    The sums, uint32[pieces], stand after the body. For the parameters see ``sum_piece``.
    """
    pair = words[first + body + (piece >> 1)]
    stored = np.uint32((pair >> np.uint64(32 * (piece & 1))) & np.uint64(0xFFFFFFFF))
    return stored == sum_piece(words, first, body, piece)


def piece_count(body: int) -> int:
    """Return the number of pieces of a block with ``body`` words before its sums."""
    return -(-(body + SHIFT_WORDS) // PIECE_WORDS)
