"""Loops that numpy cannot express, shared by the index, the tiers and the optimizers.

Every kernel releases the GIL, raises nothing, and allocates nothing unless it says so. It does not
check its arguments: the table has done so. Slots are int64; ``ABSENT`` marks a key without a slot.

Reaching a row takes one or more dependent cache misses. A batch knows its rows in advance, so each
loop prefetches the memory of a few iterations ahead, and the misses overlap.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Slots = NDArray[np.int64]
Rows = NDArray[np.float32]

ABSENT = -1
_FLOAT, _UINT = struct.Struct("<f"), struct.Struct("<I")
LINE = 64  # bytes in a cache line
AHEAD = 8  # rows that are prefetched
FAR = 24  # the same in ``gather``, which does little else than wait for memory


class Images(NamedTuple):
    """Whole rows, [embedding | optimizer state], with their keys and metadata."""

    keys: Keys  # uint64[n], distinct
    versions: NDArray[np.uint64]  # [n]
    steps: NDArray[np.int64]  # [n]
    frequencies: NDArray[np.uint64]  # [n]
    rows: Rows  # float32[n, width]


jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)
inline = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False, inline="always")


def readonly(array: NDArray[Any]) -> NDArray[Any]:
    """Return a view of ``array`` that cannot be written.

    Decoded arrays are read-only. A kernel that always gets read-only arrays is compiled once.
    """
    view = array.view()
    view.flags.writeable = False
    return view


@intrinsic
def prefetch(typingctx: Any, array: Any, row: Any, byte: Any) -> Any:
    """Prefetch the CPU cache line at byte ``byte`` of ``array[row]``. Any address is safe."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array_type = signature.args[0]
        view = context.make_array(array_type)(context, builder, args[0])
        stride = cgutils.unpack_tuple(builder, view.strides)[0]
        base = builder.ptrtoint(view.data, ir.IntType(64))
        address = builder.add(builder.add(base, builder.mul(stride, args[1])), args[2])
        pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), codegen


@jit
def prefetch_row(array: Any, row: int, size: int) -> None:
    """Prefetch the first ``size`` bytes of ``array[row]``."""
    for byte in range(0, size, LINE):
        prefetch(array, row, byte)


@inline
def mix64(key: Any) -> Any:
    """Return a hash of ``key``: the 'moremur' finalizer (Pelle Evensen, 2019), a bijection.

    It differs from the hash that routes keys to shards. The keys of one shard share bits of the
    routing hash, so that an index over it would be unbalanced.
    """
    x = np.uint64(key)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x3C79AC492BA7B653)
    x ^= x >> np.uint64(33)
    x *= np.uint64(0x1CE4E5B9AC31D2B5)
    x ^= x >> np.uint64(27)
    return x


@jit
def gather(slab: Any, slots: Any, dim: int, out: Any) -> None:
    """Copy the embeddings of ``slots`` into ``out``; rows of absent keys are left unchanged.

    slab   float32[capacity, width]  width >= dim
    slots  int64[n]                  position in the slab, or ABSENT
    out    float32[n, dim]           written where present
    """
    n = slots.shape[0]
    size = 4 * dim
    for i in range(min(FAR, n)):
        if slots[i] >= 0:
            prefetch_row(slab, slots[i], size)
    for i in range(n):
        ahead = i + FAR
        if ahead < n and slots[ahead] >= 0:
            prefetch_row(slab, slots[ahead], size)
        slot = slots[i]
        if slot >= 0:
            for j in range(dim):
                out[i, j] = slab[slot, j]


@jit
def fill_state(slab: Any, slots: Any, dim: int, state: Any) -> None:
    """Write the initial optimizer state after the embeddings of new rows.

    slab   float32[capacity, dim + len(state)]
    slots  int64[n]     positions of the new rows
    state  float32[w]   the state of every new row
    """
    for i in range(slots.shape[0]):
        slot = slots[i]
        for j in range(state.shape[0]):
            slab[slot, dim + j] = state[j]


