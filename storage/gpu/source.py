"""The CUDA C of all kernels: rows.cu, and one kernel per step of an optimizer.

The steps are generated: their formulas are translated from the Python functions that the loops of
the CPU run. So a new optimizer needs nothing here.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from storage.formula import c_name, c_parameters, result_types, to_cuda, with_callees
from storage.optimizer import Optimizer, StepKernel

ROW_KERNELS = ("gather", "scatter", "measure", "largest", "add_pieces")  # in rows.cu
LANES = 8  # threads that work on a row; the same number is in rows.cu
BLOCK = 256  # threads of a block

_STEP = """
template <int W>
__device__ inline void {name}_row(
    float* row, const float* grad, int dim, int lane, unsigned group{numbers}) {{
    (void)group;
{row}
    for (int j = W * lane; j < dim; j += W * LANES) {{
        const Pack<W> gs = load<W>(grad + j);
        Pack<W> ws = load<W>(row + j);
{load}
        for (int c = 0; c < W; c++) {{
            {number}({arguments});
        }}
        store<W>(row + j, ws);
{store}
    }}
{after}
}}

extern "C" __global__ void step_{name}(SLAB, const float* grads{numbers}) {{
    THREAD(n)
    float* row = row_at(pieces, shift, stride, slots[i]);
    const float* grad = grads + i * count;
    if (count & 3) {name}_row<1>(row, grad, count, lane, group{values});
    else {name}_row<4>(row, grad, count, lane, group{values});
}}
"""


def cuda_source(steps: Iterable[StepKernel]) -> str:
    """Return the source of all kernels, with the steps of some optimizers."""
    steps = list(steps)
    formulas: dict[str, Any] = {}
    for each in (one for step in steps for one in (*step.formulas, step.number)):
        for needed in with_callees(each):
            same = formulas.setdefault(c_name(needed), needed)
            assert same is needed, f"two formulas are named {c_name(needed)}"
    parts = [Path(__file__).with_name("rows.cu").read_text()]
    parts += [to_cuda(each) for each in formulas.values()]
    return "\n".join([*parts, *(_step(each) for each in steps)])


def kernel_name(step: StepKernel) -> str:
    """Return the name of the CUDA kernel that runs a step."""
    return f"step_{step.name}"


def kernel_numbers(optimizer: Optimizer, lr: float, step: int, dim: int) -> list[Any]:
    """Return the numbers of a step, of the types that its CUDA kernel declares."""
    numbers = optimizer.numbers(lr, step, dim)
    with np.errstate(over="ignore"):  # too large for a float32: infinity, as on the CPU
        return [kind(each) for kind, each in zip(_kinds(optimizer.kernel), numbers, strict=True)]


@cache
def _kinds(step: StepKernel) -> list[Any]:
    types = {"float": np.float32, "double": np.float64}
    return [types[kind] for kind, _ in c_parameters(step.loop, skip=3)]


def _step(step: StepKernel) -> str:
    """Return the CUDA C of one step: a function for the threads of a row, and the kernel."""
    numbers = c_parameters(step.loop, skip=3)
    returned = len(result_types(step.number))  # w, and one number of each vector of state
    state = range(1, returned)
    names = list(inspect.signature(step.number.py_func).parameters)[1 + returned :]
    changed = ["ws.at[c]", *(f"s{k}.at[c]" for k in state)]
    results = changed if returned > 1 else []
    arguments = ", ".join(["gs.at[c]", *changed, *names, *results])
    number = c_name(step.number)
    load = "\n".join(f"        Pack<W> s{k} = load<W>(row + {k} * dim + j);" for k in state)
    store = "\n".join(f"        store<W>(row + {k} * dim + j, s{k});" for k in state)
    after = f"    __syncwarp(group);\n{_indented(step.after)}" if step.after else ""
    return _STEP.format(
        name=step.name,
        numbers="".join(f", {kind} {name}" for kind, name in numbers),
        values="".join(f", {name}" for _, name in numbers),
        row=_indented(step.row),
        load=load,
        number=number if returned > 1 else f"ws.at[c] = {number}",
        arguments=arguments,
        store=store,
        after=after,
    )


def _indented(text: str) -> str:
    return textwrap.indent(textwrap.dedent(text).strip("\n "), "    ")
