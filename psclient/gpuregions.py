"""Regions of GPU memory of a same-host lane: the server writes the rows of pulls there.

Each is an allocation of its own on the GPU of the shard, which the server maps. A pull takes a
chunk for its rows, from the request until the rows are copied to the array of the caller.
"""

from __future__ import annotations

import os
from contextlib import suppress

from psclient.regions import Space
from psproto import cudaipc, lanes
from psproto import ps_pb2 as pb

SMALLEST = 4 << 20  # bytes of the first region; each further one has at least twice as many
MOST = 8  # regions; the server allows no more


class GpuRegion(Space):
    """GPU memory that the server is asked to map.

    number  its number on the lane
    size    bytes
    gpu     the GPU

    Raises CudaError.
    """

    def __init__(self, number: int, size: int, gpu: cudaipc.CudaGpu) -> None:
        super().__init__(0, size)
        self.number, self.size, self._gpu, self._process = number, size, gpu, os.getpid()
        self.address = gpu.allocate(size)
        self.handle = gpu.handle_of(self.address)

    def __del__(self) -> None:
        if hasattr(self, "address") and self._process == os.getpid():  # a child has no CUDA
            with suppress(cudaipc.CudaError):
                self._gpu.free(self.address)

    def registration(self) -> pb.LaneRequest:
        """Return the message that registers the region."""
        region = pb.LaneRegion(
            region=self.number,
            kind=pb.LANE_KIND_CUDA,
            size=self.size,
            handle=self.handle,
            gpu=self._gpu.uuid,
        )
        return pb.LaneRequest(id=lanes.REGISTRATION | self.number, regions=[region])


class GpuRegions:
    """The regions of GPU memory of one lane. The caller of ``room`` holds the lock of the lane.

    uuid  UUID of the shard's GPU; empty: it has none

    why    why no region is in use; "": there is one
    fresh  a region that the server must be asked to map; None: there is none
    """

    def __init__(self, uuid: bytes) -> None:
        self.fresh: GpuRegion | None = None
        self.why = "no pull wanted one yet" if uuid else "the server has no GPU memory: hbm_bytes=0"
        self._uuid, self._open = uuid, bool(uuid)  # False: no more regions
        self._ready: list[GpuRegion] = []
        self._asked: GpuRegion | None = None  # the server has not answered yet
        self._count = 0

    def room(self, device: int, size: int) -> lanes.GpuRoom | None:
        """Return GPU memory for the rows of a pull; None if there is none, perhaps for now.

        device  number of the GPU that needs the rows
        size    bytes
        """
        if not self._uuid:
            return None
        try:
            gpu = cudaipc.gpu(device)
            if gpu.uuid != self._uuid:
                self.why = f"GPU {device} is not the GPU of the server, {self._uuid.hex()}"
                return None
            for region in reversed(self._ready):
                if (chunk := region.take(size)) is not None:
                    at = chunk.start
                    return lanes.GpuRoom(region.number, at, size, region.address + at, chunk)
            if self._open and self._asked is None and self._count < MOST:
                least = SMALLEST << self._count
                while least < size:
                    least *= 2
                self.fresh = self._asked = GpuRegion(self._count, least, gpu)
                self._count += 1
        except cudaipc.CudaError as error:
            self.why, self._open = str(error), False
        return None

    def answered(self, refused: str) -> None:
        """Note the server's answer about the region in question; any thread may call this.

        refused  why it was refused; "": it was not
        """
        region, self._asked = self._asked, None
        if refused:
            self.why, self._open = refused, False
        elif region is not None:
            self._ready.append(region)
            self.why = ""

    def forget(self) -> None:
        """Forget all regions, in a forked child."""
        self._ready.clear()
        self.fresh = self._asked = None
        self._open = False
