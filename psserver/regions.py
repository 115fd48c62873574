"""Map the memory that clients of the same-host lane register.

The server must not fail because of what a client does to its memory afterwards. An access to a page
that does not exist would end the process (SIGBUS), and so would an access for which the kernel must
find memory when there is none. So the server accepts only memory that cannot shrink and has no
holes, and seals it so that no hole can be made. It reads the header once.

Every reason to refuse memory names the rule and the value.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from contextlib import suppress

from psproto import cudaipc
from psproto import ps_pb2 as pb
from psproto.lanes import HEADER, HEADER_BYTES, MAGIC
from psserver.errors import BadRequest, TooLarge

F_SEAL_FUTURE_WRITE = 0x10  # no new writable mapping, no hole; Linux 5.1
MOST_REGIONS = 64  # per client
MOST_GPU_REGIONS = 8  # per client
BLOCK = 512  # bytes in the unit of ``st_blocks``


class GpuRegion:
    """GPU memory of a client, mapped. It is unmapped when no request uses it.

    size  bytes

    address  address in this process
    """

    def __init__(self, gpu: cudaipc.CudaGpu, handle: bytes, size: int) -> None:
        self._gpu, self.size = gpu, size
        self.address = gpu.map(handle, size)

    def __del__(self) -> None:
        if hasattr(self, "address"):
            with suppress(cudaipc.CudaError):  # the GPU failed, which others notice
                self._gpu.unmap(self.address)


class Regions:
    """The regions of all clients of a server. Must be used on the event loop.

    limit  maximum total size of the regions, in bytes

    bytes  total size of the regions in host memory
    gpu    the GPU whose memory clients may register; None: none
    """

    def __init__(self, limit: int) -> None:
        self.bytes = 0
        self.gpu: cudaipc.CudaGpu | None = None
        self._limit = limit

    def add(self, own: dict[int, mmap.mmap], region: pb.LaneRegion, fd: int, token: bytes) -> None:
        """Map a region, and add it to those of its client.

        own    the regions of the client, by number
        fd     descriptor of the memory; it stays open
        token  token of the client, which the header of the region must have

        Raises BadRequest (LANE_REFUSED) if the memory breaks a rule, TooLarge (LANE_LIMIT) if the
        client has too many regions or there is too much memory.
        """
        if len(own) >= MOST_REGIONS:
            raise TooLarge(
                "LANE_LIMIT", f"this client already has {MOST_REGIONS} regions, the limit"
            )
        if region.region in own:
            raise _refused(f"region {region.region} is registered already")
        if self.bytes + region.size > self._limit:
            raise TooLarge(
                "LANE_LIMIT",
                f"{self.bytes} bytes of shared memory are registered + {region.size} requested >"
                f" lane_bytes={self._limit}",
            )
        own[region.region] = _mapped(region, fd, token)
        self.bytes += region.size

    def add_gpu(self, own: dict[int, GpuRegion], region: pb.LaneRegion) -> None:
        """Map a region in GPU memory, and add it to those of its client.

        own  the client's regions in GPU memory, by number

        Raises BadRequest (LANE_REFUSED) or TooLarge (LANE_LIMIT).
        """
        if self.gpu is None:
            raise _gpu_refused("the server has no GPU memory: it was started without hbm_bytes")
        if region.gpu != self.gpu.uuid:
            raise _gpu_refused(
                f"the memory must be on the GPU of the server, {self.gpu.uuid.hex()},"
                f" got {region.gpu.hex()}"
            )
        if len(region.handle) != cudaipc.HANDLE_BYTES or not region.size:
            raise _gpu_refused(
                f"field 'handle' must have {cudaipc.HANDLE_BYTES} bytes, got {len(region.handle)},"
                f" and field 'size' must be positive, got {region.size}"
            )
        if region.region in own:
            raise _gpu_refused(f"region {region.region} is registered already")
        if len(own) >= MOST_GPU_REGIONS:
            raise TooLarge(
                "LANE_LIMIT",
                f"this client already has {MOST_GPU_REGIONS} regions of GPU memory, the limit",
            )
        try:
            own[region.region] = GpuRegion(self.gpu, region.handle, region.size)
        except cudaipc.CudaError as error:
            raise _gpu_refused(f"it cannot be mapped: {error}") from error

    def remove(self, own: dict[int, mmap.mmap]) -> None:
        """Remove all regions of a client that is gone.

        Each is unmapped as soon as no request uses it.
        """
        self.bytes -= sum(map(len, own.values()))
        own.clear()


def _mapped(region: pb.LaneRegion, fd: int, token: bytes) -> mmap.mmap:
    """Check a region and map it. Raises BadRequest (LANE_REFUSED)."""
    if region.kind != pb.LANE_KIND_MEMFD:
        raise _refused(f"field 'kind' must be LANE_KIND_MEMFD, got {region.kind}")
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size != region.size:
        raise _refused(f"expected a file of {region.size} bytes, got {found.st_size} bytes")
    if region.size <= HEADER_BYTES:
        raise _refused(f"a region must have more than {HEADER_BYTES} bytes, got {region.size}")
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise _refused("expected a file of memfd_create, got a file that has no seals") from None
    if not seals & fcntl.F_SEAL_SHRINK:
        raise _refused(f"the file must have the seal F_SEAL_SHRINK, got the seals {seals:#x}")
    try:
        memory = mmap.mmap(fd, region.size)
    except (OSError, ValueError) as error:
        raise _refused(f"the file cannot be mapped: {error}; its seals are {seals:#x}") from None
    _seal(fd)
    os.ftruncate(fd, region.size)  # frees blocks after the end, which must not count
    if (allocated := os.fstat(fd).st_blocks * BLOCK) < region.size:
        raise _refused(
            f"the file must have no holes: only {allocated} of {region.size} bytes are allocated"
        )
    _check_header(memory[: HEADER.size], region.size, token)
    return memory


def _seal(fd: int) -> None:
    """Seal a file so that no hole can be made in it, and its size stays. Raises BadRequest."""
    kept = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    for seals in (kept | F_SEAL_FUTURE_WRITE, kept):  # the latter before Linux 5.1
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            return
        except PermissionError:
            raise _refused(
                "the server cannot seal the file: it must not have the seal F_SEAL_SEAL"
            ) from None
        except OSError:
            pass
    raise _refused("the server cannot seal the file")


def _check_header(header: bytes, size: int, token: bytes) -> None:
    """Check the header of a region of ``size`` bytes. Raises BadRequest."""
    magic, claimed, tokened = HEADER.unpack(header)
    if magic != MAGIC:
        raise _refused(f"the header of the region must begin with {MAGIC!r}, got {magic!r}")
    if claimed != size:
        raise _refused(f"the header of the region must have its size, {size}, got {claimed}")
    if tokened != token:
        raise _refused("the header of the region must have the token of this server")


def _gpu_refused(why: str) -> BadRequest:
    return BadRequest("LANE_REFUSED", f"GPU memory: {why}")


def _refused(why: str) -> BadRequest:
    return BadRequest("LANE_REFUSED", f"shared memory: {why}")
