"""Open the GPU of a server, and end the process if the GPU fails."""

from __future__ import annotations

import os
from collections.abc import Callable

import structlog

from psserver.memory import show
from psserver.unusable import ConfigError
from storage.gpu.cuda import CudaDevice
from storage.gpu.device import Device, DeviceLost, NoDevice, OutOfDeviceMemory
from storage.gpu.gpu import Gpu
from storage.gpu.nvrtc import CannotCompile

LOST = 75  # exit status; EX_TEMPFAIL of sysexits.h, because a restart can help
open_device: Callable[[Callable[[DeviceLost], None]], Device] = CudaDevice

log = structlog.get_logger()


def open_gpu(limit: int) -> Gpu:
    """Start CUDA in this process, which must not fork from then on, and return the GPU.

    limit  the setting hbm_bytes

    Raises ConfigError, with the error of CUDA and what to do, if the GPU cannot be used, or has
    less memory free than ``limit``. The first start on a machine compiles the kernels for its GPU,
    which takes some seconds. If the GPU fails later, the process ends with status LOST.
    """
    try:
        gpu = Gpu(open_device(_end), limit, _paused)
    except (NoDevice, DeviceLost, CannotCompile, OutOfDeviceMemory) as error:
        raise ConfigError(f"hbm_bytes={limit} needs a GPU: {error}; or set hbm_bytes=0") from error
    free = gpu.device.free
    if limit > free:
        raise ConfigError(
            f"hbm_bytes must be at most the free memory of the GPU, {free} bytes ({show(free)}),"
            f" got {limit}; lower it, or stop the other processes that nvidia-smi shows"
        )
    log.info("gpu", hbm_bytes=show(limit), free=show(free))
    return gpu


def _end(error: DeviceLost) -> None:
    """Log that the GPU failed, and end the process at once with status LOST.

    After an error of CUDA, a process cannot use the GPU any more. The next start serves all rows,
    from the data directory.
    """
    log.critical("the GPU failed", error=str(error), advice="start the server again")
    os._exit(LOST)


def _paused(why: str) -> None:
    log.warning(
        "GPU memory is full: no more rows are moved to it for now",
        error=why,
        advice="lower hbm_bytes, or stop other processes that use this GPU; nvidia-smi shows them",
    )