@jit
def scatter(slab: Any, slots: Any, rows: Any) -> None:
    """Copy whole rows into their slots; rows whose slot is ABSENT are skipped.

    slab   float32[capacity, width]
    slots  int64[n]           distinct slots, or ABSENT
    rows   float32[n, width]
    """
    n, width = rows.shape
    for i in range(n):
        if i + AHEAD < n and slots[i + AHEAD] >= 0:
            prefetch_row(slab, slots[i + AHEAD], 4 * width)
        slot = slots[i]
        if slot >= 0:
            for j in range(width):
                slab[slot, j] = rows[i, j]


@jit
def _largest(numbers: Any) -> Any:
    """Return the bits of the largest magnitude among float32 numbers, given by their bits.

    numbers  uint32[n]

    Compares the bits without the sign as integers: they have the same order as the magnitudes, and
    infinity and NaN come last.
    """
    most = np.uint32(0)
    for i in range(numbers.shape[0]):
        most = max(most, numbers[i] & np.uint32(0x7FFFFFFF))
    return most


def largest_magnitude(numbers: Rows) -> float:
    """Return the largest magnitude among float32 numbers; infinity and NaN count as the largest."""
    return from_bits(_largest(numbers.reshape(-1).view(np.uint32)))


def from_bits(bits: int) -> float:
    """Return the float32 that has these bits."""
    number: float = _FLOAT.unpack(_UINT.pack(bits))[0]
    return number


@jit
def largest_in(slab: Any, slots: Any, most: Any) -> Any:
    """Return the largest magnitude in some rows, as the bits of a float32; see ``from_bits``.

    slab   uint32[capacity, width]  bits of the float32 rows
    slots  int64[n]                 the rows to look at
    most   uint32[width]            overwritten with the largest magnitude of each column
    """
    n, width = slots.shape[0], most.shape[0]
    most[:] = 0
    for i in range(n):
        if i + AHEAD < n:
            prefetch_row(slab, slots[i + AHEAD], 4 * width)
        slot = slots[i]
        for j in range(width):
            most[j] = max(most[j], slab[slot, j] & np.uint32(0x7FFFFFFF))
    return most.max()


@jit
def any_below(rows: Any, start: int, floors: Any) -> Any:
    """Return whether rows[i, start + j] is less than floors[j], or NaN, for any i and j.

    rows    float32[n, width]
    floors  float32[k]
    """
    below = 0
    for i in range(rows.shape[0]):
        for j in range(floors.shape[0]):
            below += not rows[i, start + j] >= floors[j]
    return below > 0


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def square_sum(row: Any, dim: int) -> Any:
    """Return the sum of squares of the first ``dim`` numbers, in float64, in any order."""
    total = 0.0
    for j in range(dim):
        number = np.float64(row[j])
        total += number * number
    return total


@jit
def measure(slab: Any, slots: Any, dim: int, norms: Any) -> None:
    """Write the L2 norms of embeddings, the first ``dim`` numbers of rows, rounded to float32.

    Blocks on disk have norms in float32. So a row has the same norm in memory and on disk, and in
    GPU memory up to one rounding.

    slab   float32[capacity, width]  width >= dim
    slots  int64[n]
    norms  float64[n]  written
    """
    n = slots.shape[0]
    for i in range(n):
        if i + AHEAD < n:
            prefetch_row(slab, slots[i + AHEAD], 4 * dim)
        norms[i] = np.float32(np.sqrt(square_sum(slab[slots[i]], dim)))


def norms_of(matrix: Rows, dim: int) -> NDArray[np.float64]:
    """Return the L2 norms of the first ``dim`` numbers of rows, as ``measure`` computes them.

    matrix  float32[n, >= dim]
    """
    norms = np.empty(len(matrix), np.float64)
    if not (matrix.flags.writeable and matrix.flags.c_contiguous):
        matrix = np.array(matrix, order="C")  # so that the kernel is compiled once
    measure(matrix, np.arange(len(matrix)), dim, norms)
    return norms
