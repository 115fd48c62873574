"""A GPU for PyTorch without a GPU: tensors that say they are on one, and CUDA streams.

Operations on these tensors are not computed when they are called. They are given to the current
stream, whose work runs as late or as early as that of a GPU may:

late    a stream runs nothing before somebody waits for it
early   a stream runs everything at once
random  at each call, one of the streams runs some of what it was given

Memory of the GPU is NaN at first, and again once it is freed: PyTorch's allocator gives it to the
next tensor of the stream that it was made on, which may write to it while other streams still read
it, unless ``record_stream`` has named them. Page-locked memory is NaN at first. A copy from it that
need not be waited for reads it when the stream runs it, and all other copies at once.

Backward passes work: below autograd, each operation of PyTorch comes to ``Fake.__torch_dispatch__``
or, if it makes a tensor of the GPU from none, to ``_Dispatch``.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MODES = ("late", "early", "random")
GPU = torch.device("cuda", 0)
WRONG = {True: float("nan"), False: 0x7F}  # what freed memory contains, by whether it is floats
aten = torch.ops.aten
MASKED = (aten.index.Tensor, aten.index_put.default)  # may have a mask as index


class Stream:
    """Stands in for torch.cuda.Stream."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._work = machine, list[Callable[[], Any]]()
        self.given = self.done = 0
        machine.streams.append(self)

    def give(self, work: Callable[[], Any]) -> None:
        with self._machine.lock:
            self._work.append(work)
            self.given += 1
            self._machine.progress()

    def run_to(self, end: int) -> None:
        with self._machine.lock, torch.no_grad():
            while self.done < end:
                self.done += 1
                self._work.pop(0)()

    def synchronize(self) -> None:
        self.run_to(self.given)

    def wait_stream(self, other: Stream) -> None:
        end = other.given
        self.give(lambda: other.run_to(end))


class Event:
    """Stands in for torch.cuda.Event."""

    def record(self, stream: Stream) -> None:
        self._stream, self._end = stream, stream.given

    def query(self) -> bool:
        return self._stream.done >= self._end

    def synchronize(self) -> None:
        self._stream.run_to(self._end)


class Memory:
    """Memory of the GPU: that of one tensor and its views."""

    def __init__(self, host: Tensor, stream: Stream) -> None:
        self.host, self.stream, self.users = host, stream, set[Stream]()
        host.fill_(WRONG[host.is_floating_point()] if host.dtype != torch.bool else True)

    def __del__(self) -> None:
        users, host = [(each, each.given) for each in self.users], self.host

        def reuse() -> None:
            for stream, end in users:
                stream.run_to(end)
            host.fill_(WRONG[host.is_floating_point()] if host.dtype != torch.bool else True)

        self.stream.give(reuse)


