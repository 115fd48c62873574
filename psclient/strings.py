"""Keys from strings: the XXH64 hash of the UTF-8 bytes, with seed 0.

    hash_keys(["male", "female"])  ->  uint64[2]

XXH64 is specified by Yann Collet (xxHash specification 0.1.1); implementations in other languages
give the same keys. Distinct strings may collide: among n strings, ``n^2 / 2^65`` colliding pairs
are expected, which is 1/37 of a pair for a billion strings.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from psclient.errors import InvalidArgument

_P1 = np.uint64(0x9E3779B185EBCA87)
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P3 = np.uint64(0x165667B19E3779F9)
_P4 = np.uint64(0x85EBCA77C2B2AE63)
_P5 = np.uint64(0x27D4EB2F165667C5)

jit = njit(nogil=True, cache=True, error_model="numpy")


@jit
def _rotate(x: Any, by: int) -> Any:
    """Return a uint64 rotated left by ``by`` bits, 0 < by < 64."""
    return (x << np.uint64(by)) | (x >> np.uint64(64 - by))


@jit
def _word(data: Any, at: int, size: int) -> Any:
    """Return the little-endian integer of ``size`` bytes at ``data[at]``, uint8[...], as uint64."""
    value = np.uint64(0)
    for i in range(size):
        value |= np.uint64(data[at + i]) << np.uint64(8 * i)
    return value


@jit
def _round(lane: Any, word: Any) -> Any:
    """Return the new value of an accumulator of XXH64, a uint64, that takes in a uint64 word."""
    return _rotate(lane + word * _P2, 31) * _P1


@jit
def _xxh64(data: Any, start: int, end: int) -> Any:
    """Return the XXH64 hash, with seed 0, of data[start:end]; data is uint8[...]."""
    at = start
    if end - start >= 32:
        a, b, c, d = _P1 + _P2, _P2, np.uint64(0), np.uint64(0) - _P1
        while at + 32 <= end:
            a = _round(a, _word(data, at, 8))
            b = _round(b, _word(data, at + 8, 8))
            c = _round(c, _word(data, at + 16, 8))
            d = _round(d, _word(data, at + 24, 8))
            at += 32
        h = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
        for lane in (a, b, c, d):
            h = (h ^ _round(np.uint64(0), lane)) * _P1 + _P4
    else:
        h = _P5
    h += np.uint64(end - start)
    while at + 8 <= end:
        h = _rotate(h ^ _round(np.uint64(0), _word(data, at, 8)), 27) * _P1 + _P4
        at += 8
    if at + 4 <= end:
        h = _rotate(h ^ (_word(data, at, 4) * _P1), 23) * _P2 + _P3
        at += 4
    while at < end:
        h = _rotate(h ^ (np.uint64(data[at]) * _P5), 11) * _P1
        at += 1
    h = (h ^ (h >> np.uint64(33))) * _P2
    h = (h ^ (h >> np.uint64(29))) * _P3
    return h ^ (h >> np.uint64(32))


@jit
def _hash_all(data: Any, bounds: Any, out: Any) -> None:
    """Set ``out[i]`` to the XXH64 hash of ``data[bounds[i]:bounds[i + 1]]``.

    data    uint8[bytes]
    bounds  int64[n + 1]
    out     uint64[n]  written
    """
    for i in range(out.shape[0]):
        out[i] = _xxh64(data, bounds[i], bounds[i + 1])


def _bytes(string: Any) -> bytes:
    """Return the UTF-8 bytes of a str, or return ``bytes`` unchanged.

    Raises InvalidArgument for other values and for text that UTF-8 cannot encode.
    """
    try:
        if isinstance(string, str | bytes):
            return string.encode() if isinstance(string, str) else string
    except UnicodeEncodeError:
        pass
    raise InvalidArgument(f"strings must be valid Unicode text or bytes, got {string!r}")


def hash_keys(strings: Iterable[str | bytes]) -> NDArray[np.uint64]:
    """Return one key for each of n strings, uint64[n]: its XXH64 hash with seed 0.

    strings  strings, which are encoded as UTF-8, or ``bytes``

    Raises InvalidArgument for values that are neither valid Unicode text nor bytes, and if
    ``strings`` is a single string.
    """
    if isinstance(strings, str | bytes):
        raise InvalidArgument(f"strings must be a list of strings, got {strings!r}")
    encoded = [_bytes(s) for s in strings]
    bounds = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(s) for s in encoded], out=bounds[1:])
    out = np.empty(len(encoded), np.uint64)
    _hash_all(np.frombuffer(b"".join(encoded) or b"\0", np.uint8), bounds, out)
    return out
