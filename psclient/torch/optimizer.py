"""RowOptimizer, a torch.optim.Optimizer for rows, and the base class of modules that push."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from psclient import checked
from psclient.errors import InvalidArgument
from psclient.rowclient import RowClient
from psclient.torch.gradients import DISCARDED, RANKS, Gradients, Ranks, gather, push
from psclient.torch.ranks import REDUCE, TIMEOUT, Job, Reduce, Turn, several
from psclient.torch.reach import holders

STEPS = 1 << 47  # a training step is in -STEPS..STEPS - 1


class _Group(dict[str, Any]):
    """Param group that says what to do if a scheduler needs a learning rate and there is none."""

    def __missing__(self, name: str) -> Any:
        if name == "lr":
            raise InvalidArgument(
                "lr is not set, so each table uses its own, and a scheduler cannot change it: pass"
                " lr to the optimizer"
            )
        raise KeyError(name)


class RowOptimizer(torch.optim.Optimizer, Joinable):
    """A torch.optim.Optimizer for rows on the servers: ``step`` pushes gradients in one request.

    modules  an Embedding, EmbeddingGroup or other module that contains such modules, or a list of
             them; all their tables belong to one client
    lr       learning rate, sent with each push; None: that of each table. A scheduler needs a
             number, which it then changes
    ranks    with torch.distributed, "mean": the gradients are divided by the number of ranks, as
             DistributedDataParallel does; "sum": they are pushed as they are
    step     training step of the first push; each push adds 1

    With several ranks of torch.distributed, each must create the optimizer, in the same order:

    reduce         "none": each rank pushes the gradients of its batch. "sum": the gradients of a
                   key are first summed over all ranks, and one rank pushes the sum, as one process
                   with the whole batch would
    sync           whether all ranks push a step before any pulls rows for the next one
    process_group  the ranks that take part, a torch.distributed group; None: all
    timeout        seconds that one rank waits for the others before it raises RankFailed

    If the training steps of ranks differ, ``step`` raises StepsDisagree: at once with reduce="sum"
    or sync=True; else one of 1000 pushes is checked. If ranks have different numbers of batches,
    use the optimizer in torch.distributed.algorithms.Join, as a model of DistributedDataParallel.

    The servers run the optimizer that each table was created with. This class only has the
    interface of torch's optimizers, so that GradScaler, gradient clipping and schedulers work: it
    has one param group, whose "params" are ``leaves()``, and are [] before a backward pass.
    """

    def __init__(
        self,
        modules: nn.Module | Iterable[nn.Module],
        lr: float | None = None,
        *,
        ranks: Ranks = "mean",
        step: int = 0,
        reduce: Reduce = "none",
        sync: bool = False,
        process_group: Any = None,
        timeout: float = TIMEOUT,
    ) -> None:
        given = nn.ModuleList([modules] if isinstance(modules, nn.Module) else modules)
        if not (found := holders(given)):
            raise InvalidArgument(f"modules must contain an Embedding or EmbeddingBag, got {given}")
        if any(holder.table.client is not found[0].table.client for holder in found):
            raise InvalidArgument(
                "modules must use tables of one client: make an optimizer for each client"
            )
        checked.one_of("ranks", ranks, RANKS)
        self._client = found[0].table.client
        self._parts: list[Gradients] = [holder.gradients for holder in found]
        self._ranks = ranks
        self._next = checked.integer("step", step, -STEPS, STEPS)
        self._groups: list[dict[str, Any]] = []
        super().__init__([_Group(params=[])], {})
        Joinable.__init__(self)
        if lr is not None:
            self._groups[0]["lr"] = checked.number("lr", lr)
        checked.one_of("reduce", reduce, REDUCE)
        checked.seconds("timeout", timeout)
        self._process_group = process_group
        self._together = reduce == "sum" or bool(sync)  # whether ranks need each other
        self._job: Job | None = None
        if several(process_group):
            tables = {holder.table.name: holder.table for holder in found}
            self._job = Job(
                list(tables.values()),
                reduce,
                sync=sync,
                process_group=process_group,
                timeout=timeout,
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the only param group. Its "params" are those of ``leaves()``, which it calls."""
        for group in self._groups:
            group["params"] = self.leaves()
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups

    def leaves(self) -> list[Tensor]:
        """Return one tensor per table: the rows whose gradients the next ``step`` will push.

        Each is float32[distinct, dim], one row per distinct key of all backward passes since the
        last ``step`` or ``zero_grad``. Its ``grad`` has the same shape, and contains the sums over
        these passes. Change ``grad`` to change what is pushed, for example by clip_grad_norm_. The
        sums belong to the first module of each table: ``zero_grad`` of this module discards them.
        """
        return [rows.leaf for rows in gather(self._parts)]

    def step(self, closure: Callable[[], Any] | None = None, *, step: int | None = None) -> Any:
        """Push the gradients of all modules, summed per table, in one request; forget them.

        closure  computes the loss anew and returns it; called first
        step     training step of this push; None: 1 more than that of the last push

        Returns the loss of ``closure``. If ``closure`` or the push fails, the gradients are
        forgotten too: they are never pushed with those of a later batch.
        """
        loss = None
        if closure is not None:
            try:
                with torch.enable_grad():
                    loss = closure()
            except BaseException as error:
                self.zero_grad()
                error.add_note(DISCARDED)
                raise
        Join.notify_join_context(self)
        self._push(self._next if step is None else step)
        return loss

    def _push(self, step: int, *, active: bool = True) -> None:
        """Push with this training step. active=False: only take part in the push of other ranks."""
        if self._together and self._job is None and several(self._process_group):
            self.zero_grad()
            raise InvalidArgument(
                "with reduce or sync, make the optimizer after torch.distributed was initialized:"
                f" it was made before. {DISCARDED.capitalize()}"
            )
        turn = Turn(step, self._groups[0].get("lr"), active)
        pushed = push(self._client, self._parts, turn, self._ranks, self._job)
        self._next = int(pushed.step) + 1

    def join_hook(self, **options: Any) -> JoinHook:
        """Return what a rank without further batches does while others train: it takes part.

        options  have no effect
        """
        return _Joined(self)

    @property
    def join_device(self) -> torch.device:
        """Return the device on which ranks tell each other that they have further batches."""
        if torch.distributed.get_backend(self.join_process_group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @property
    def join_process_group(self) -> Any:
        """Return the ranks that take part."""
        return self._process_group or torch.distributed.group.WORLD

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all modules, so that they are not pushed.

        set_to_none  has no effect
        """
        for part in self._parts:
            part.discard()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: the only param group has the rows of the modules. Raises InvalidArgument."""
        if self._groups:
            raise InvalidArgument(
                "this optimizer has one param group: make another optimizer for other modules"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return learning rate and next training step. The servers keep the optimizer's state."""
        group = {name: value for name, value in self._groups[0].items() if name != "params"}
        return {"state": {}, "param_groups": [{**group, "params": []}], "step": self._next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set learning rate and next training step to those of a ``state_dict()``.

        Raises InvalidArgument if it is that of another optimizer.
        """
        if "step" not in state_dict:
            raise InvalidArgument(
                "state_dict must be that of a RowOptimizer, which has 'step'; got"
                f" {sorted(state_dict)}"
            )
        (group,) = state_dict["param_groups"]
        self._groups[0].update({name: group[name] for name in group if name != "params"})
        self._next = checked.integer("step", state_dict["step"], -STEPS, STEPS)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a RowOptimizer cannot be pickled or copied: save its state_dict(), and make one of the"
            " loaded or copied module"
        )


class _Joined(JoinHook):
    """Takes part in the pushes of other ranks, for a rank that has no further batches.

    optimizer  the optimizer of this rank
    """

    def __init__(self, optimizer: RowOptimizer) -> None:
        self._optimizer = optimizer

    def main_hook(self) -> None:
        optimizer = self._optimizer
        optimizer.zero_grad()
        optimizer._push(optimizer._next, active=False)


class Trained(nn.Module):
    """Base class of the public modules: pushes the gradients of the rows that it contains.

    client  client of all tables
    """

    client: RowClient

    def step(self, step: int = 0, *, lr: float | None = None, ranks: Ranks = "mean") -> None:
        """Push the gradients that backward passes collected since the last ``step``; forget them.

        step   training step
        lr     learning rate; None: that of each table
        ranks  with torch.distributed, "mean": the gradients are divided by the number of ranks, as
               DistributedDataParallel does; "sum": they are pushed as they are

        Takes one round trip. ``zero_grad`` forgets gradients that should not be pushed. If the push
        fails, they are forgotten too: they are never pushed with those of a later batch.
        """
        push(self.client, [holder.gradients for holder in holders(self)], Turn(step, lr), ranks)

    def optimizer(
        self,
        lr: float | None = None,
        *,
        ranks: Ranks = "mean",
        step: int = 0,
        reduce: Reduce = "none",
        sync: bool = False,
        process_group: Any = None,
        timeout: float = TIMEOUT,
    ) -> RowOptimizer:
        """Return an optimizer for GradScaler, gradient clipping and learning rate schedulers.

        RowOptimizer explains the arguments. Use its ``step`` instead of that of this module.
        """
        return RowOptimizer(
            self, lr, ranks=ranks, step=step,
            reduce=reduce, sync=sync, process_group=process_group, timeout=timeout,
        )  # fmt: skip
