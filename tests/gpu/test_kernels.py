"""The CUDA kernels, compiled with g++, against the loops of the CPU."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from cases import CASES, DIMS, agree, batches, exact, first_rows
from cpukernels import CpuKernels, compiler, cpu_kernels
from slabs import Slab, aligned

from storage.formula import c_parameters
from storage.gpu.source import BLOCK, LANES, ROW_KERNELS, cuda_source, kernel_name, kernel_numbers
from storage.kernels import largest_magnitude
from storage.optimizer import Optimizer
from storage.optimizers import make_optimizer, step_kernels

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++ to compile the CUDA kernels")


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    kernels = cpu_kernels(step_kernels())
    kernels.reverse = request.param
    return kernels


def launch(kernels: CpuKernels, name: str, rows: int, arguments: list[Any]) -> None:
    kernels.launch(name, -(-rows * LANES // BLOCK), BLOCK, arguments)


def run(kernels: CpuKernels, optimizer: Optimizer, dim: int) -> tuple[Any, Any, Any]:
    """Return what all batches leave: rows of kernels, rows of CPU loops, numbers after rows."""
    host = first_rows(optimizer, dim)
    slab = Slab(host)
    for slots, gradients, step in batches(dim):
        optimizer.step(host, slots, gradients, optimizer.lr, step)
        there = aligned(*gradients.shape)
        there[:] = gradients
        numbers = kernel_numbers(optimizer, optimizer.lr, step, dim)
        arguments = [*slab.head(slots, dim), np.uint64(there.ctypes.data), *numbers]
        launch(kernels, kernel_name(optimizer.kernel), len(slots), arguments)
    return np.ascontiguousarray(slab.rows), host, slab.rest


@pytest.mark.quick(36)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_a_step_has_the_bits_of_the_cpu(
    kernels: CpuKernels, name: str, parameters: dict[str, float], dim: int
) -> None:
    optimizer = make_optimizer(name, None, parameters)
    got, wanted, rest = run(kernels, optimizer, dim)
    assert agree(optimizer, got, wanted)
    assert np.isnan(rest).all()


def test_all_optimizers_but_two_are_compared_to_the_bit() -> None:
    inexact = {name for name, p in CASES if not exact(make_optimizer(name, None, p))}
    assert inexact == {"rowwise_adagrad", "group_ftrl"}


def test_the_numbers_of_a_step_are_floats_and_as_many_as_its_kernel_declares() -> None:
    for name, parameters in CASES:
        optimizer = make_optimizer(name, None, parameters)
        numbers = optimizer.numbers(1, 7, 8)
        assert {type(each) for each in numbers} == {float}, name
        assert len(numbers) == len(c_parameters(optimizer.kernel.loop, skip=3))


def test_a_number_that_is_too_large_is_infinite() -> None:
    assert kernel_numbers(make_optimizer("sgd", None, {}), 1e300, 1, 8) == [np.float32(np.inf)]


@pytest.mark.parametrize("n", [1, 2, 32, 33])
@pytest.mark.parametrize("count", [1, 3, 4, 33, 64])
def test_gather_and_scatter_copy_rows_and_skip_absent_ones(
    kernels: CpuKernels, count: int, n: int
) -> None:
    rng = np.random.default_rng(count)
    rows = rng.standard_normal((50, 67)).astype(np.float32)
    slab = Slab(rows)
    slots = rng.permutation(50)[:n].astype(np.int64)
    slots[1::5] = -1
    there = np.flatnonzero(slots >= 0)
    out, wanted = aligned(n, count), aligned(n, count)
    wanted[there] = rows[slots[there], :count]
    launch(kernels, "gather", n, [*slab.head(slots, count), np.uint64(out.ctypes.data)])
    assert out.tobytes() == wanted.tobytes()
    new = aligned(n, count)
    new[:] = rng.standard_normal((n, count))
    rows[slots[there], :count] = new[there]
    launch(kernels, "scatter", n, [*slab.head(slots, count), np.uint64(new.ctypes.data)])
    assert slab.rows.tobytes() == rows.tobytes()
    assert np.isnan(slab.rest).all()


@pytest.mark.parametrize("count", [1, 3, 33, 64])
def test_measure_and_largest_look_at_the_first_numbers_of_rows(
    kernels: CpuKernels, count: int
) -> None:
    rows = np.random.default_rng(count).standard_normal((40, 65)).astype(np.float32)
    rows[:, count:] = 1e9
    slab, slots = Slab(rows), np.arange(39, -1, -3, dtype=np.int64)
    norms, most = np.zeros(len(slots)), np.zeros(len(slots), np.uint32)
    launch(kernels, "measure", len(slots), [*slab.head(slots, count), address(norms)])
    launch(kernels, "largest", len(slots), [*slab.head(slots, count), address(most)])
    exact = np.linalg.norm(rows[slots, :count].astype(np.float64), axis=1)
    np.testing.assert_allclose(norms, exact, rtol=2e-7)
    assert (norms == norms.astype(np.float32)).all()
    assert most.view(np.float32).tolist() == abs(rows[slots, :count]).max(axis=1).tolist()
    rows[slots[0], count - 1] = -np.inf
    launch(kernels, "largest", len(slots), [*Slab(rows).head(slots, count), address(most)])
    assert largest_magnitude(most.view(np.float32)) == np.inf


def address(array: Any) -> np.uint64:
    return np.uint64(array.ctypes.data)


SOURCE = cuda_source(step_kernels())


def test_the_numbers_of_the_source_are_those_of_python() -> None:
    assert re.findall(r"#define LANES (\d+)", SOURCE) == [str(LANES)]
    kernels = re.findall(r"__global__ void (\w+)\(", SOURCE)
    assert kernels == [*ROW_KERNELS, *(kernel_name(each) for each in step_kernels())]


# Mistakes in the source, or in how it is compiled: what, optimizer, text, text instead, flags
FLUSHED = "b = ((keep * b) + g); b = fabsf(b) < 1.2e-38f ? 0.0f : b;"
MISTAKES: list[tuple[str, str, str, str, tuple[str, ...]]] = [
    ("fused operations", "adam", "", "", ("-ffp-contract=fast", "-mfma")),
    ("denormal numbers are 0", "momentum", "b = ((keep * b) + g);", FLUSHED, ()),
    ("all lanes count", "adam", "from_first(group, row[3 * dim])", "row[3 * dim]", ()),
    ("another order", "adagrad", "(n + (g * g))", "((n * 3.0f + g * g) - n * 2.0f)", ()),
    ("the end of a row", "sgd", "j < dim; j += W", "j + W < dim; j += W", ()),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[each[0] for each in MISTAKES])
def test_a_mistake_is_seen(mistake: tuple[str, str, str, str, tuple[str, ...]]) -> None:
    _, name, text, instead, flags = mistake
    assert text in SOURCE
    kernels = CpuKernels(SOURCE.replace(text, instead), flags)
    optimizer = make_optimizer(name, None, {})
    results = [run(kernels, optimizer, dim) for dim in (33, 64)]
    assert not all(
        agree(optimizer, got, wanted) and np.isnan(rest).all() for got, wanted, rest in results
    )
