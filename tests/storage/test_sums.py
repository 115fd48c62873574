"""Sums of pieces: CRC-32C, and the pieces of a block in the file's pages."""

from __future__ import annotations

import numpy as np
import pytest
from blocks import rows_to_fill
from numba import njit
from numpy.typing import NDArray

from storage.block import FORMATS, ROWS, row_layout
from storage.sums import _crc, crc_bitwise, intact, piece_count, sum_piece, sum_pieces

_step = njit(lambda state, word: _crc(state, word))


def crc32c(data: bytes) -> int:
    """CRC-32C by its definition."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def random_words(count: int, seed: int = 1) -> NDArray[np.uint64]:
    return np.random.default_rng(seed).integers(0, 1 << 64, count, np.uint64)


def test_sums_are_crc_32c_of_the_pieces() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of the standard
    words = random_words(1200)
    sums = np.zeros(piece_count(1200), np.uint32)
    sum_pieces(words, 1200, sums)
    data = words.tobytes()
    data = data[:40] + bytes(8) + data[48:]  # the block's checksum counts as zeros
    pieces = [data[:4080], data[4080:8176], data[8176:]]
    assert sums.tolist() == [crc32c(piece) for piece in pieces]


def test_the_slow_way_gives_the_same_sums() -> None:
    state = np.uint64(0xFFFFFFFF)
    for word in random_words(50):
        assert crc_bitwise(state, word) == crc(state, word)
        state = crc_bitwise(state, word)


def crc(state: np.uint64, word: np.uint64) -> int:
    """One step of the CPU's instruction."""
    return int(_step(state, word))


@pytest.mark.parametrize(
    ("words", "pieces"), [(8, 1), (510, 1), (511, 2), (1022, 2), (1023, 3), (262_142, 512)]
)
def test_a_piece_ends_where_a_page_of_the_file_ends(words: int, pieces: int) -> None:
    assert piece_count(words) == pieces


def test_every_flipped_bit_of_a_piece_changes_its_sum() -> None:
    words = random_words(1100)
    for piece, start, end in ((0, 0, 510), (2, 1022, 1100)):
        right = sum_piece(words, 0, 1100, piece)
        for word in range(start, end):
            for bit in (0, 1, 31, 32, 63):
                words[word] ^= np.uint64(1 << bit)
                assert (sum_piece(words, 0, 1100, piece) == right) == (word == 5)
                words[word] ^= np.uint64(1 << bit)


def test_pieces_are_compared_with_the_sums_in_the_block() -> None:
    block = rows_to_fill(1, 4, 1000)
    block.data[64:] = random_words(len(block.data) // 8).view(np.uint8)[: len(block.data) - 64]
    block.seal()
    layout = row_layout(4, 1000, FORMATS[ROWS])
    words = np.zeros(len(block.data) // 8 + 100, np.uint64)
    words[100:] = block.data.view(np.uint64)
    pieces = range(layout.pieces)
    assert all(intact(words, 100, layout.sums // 8, piece) for piece in pieces)
    for piece in pieces:
        words[100 + max(piece * 512 - 2, 0)] ^= np.uint64(1)
        good = [bool(intact(words, 100, layout.sums // 8, each)) for each in pieces]
        assert good == [each != piece for each in pieces]
        words[100 + max(piece * 512 - 2, 0)] ^= np.uint64(1)
    assert not intact(np.zeros(600, np.uint64), 0, 510, 0)  # zeros were never written
