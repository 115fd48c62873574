"""The kernels compile to machine code for GPUs, on any machine that has NVRTC's wheel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from storage.gpu import nvrtc
from storage.gpu.nvrtc import CannotCompile, compile_source, find_library, machine_code
from storage.gpu.source import ROW_KERNELS, cuda_source, kernel_name
from storage.optimizers import step_kernels

pytestmark = pytest.mark.skipif(find_library() is None, reason="NVRTC is not installed")
SOURCE = cuda_source(step_kernels())
NAMES = [*ROW_KERNELS, *(kernel_name(each) for each in step_kernels())]


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_without_spilling_registers(capability: int) -> None:
    code, log = compile_source(SOURCE, capability, "--ptxas-options=-v")
    assert code[:4] == b"\x7fELF"
    entries = re.findall(rf"Compiling entry function '(\w+)' for 'sm_{capability}'", log)
    assert sorted(entries) == sorted(NAMES)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) >= len(NAMES)
    assert set(spills) == {("0", "0")}


def test_no_operation_is_fused_or_loses_denormal_numbers() -> None:
    code, _ = compile_source(SOURCE, 10_000)  # of no GPU yet: PTX, which can be read
    kernels = code.decode().split(".visible .entry ")[1:]
    assert [kernel.split("(")[0] for kernel in kernels] == NAMES
    for kernel in kernels:
        name = kernel.split("(")[0]
        assert not re.findall(r".*(?:\.ftz|sqrt\.approx|div\.(?:approx|full)\.f32).*", kernel), name
        assert not re.findall(r".*fma\.rn\.f(?:32|64).*", kernel), name
        # without .rn, the driver may still fuse them
        assert not re.findall(r".*\b(?:mul|add|sub)\.f(?:32|64).*", kernel), name


def test_compiled_kernels_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = 'extern "C" __global__ void one(int* out) { *out = 1; }'
    code = machine_code(source, 80)
    monkeypatch.setattr(nvrtc, "compile_source", None)  # would fail if it were called
    assert machine_code(source, 80) == code
    assert len(list((tmp_path / "embedding-ps").iterdir())) == 1


def test_an_error_in_the_source_is_reported_with_its_line() -> None:
    with pytest.raises(CannotCompile, match=r"rows\.cu\(2\): error"):
        compile_source("int a;\nint b = c;", 80)