class Fake(Tensor):
    """A tensor on the GPU.

    host    its numbers, as far as they are computed
    memory  whose they are
    """

    host: Tensor
    memory: Any
    machine: Machine

    @staticmethod
    def __new__(cls, host: Tensor, memory: Any) -> Fake:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device="meta",
        )
        made.host, made.memory = host, memory
        return made  # type: ignore[no-any-return]

    @property
    def device(self) -> Any:  # type: ignore[override]
        return GPU

    def record_stream(self, stream: Any) -> None:
        self.memory.users.add(stream)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.machine.dispatch(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    """Sends operations that make tensors to the machine."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._machine.dispatch(func, args, kwargs or {})


class Machine:
    """The GPU.

    mode     see above
    streams  the first is the default one
    """

    def __init__(self, mode: str, seed: int = 0) -> None:
        self.mode, self._random = mode, random.Random(seed)
        self.lock = threading.RLock()  # held while work runs: each thread may run that of all
        self.streams: list[Stream] = []
        self._current = threading.local()
        self._pinned: list[tuple[int, int]] = []  # (start, end) of page-locked memory
        Stream(self)
        Fake.machine = self

    def progress(self) -> None:
        """Let streams run what the mode wants."""
        if self.mode == "early":
            for stream in self.streams:
                stream.run_to(stream.given)
        elif self.mode == "random":
            stream = self._random.choice(self.streams)
            stream.run_to(self._random.randint(stream.done, stream.given))

    def current(self, device: Any = None) -> Stream:
        return getattr(self._current, "stream", self.streams[0])

    @contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        """Stands in for torch.cuda.stream."""
        before, self._current.stream = self.current(), stream
        try:
            yield
        finally:
            self._current.stream = before

    # ---- memory

    def new(self, size: Any, dtype: torch.dtype) -> Fake:
        host = torch.empty(size, dtype=dtype)
        return Fake(host, Memory(host, self.current()))

    def room(self, view: Any) -> Fake:
        """Return a tensor whose memory another process writes to."""
        facts = view.__cuda_array_interface__
        count = int(np.prod(facts["shape"]))
        memory = (ctypes.c_float * count).from_address(facts["data"][0])
        host = torch.from_numpy(np.frombuffer(memory, np.float32).reshape(facts["shape"]))
        return Fake(host, view)

    def pinned(self, like: Tensor) -> Tensor:
        """Return page-locked memory, full of NaN."""
        memory = torch.full(like.shape, WRONG[like.is_floating_point()], dtype=like.dtype)
        start = memory.data_ptr()
        self._pinned.append((start, start + memory.nbytes))
        return memory

    def _is_pinned(self, tensor: Tensor) -> bool:
        at = tensor.data_ptr()
        return any(start <= at < end for start, end in self._pinned)

    # ---- operations

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation, or give it to the current stream."""
        kwargs = dict(kwargs)
        device = kwargs.get("device")
        given = _tensors((args, kwargs))
        near = any(isinstance(each, Fake) for each in given)
        here = near if device is None else torch.device(device).type in ("cuda", "meta")
        if not near and not here:
            return func(*args, **kwargs)
        aliases = [each.alias_info for each in func._schema.arguments]
        if func in (aten.copy_.default, aten._to_copy.default):
            return self._copy(func, args, kwargs, here)
        if func in (aten._local_scalar_dense.default, aten.equal.default):
            self.current().synchronize()
            return func(*tree_map(_host, args))
        if any(each is not None and each.is_write for each in aliases):
            self._give(func, args, kwargs)
            written = [
                args[at] if at < len(args) else kwargs[each.name]
                for at, each in enumerate(func._schema.arguments)
                if each.alias_info is not None and each.alias_info.is_write
            ]
            return written[0] if len(func._schema.returns) == 1 else tuple(written)
        if any(each is not None for each in aliases):
            (owner,) = {id(each.memory): each.memory for each in given}.values()  # type: ignore
            views = func(*tree_map(_host, args), **tree_map(_host, kwargs))
            return tree_map(lambda each: Fake(each, owner), views)
        return self._compute(func, args, kwargs)

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Give an operation to the current stream; return its results."""
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        like = _zeros
        if func in MASKED and any(each.dtype == torch.bool for each in _tensors(args)):
            self.current().synchronize()  # the shape of the result depends on the numbers
            like = _host
        shapes = func(*tree_map(like, args), **tree_map(like, kwargs))
        outputs = tree_map(lambda each: self.new(each.shape, each.dtype), shapes)
        args, kwargs = tree_map(_host, args), tree_map(_host, kwargs)
        hosts = [each.host for each in tree_leaves(outputs)]

        def work() -> None:
            for host, result in zip(hosts, tree_leaves(func(*args, **kwargs)), strict=True):
                host.copy_(result)

        self.current().give(work)
        return outputs

    def _give(self, func: Any, args: Any, kwargs: Any) -> None:
        """Give an operation that writes to its arguments to the current stream."""
        args, kwargs = tree_map(_host, args), tree_map(_host, kwargs)
        self.current().give(lambda: func(*args, **kwargs))

    def _copy(self, func: Any, args: Any, kwargs: Any, here: bool) -> Any:
        """Copy within the GPU, to it, or from it."""
        if func is aten.copy_.default:
            to, source, late = (*args, kwargs.get("non_blocking", False))[:3]
        else:
            (source,), late = args, kwargs.get("non_blocking", False)
            dtype = kwargs.get("dtype") or source.dtype
            to = self.new(source.shape, dtype) if here else torch.empty(source.shape, dtype=dtype)
        outside = [each for each in (to, source) if not isinstance(each, Fake)]
        late = not outside or (late and all(map(self._is_pinned, outside)))
        target, origin = _host(to), _host(source)
        if isinstance(to, Fake) and not late:
            origin = origin.clone()
        self.current().give(lambda: target.copy_(origin))
        if not late:
            self.current().synchronize()
        return to


def _tensors(values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


def _host(value: Any) -> Any:
    return value.host if isinstance(value, Fake) else value


def _zeros(value: Any) -> Any:
    return torch.zeros_like(_host(value)) if isinstance(value, Tensor) else value


@contextmanager
def fake_gpu(mode: str, seed: int = 0) -> Iterator[Machine]:
    """Put the machine in the place of a GPU, for this thread."""
    machine = Machine(mode, seed)
    as_tensor, empty = torch.as_tensor, torch.empty

    def as_fake(given: Any, **options: Any) -> Any:
        if hasattr(given, "__cuda_array_interface__") and not isinstance(given, Tensor):
            return machine.room(given)
        return as_tensor(given, **options)

    def new(*size: Any, pin_memory: bool = False, **options: Any) -> Any:  # also in other threads
        made = empty(*size, **options)
        return machine.pinned(made) if pin_memory else made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", new)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "Stream", lambda device: Stream(machine))
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", machine.using)
        patch.setattr(torch.cuda, "current_stream", machine.current)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch, "as_tensor", as_fake)
        patch.setattr(Tensor, "pin_memory", lambda self: machine.pinned(self).copy_(self))
        with _Dispatch(machine):
            yield machine
            for stream in machine.streams:
                stream.synchronize()
