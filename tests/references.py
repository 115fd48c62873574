"""Reference optimizers in float64. They share no code with the server's.

PyTorch's own with one parameter per row, so that each row has its own step count, or a
transcription of the published formula.

    reference = REFERENCES[name](optimizer, embeddings)   optimizer: a storage.optimizers one
    reference.step(slots, gradients, lr, step)
    reference.rows()                                      float64[rows, dim + state]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


class TorchReference:
    """One of PyTorch's optimizers, one parameter per row. Rows without gradient do not change."""

    make: Callable[[Any, list[torch.nn.Parameter]], torch.optim.Optimizer]
    state: ClassVar[tuple[str, ...]] = ()

    def __init__(self, optimizer: Any, embeddings: Doubles) -> None:
        self._rows = [torch.nn.Parameter(torch.tensor(row)) for row in embeddings]
        self._initial = optimizer.initial_state(embeddings.shape[1]).astype(np.float64)
        self._torch = self.make(optimizer, self._rows)

    def step(self, slots: list[int], grads: Doubles, lr: float, step: int) -> None:
        for row in self._rows:
            row.grad = None
        for slot, grad in zip(slots, grads, strict=True):
            self._rows[slot].grad = torch.tensor(grad)
        self._torch.param_groups[0]["lr"] = lr
        self._torch.step()

    def rows(self) -> Doubles:
        return np.stack([np.append(r.detach().numpy(), self._state(r)) for r in self._rows])

    def _state(self, row: torch.nn.Parameter) -> Doubles:
        held = self._torch.state.get(row)
        if not held:
            return self._initial
        return np.concatenate([np.atleast_1d(held[k].numpy()) for k in self.state] or [[]])


