"""Callback and loader that train an EmbeddingGroup in PyTorch Lightning, with rows pulled ahead.

    class Model(LightningModule):
        def training_step(self, batch, number):
            batch, outputs = batch                      # outputs: {feature: tensor} of the group
            return loss_fn(self.net(outputs), batch["y"])

    rows = PsCallback(group, lambda batch: batch["keys"], staleness=1)
    trainer = Trainer(callbacks=[rows], accumulate_grad_batches=2)
    trainer.fit(model, rows.loader(DataLoader(...)))

The callback pushes the gradients of rows whenever Lightning is about to call ``step`` of the
optimizer of the dense layers. So Lightning's automatic optimization works, also with
``accumulate_grad_batches`` and with the precisions "32-true", "bf16-mixed" and "16-mixed".
Lightning's gradient clipping sees only the dense layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from psclient.choices import Wire
from psclient.errors import InvalidArgument
from psclient.torch.group import EmbeddingGroup
from psclient.torch.pipeline import GroupPipeline


class PsLoader:
    """Yields (batch, {feature: output}) of a DataLoader to Lightning.

    callback  the callback that pulls and pushes the rows
    loader    the DataLoader; it must have a length
    """

    def __init__(self, callback: PsCallback, loader: Any) -> None:
        if not hasattr(loader, "__len__"):
            raise InvalidArgument(
                f"loader must have a length, because Lightning reads others ahead; got {loader!r}"
            )
        self._callback, self._loader = callback, loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._callback.batches(self._loader))


class PsCallback(Callback):  # type: ignore[misc]
    """Lightning callback that pulls rows ahead and pushes gradients.

    group      the embeddings; it need not be a part of the LightningModule
    keys       function that returns the argument of ``group.forward`` for a batch
    lr         learning rate of the rows; None: that of each table
    lookahead, staleness, wire  see EmbeddingGroup.pipeline

    Use it with the loader that ``loader`` returns. A push that fails is raised as PushFailed by a
    later batch, or at the end of training. Before validation, and before Lightning writes a
    checkpoint, all pushes are waited for.
    """

    def __init__(
        self,
        group: EmbeddingGroup,
        keys: Callable[[Any], Mapping[str, Any]],
        *,
        lr: float | None = None,
        lookahead: int | None = None,
        staleness: int = 0,
        wire: Wire | None = None,
    ) -> None:
        self._group, self._keys = group, keys
        self._options: dict[str, Any] = {
            "lookahead": lookahead,
            "staleness": staleness,
            "wire": wire,
        }
        self.rows = group.optimizer(lr)
        self.pipeline: GroupPipeline | None = None
        self._trainer: Any = None

    def loader(self, loader: Any) -> PsLoader:
        """Return a loader for ``trainer.fit`` that yields (batch, {feature: output})."""
        return PsLoader(self, loader)

    def batches(self, loader: Iterable[Any]) -> GroupPipeline:
        """Begin an epoch; return its batches. PsLoader calls this."""
        if self._trainer is None:
            raise InvalidArgument("PsCallback must be among the callbacks of the Trainer")
        if self.pipeline is None:
            self.pipeline = self._group.pipeline(
                loader,
                self._keys,
                accumulate=self._trainer.accumulate_grad_batches,
                step=self._trainer.global_step,
                **self._options,
            ).__enter__()
        return self.pipeline

    # ---- called by Lightning

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._trainer = trainer

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and not self._unscale(scaler.get_scale()):
            self.rows.zero_grad()
        else:
            self.rows.step()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._flush()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._close(None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close(exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._trainer = None

    def state_dict(self) -> dict[str, Any]:
        """Wait for all pushes; return learning rate, training step and ``Pipeline.state()``."""
        self._flush()
        state = None if self.pipeline is None else self.pipeline.pipe.state()
        return {"rows": self.rows.state_dict(), "pipeline": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set learning rate and training step. The rows themselves are on the servers."""
        self.rows.load_state_dict(state_dict["rows"])

    # ----

    def _unscale(self, scale: float) -> bool:
        """Divide the gradients of rows by ``scale``; return whether all are finite."""
        finite = True
        for leaf in self.rows.leaves():
            if leaf.grad is not None:
                leaf.grad /= scale
                finite = finite and bool(torch.isfinite(leaf.grad).all())
        return finite

    def _flush(self) -> None:
        if self.pipeline is not None:
            self.pipeline.pipe.flush()

    def _close(self, error: BaseException | None) -> None:
        pipeline, self.pipeline = self.pipeline, None
        if pipeline is not None:
            pipeline.__exit__(type(error) if error else None, error, None)
