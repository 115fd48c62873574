"""Holder: base class of modules with rows, and how methods of torch's modules reach it.

The rows are on the servers, so the modules have no parameters. But ``zero_grad`` and
``requires_grad_`` of nn.Module are loops over the parameters of a model. The first Holder that is
made or loaded replaces both methods of nn.Module, so that they also visit each Holder in the model:
``zero_grad`` discards its gradients, ``requires_grad_`` freezes it or makes it trainable. Models
without a Holder behave as before. docs/trainers.md lists what does not reach a Holder.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from psclient.batch import Batch
from psclient.table import Table
from psclient.torch.gradients import Gradients

MARK = "reaches_rows"  # attribute of the replaced ``zero_grad``


class Holder(nn.Module):
    """Base class of modules that use the rows of one table.

    gradients  gradients that were not pushed yet
    like       empty tensor with the dtype and device of the outputs; changed by methods of
               nn.Module such as ``half`` and ``to``
    """

    holds_ps_rows = True  # tells Holders from other modules, also if this file is loaded twice

    def __init__(self, table: Table) -> None:
        super().__init__()
        _extend()
        self.table = table
        self.gradients = Gradients()
        self.like = torch.empty(0)

    @property
    def trainable(self) -> bool:
        """Whether backward passes collect gradients; ``requires_grad_`` sets it."""
        return self.gradients.trainable

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _extend()

    def __copy__(self) -> Self:
        """Return a module of the same rows that has no gradients yet, and collects its own."""
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied.gradients = Gradients(self.trainable)
        return copied

    def collect(self, batch: Batch, embeddings: NDArray[np.float32] | Tensor) -> Tensor:
        """Return pulled rows as a tensor; collect its gradients if this module is trainable.

        batch       keys of the forward pass
        embeddings  float32[distinct, dim], the rows of ``batch.keys``
        """
        leaf = embeddings if isinstance(embeddings, Tensor) else torch.from_numpy(embeddings)
        if self.trainable and torch.is_grad_enabled():
            self.gradients.watch(self.table, batch, leaf.requires_grad_())
        return leaf

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Change dtype or device: ``half``, ``bfloat16``, ``to`` and ``cuda`` call this method."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.like = fn(self.like)
        return self

    def seen(self, leaf: Tensor) -> Tensor:
        """Return the pulled rows ``leaf`` with the dtype and on the device of this module.

        Gradients flow back to ``leaf`` if this module is trainable.
        """
        return (leaf if self.trainable else leaf.detach()).to(self.like)


def holders(module: nn.Module) -> list[Holder]:
    """Return each Holder in a module, once."""
    found: list[Any] = [
        each for each in module.modules() if getattr(type(each), "holds_ps_rows", False)
    ]
    return found


def _extend() -> None:
    """Replace ``zero_grad`` and ``requires_grad_`` of nn.Module, unless that was done before."""
    zero_grad, requires_grad_ = nn.Module.zero_grad, nn.Module.requires_grad_
    if hasattr(zero_grad, MARK):
        return

    @wraps(zero_grad)
    def extended_zero_grad(self: nn.Module, set_to_none: bool = True) -> None:
        zero_grad(self, set_to_none)
        for holder in holders(self):
            holder.gradients.discard()

    @wraps(requires_grad_)
    def extended_requires_grad_(self: nn.Module, requires_grad: bool = True) -> nn.Module:
        for holder in holders(self):
            holder.gradients.trainable = requires_grad
        return requires_grad_(self, requires_grad)

    setattr(extended_zero_grad, MARK, True)
    nn.Module.zero_grad = extended_zero_grad  # type: ignore[method-assign]
    nn.Module.requires_grad_ = extended_requires_grad_  # type: ignore[method-assign,assignment]