class SgdReference(TorchReference):
    def make(self, o: Any, rows: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(rows, lr=1.0)


class MomentumReference(TorchReference):
    state = ("momentum_buffer",)

    def make(self, o: Any, rows: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(rows, lr=1.0, momentum=o.momentum, nesterov=bool(o.nesterov))


class AdagradReference(TorchReference):
    state = ("sum",)

    def make(self, o: Any, rows: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        initial = o.initial_accumulator
        return torch.optim.Adagrad(rows, lr=1.0, initial_accumulator_value=initial, eps=o.eps)


class AdamReference(TorchReference):
    state = ("exp_avg", "exp_avg_sq", "step")

    def make(self, o: Any, rows: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(rows, lr=1.0, betas=(o.beta1, o.beta2), eps=o.eps)


class AdamWReference(TorchReference):
    state = ("exp_avg", "exp_avg_sq", "step")

    def make(self, o: Any, rows: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        betas = o.beta1, o.beta2
        return torch.optim.AdamW(rows, 1.0, betas, o.eps, weight_decay=o.weight_decay)


class Transcription:
    """A published formula in float64, one row at a time."""

    def __init__(self, optimizer: Any, embeddings: Doubles) -> None:
        self.o = optimizer
        self.w = embeddings.copy()
        self.start(*embeddings.shape)

    def step(self, slots: list[int], grads: Doubles, lr: float, step: int) -> None:
        for slot, grad in zip(slots, grads, strict=True):
            self.row(slot, grad, lr, step)

    def start(self, rows: int, dim: int) -> None:
        raise NotImplementedError

    def row(self, r: int, g: Doubles, lr: float, step: int) -> None:
        raise NotImplementedError

    def rows(self) -> Doubles:
        raise NotImplementedError


class RowwiseAdagradReference(Transcription):
    """FBGEMM, genscript/optimizers.py: rowwise_adagrad()."""

    def start(self, rows: int, dim: int) -> None:
        self.sums = np.zeros((rows, 1))

    def row(self, r: int, g: Doubles, lr: float, step: int) -> None:
        self.sums[r] += np.mean(g**2)
        multiplier = lr / (np.sqrt(self.sums[r]) + self.o.eps)
        self.w[r] -= multiplier * g

    def rows(self) -> Doubles:
        return np.hstack([self.w, self.sums])


class AdagradDecayReference(Transcription):
    """DeepRec, training_ali_ops.cc: KvSparseApplyAdagradDecayOp, with `if` made `while`."""

    def start(self, rows: int, dim: int) -> None:
        self.accum = np.full((rows, dim), self.o.initial_accumulator)
        self.power = np.zeros((rows, 1))

    def row(self, r: int, g: Doubles, lr: float, step: int) -> None:
        while step // self.o.accumulator_decay_step > self.power[r]:
            self.accum[r] = self.accum[r] * self.o.accumulator_decay_rate
            self.accum[r] = np.maximum(self.accum[r], self.o.initial_accumulator)
            self.power[r] += 1
        self.accum[r] += g**2
        self.w[r] -= lr * g / np.sqrt(self.accum[r])

    def rows(self) -> Doubles:
        return np.hstack([self.w, self.accum, self.power])


class AdamAsyncReference(Transcription):
    """DeepRec, training_ali_ops.cc: SparseApplyAdamAsync, the beta powers being the row's."""

    def start(self, rows: int, dim: int) -> None:
        self.m, self.v = np.zeros((2, rows, dim))
        self.powers = np.tile([self.o.beta1, self.o.beta2], (rows, 1))
        self.advanced = np.zeros((rows, 1))

    def row(self, r: int, g: Doubles, lr: float, step: int) -> None:
        beta1, beta2, epsilon = self.o.beta1, self.o.beta2, self.o.eps
        self.v[r] = self.v[r] * beta2 + g**2 * (1 - beta2)
        if self.o.apply_sparse_rmsprop:
            self.m[r] = self.m[r] * beta1 + (self.v[r] + epsilon) ** -0.5 * lr * g
            self.w[r] -= self.m[r]
            return
        power1, power2 = self.powers[r]
        alpha = lr * np.sqrt(1 - power2) / (1 - power1)
        self.m[r] = self.m[r] * beta1 + g * (1 - beta1)
        self.w[r] -= self.m[r] * alpha / (np.sqrt(self.v[r]) + epsilon)
        self.powers[r] *= [beta1, beta2]
        self.advanced[r] += 1

    def rows(self) -> Doubles:
        return np.hstack([self.w, self.m, self.v, self.advanced])


class FtrlReference(Transcription):
    """TensorFlow, training_ops.cc: ComputeFtrl and FtrlCompute; beta as in Keras' Ftrl."""

    def start(self, rows: int, dim: int) -> None:
        self.accum = np.full((rows, dim), self.o.initial_accumulator)
        self.linear = np.zeros((rows, dim))

    def row(self, r: int, g: Doubles, lr: float, step: int) -> None:
        w, power = self.w[r], -self.o.learning_rate_power
        accum = self.accum[r] + g**2
        sigma = (accum**power - self.accum[r] ** power) / lr
        self.linear[r] += g + 2 * self.o.l2_shrinkage * w - sigma * w
        self.accum[r] = accum
        self.w[r] = self.solve(self.linear[r], accum**power / lr, lr)

    def solve(self, linear: Doubles, strength: Doubles, lr: float) -> Doubles:
        """Minimise linear w + strength w^2 / 2 + l1 |w| + (l2 + beta / 2 lr) w^2 over w."""
        quadratic = strength + 2 * (self.o.l2 + self.o.beta / (2 * lr))
        clipped = np.clip(linear, -self.o.l1, self.o.l1)
        return np.asarray((clipped - linear) / quadratic)

    def rows(self) -> Doubles:
        return np.hstack([self.w, self.accum, self.linear])


class GroupFtrlReference(FtrlReference):
    """Yue et al. 2021, Algorithm 2 for Adagrad's V_t: s_t, its norm against sqrt(d) lambda_21."""

    def solve(self, linear: Doubles, strength: Doubles, lr: float) -> Doubles:
        s = np.where(abs(linear) <= self.o.l1, 0, np.sign(linear) * self.o.l1 - linear)
        norm, bound = np.linalg.norm(s), np.sqrt(len(s)) * self.o.l21
        if norm <= bound:
            return np.zeros_like(s)
        return np.asarray(s * (1 - bound / norm) / (strength + self.o.beta / lr + 2 * self.o.l2))


REFERENCES: dict[str, Callable[[Any, Doubles], TorchReference | Transcription]] = {
    "sgd": SgdReference,
    "momentum": MomentumReference,
    "adagrad": AdagradReference,
    "rowwise_adagrad": RowwiseAdagradReference,
    "adagrad_decay": AdagradDecayReference,
    "adam": AdamReference,
    "adamw": AdamWReference,
    "adam_async": AdamAsyncReference,
    "ftrl": FtrlReference,
    "group_ftrl": GroupFtrlReference,
}
