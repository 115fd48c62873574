"""A server that is to use a GPU: whether it starts, and what it says if not."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from servers import free_ports
from structlog.testing import capture_logs

from psserver import gpu as module
from psserver.config import ConfigError, load
from psserver.doctor import examine
from psserver.gpu import LOST, open_gpu
from storage.gpu.cuda import CudaDevice
from storage.gpu.device import DeviceLost, OutOfDeviceMemory
from storage.gpu.nvrtc import CannotCompile

WITH_CUPY = importlib.util.find_spec("cupy") is not None


class CUDARuntimeError(Exception):
    pass


def cupy_that_says(error: str | None) -> Any:
    """A stand-in for CuPy that finds no GPU, or fails with an error."""

    def count() -> int:
        if error is not None:
            raise CUDARuntimeError(error)
        return 0

    runtime = SimpleNamespace(CUDARuntimeError=CUDARuntimeError, getDeviceCount=count)
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))


NO_GPU = [
    (None, "CUDA finds no GPU: check nvidia-smi"),
    (
        "cudaErrorNoDevice: no CUDA-capable device is detected",
        "cudaErrorNoDevice: .*a container must be given a GPU, for example nvidia.com/gpu: 1",
    ),
    (
        "cudaErrorInsufficientDriver: CUDA driver version is insufficient",
        r"cudaErrorInsufficientDriver: .*install NVIDIA's driver, .*embedding-ps\[gpu13\]",
    ),
    ("cudaErrorInitializationError: bad", "cudaErrorInitializationError: bad: check nvidia-smi"),
]


@pytest.mark.parametrize(("error", "said"), NO_GPU)
def test_the_refusal_has_the_error_of_cuda_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: str | None, said: str
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy_that_says(error))
    with pytest.raises(ConfigError, match=f"^hbm_bytes=7 needs a GPU: {said}.*set hbm_bytes=0$"):
        open_gpu(7)
    (found,) = (
        each
        for each in examine(load(["--hbm-bytes", "33554432"]), running=True)
        if each.check == "GPU"
    )
    assert found.state == "error"
    assert not error or error in found.found


@pytest.mark.parametrize(
    "error",
    [
        DeviceLost("cudaErrorDevicesUnavailable: all CUDA-capable devices are busy"),
        OutOfDeviceMemory(5, 0),
        CannotCompile("NVRTC is not installed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_gpu_that_cannot_be_used_is_refused(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(lost: object) -> Any:
        raise error

    monkeypatch.setattr(module, "open_device", fail)
    with pytest.raises(ConfigError) as raised:
        open_gpu(7)
    assert str(error) in str(raised.value)


class Device:
    """A device with 1000 bytes."""

    free = 1000

    def pinned(self, size: int) -> Any:
        return memoryview(bytearray(size))

    def queue(self) -> Any:
        return SimpleNamespace(mark=lambda: SimpleNamespace(wait=lambda: None))


def test_more_memory_than_the_gpu_has_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_device", lambda lost: Device())
    assert open_gpu(1000).budget.limit == 1000
    said = r"^hbm_bytes must be at most .* 1000 bytes \(1000 bytes\), got 1001; lower it, or "
    with pytest.raises(ConfigError, match=said):
        open_gpu(1001)


def test_by_default_there_is_no_gpu_and_only_cupy_opens_one() -> None:
    assert load([]).hbm_bytes == 0
    assert module.open_device is CudaDevice


def test_a_gpu_that_fails_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(module, "open_device", lambda lost: given.append(lost) or Device())
    open_gpu(1)

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", end)
    with capture_logs() as logged, pytest.raises(SystemExit) as raised:
        given[0](DeviceLost("cudaErrorLaunchFailure: unspecified launch failure"))
    assert raised.value.code == LOST == 75
    assert logged[0]["log_level"] == "critical"
    assert "cudaErrorLaunchFailure" in logged[0]["error"]


@pytest.mark.slow
@pytest.mark.skipif(WITH_CUPY, reason="CuPy is installed")
def test_a_server_without_cupy_exits_with_status_2_and_says_what_to_install() -> None:
    command = [sys.executable, "-m", "psserver", "serve", "--hbm-bytes", "99000000"]
    command += ["--port", str(free_ports(1)), "--metrics-port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("psserver: hbm_bytes=99000000 needs a GPU: cannot import CuPy (")
    assert "pip install 'embedding-ps[gpu13]'" in last
