"""The CUDA device and the cache of its kernels, over stand-ins for CuPy and NVRTC."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from storage.gpu import cuda, nvrtc
from storage.gpu.cuda import CudaDevice
from storage.gpu.device import DeviceLost, OutOfDeviceMemory


class CUDARuntimeError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class FakeCupy:
    """The part of CuPy that a device uses; whatever takes memory fails with ``status``."""

    def __init__(self) -> None:
        self.status = 0
        self.fetched: list[str] = []
        take = self.take
        self.cuda = SimpleNamespace(
            runtime=SimpleNamespace(
                CUDARuntimeError=CUDARuntimeError,
                getDeviceCount=lambda: 1,
                runtimeGetVersion=lambda: 13000,
                memGetInfo=lambda: (123, 456),
                hostAllocPortable=1,
                hostAllocMapped=2,
            ),
            Device=lambda number: SimpleNamespace(compute_capability="90"),
            function=SimpleNamespace(Module=lambda: self),
            Memory=take,
            PinnedMemory=take,
            PinnedMemoryPointer=lambda block, at: bytearray(64),
            Stream=take,
        )

    def take(self, *sizes: int, **options: Any) -> Any:
        if self.status:
            raise CUDARuntimeError(self.status)
        return SimpleNamespace(ptr=4096)

    def load(self, code: bytes) -> None:
        pass

    def get_function(self, name: str) -> Any:
        self.take()
        self.fetched.append(name)
        return lambda *arguments, stream: None


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(cuda, "machine_code", lambda source, capability, major: b"")
    return fake


TAKES = {
    "memory": lambda device: device.memory(64),
    "pinned": lambda device: device.pinned(64),
    "queue": lambda device: device.queue(),
}


@pytest.mark.parametrize("what", TAKES)
def test_a_device_without_memory_goes_on_and_other_errors_are_final(
    cupy: FakeCupy, what: str
) -> None:
    device, take = CudaDevice(), TAKES[what]
    cupy.status = 2  # cudaErrorMemoryAllocation
    with pytest.raises(OutOfDeviceMemory, match=r"is full: .* the GPU has 123 bytes free"):
        take(device)
    cupy.status = 0
    assert take(device) is not None
    cupy.status = 700  # cudaErrorIllegalAddress
    with pytest.raises(DeviceLost, match="status 700"):
        take(device)


def test_a_gpu_that_fails_is_reported_before_anybody_can_swallow_the_error(cupy: FakeCupy) -> None:
    told: list[DeviceLost] = []
    cupy.status = 46  # cudaErrorDevicesUnavailable
    with pytest.raises(DeviceLost):
        CudaDevice(told.append)
    assert told == []  # at the start it is a refusal
    cupy.status = 0
    device = CudaDevice(told.append)
    cupy.status = 2
    with pytest.raises(OutOfDeviceMemory):
        device.memory(64)
    assert told == []
    cupy.status = 700
    with pytest.raises(DeviceLost) as raised:
        device.memory(64)
    assert told == [raised.value]


def test_a_kernel_that_runs_for_the_first_time_takes_no_memory(cupy: FakeCupy) -> None:
    queue, fetched = CudaDevice().queue(), list(cupy.fetched)
    cupy.status = 2
    for name in fetched:
        queue.run(name, 1, np.int64(0))
    assert cupy.fetched == fetched
    assert {"gather", "add_pieces", "step_adam"} <= set(fetched)


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were compiled."""
    sources: list[str] = []
    monkeypatch.setattr(nvrtc, "_version", lambda major: (13, 0))

    def compile_source(source: str, capability: int, major: int | None) -> tuple[bytes, str]:
        sources.append(source)
        return b"code of " + source.encode(), ""

    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    return sources


def test_kernels_are_compiled_once_where_the_cache_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiles: list[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    assert {nvrtc.machine_code("a", 90) for _ in range(3)} == {b"code of a"}
    assert compiles == ["a"]


def test_kernels_are_compiled_each_time_where_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiles: list[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert {nvrtc.machine_code("a", 90) for _ in range(2)} == {b"code of a"}
    assert compiles == ["a", "a"]


def test_a_full_disk_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiles: list[str]
) -> None:
    def full(file: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "fsync", full)
    assert nvrtc.machine_code("a", 90) == b"code of a"
    assert list((tmp_path / "embedding-ps").iterdir()) == []


@pytest.mark.parametrize(("major", "chosen"), [(12, "12"), (13, "13"), (14, "13"), (None, "13")])
@pytest.mark.parametrize("first", ["cuda_nvrtc", "cu13"])
def test_nvrtc_is_of_the_version_of_the_runtime_or_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, major: int | None, chosen: str
) -> None:
    places = [("cuda_nvrtc", "12"), ("cu13", "13")]
    for name, version in sorted(places, key=lambda each: each[0] != first):
        folder = tmp_path / name / "nvidia" / name / "lib"
        folder.mkdir(parents=True)
        for file in (f"libnvrtc.so.{version}", f"libnvrtc.alt.so.{version}"):
            (folder / file).touch()
        monkeypatch.syspath_prepend(tmp_path / name)
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    found = nvrtc.find_library(major)
    assert found is not None
    assert Path(found).name == f"libnvrtc.so.{chosen}"
