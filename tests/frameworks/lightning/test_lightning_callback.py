"""PsCallback: Lightning trains the same numbers as a loop, and what it does after errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from numpy.testing import assert_allclose, assert_array_equal
from servers import Cluster
from torch import nn
from torch.utils.data import DataLoader

from psclient import Client, Table
from psclient.errors import InvalidArgument, PushFailed
from psclient.lightning import PsCallback
from psclient.torch import Embedding, EmbeddingGroup

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning's own calls

DIM, KEYS, BATCH = 4, 40, 6


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    cluster = Cluster(1).start()
    with Client(cluster.addresses) as client:
        yield client
    assert cluster.stop() == 0


class Net(LightningModule):
    """A linear layer over one feature.

    infinite  number of the training step whose loss is infinite
    """

    def __init__(self, infinite: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.infinite = nn.Linear(DIM, 1), infinite
        self.losses: list[float] = []

    def training_step(self, batch: Any, number: int) -> Any:
        (_, labels), outputs = batch
        loss = nn.functional.mse_loss(self.layer(outputs["f"])[:, 0], labels)
        self.losses.append(loss.item())
        return loss * torch.inf if len(self.losses) - 1 == self.infinite else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def samples(count: int = 60) -> list[Any]:
    rng = np.random.default_rng(0)
    return list(zip(rng.integers(0, KEYS, count), rng.random(count, np.float32), strict=True))


def keys_of(batch: Any) -> dict[str, Any]:
    return {"f": batch[0]}


def make(client: Client) -> Table:
    return client.create_table("t", DIM, optimizer="adagrad", lr=0.1, initializer="normal", seed=5)


def fit(
    client: Client, staleness: int, epochs: int, infinite: int | None = None, **options: Any
) -> tuple[list[float], Any]:
    table = make(client)
    net, group = Net(infinite), EmbeddingGroup(client, {"f": Embedding(table)})
    rows = PsCallback(group, keys_of, staleness=staleness)
    trainer = Trainer(
        callbacks=[rows], max_epochs=epochs, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        **options,
    )  # fmt: skip
    trainer.fit(net, rows.loader(DataLoader(samples(), batch_size=BATCH)))
    assert rows.pipeline is None
    found = table.pull_rows(np.arange(KEYS))
    client.drop_table("t")
    return net.losses, found


def loop(
    client: Client,
    epochs: int,
    accumulate: int = 1,
    *,
    dtype: Any = None,
    scale: float | None = None,
    infinite: int | None = None,
) -> tuple[list[float], Any]:
    """Train without Lightning and without a pipeline.

    dtype  of torch.autocast
    scale  initial scale of a GradScaler
    """
    table = make(client)
    net, group = Net(infinite), EmbeddingGroup(client, {"f": Embedding(table)})
    dense, rows = net.configure_optimizers(), group.optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for _ in range(epochs):
        for number, batch in enumerate(DataLoader(samples(), batch_size=BATCH), 1):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = net.training_step((batch, group(keys_of(batch))), number)
            scaler.scale(loss / accumulate).backward()
            if number % accumulate == 0 or number == 60 // BATCH:
                for each in (dense, rows):
                    scaler.step(each)
                    each.zero_grad()
                scaler.update()
    found = table.pull_rows(np.arange(KEYS))
    client.drop_table("t")
    return net.losses, found


@pytest.mark.parametrize("accumulate", [1, 4])
def test_training_equals_a_loop(client: Client, accumulate: int) -> None:
    """Two epochs; also if several batches are pushed at once."""
    wanted, rows = loop(client, 2, accumulate)
    losses, found = fit(client, 0, 2, accumulate_grad_batches=accumulate)
    assert losses == wanted
    assert_array_equal(found.embeddings, rows.embeddings)
    assert_array_equal(found.steps, rows.steps)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_bfloat16(client: Client, accumulate: int) -> None:
    wanted, rows = loop(client, 2, accumulate, dtype=torch.bfloat16)
    assert wanted != loop(client, 2, accumulate)[0]
    losses, found = fit(client, 0, 2, accumulate_grad_batches=accumulate, precision="bf16-mixed")
    assert losses == wanted
    assert_array_equal(found.embeddings, rows.embeddings)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_float16_with_a_scaler(client: Client, accumulate: int) -> None:
    """What "16-mixed" does on a GPU, here on the CPU; infinite gradients are not pushed."""
    dtype, at = torch.float16, 5
    wanted, rows = loop(client, 2, accumulate, dtype=dtype, scale=64.0, infinite=at)
    assert wanted != loop(client, 2, accumulate, dtype=dtype, scale=64.0)[0]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    losses, found = fit(client, 0, 2, at, accumulate_grad_batches=accumulate, plugins=[plugin])
    assert scaler.get_scale() == 32.0  # halved, once
    assert np.isfinite(losses).all()
    assert losses == wanted
    assert_array_equal(found.embeddings, rows.embeddings)


def test_staleness(client: Client) -> None:
    wanted, _ = loop(client, 3)
    losses, _ = fit(client, 2, 3)
    assert losses != wanted
    assert_allclose(losses, wanted, rtol=0.3, atol=0.02)


def test_an_error_ends_the_pipeline(client: Client) -> None:
    """That of the training step, and that of a push."""
    table = make(client)
    for wrong, expected in (("loss", OSError), ("push", PushFailed)):
        group = EmbeddingGroup(client, {"f": Embedding(table)})
        rows = PsCallback(group, keys_of, staleness=1, lr=0.1)

        class Broken(Net):
            def training_step(self, batch: Any, number: int, wrong: str = wrong) -> Any:
                if number == 4 and wrong == "loss":
                    raise OSError("mine")
                rows.rows.param_groups[0]["lr"] = float("nan") if number == 4 else 0.1  # noqa: B023
                return super().training_step(batch, number)

        trainer = Trainer(
            callbacks=[rows], max_epochs=1, accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        with pytest.raises(expected):
            trainer.fit(Broken(), rows.loader(DataLoader(samples(), batch_size=BATCH)))
        assert rows.pipeline is None
        outputs = group({"f": [1]})  # blocking again
        outputs["f"].sum().backward()
        rows.rows.param_groups[0]["lr"] = 0.1
        rows.rows.step()
    client.drop_table("t")


def test_refusals(client: Client) -> None:
    table = make(client)
    rows = PsCallback(EmbeddingGroup(client, {"f": Embedding(table)}), keys_of)
    with pytest.raises(InvalidArgument, match="loader must have a length"):
        rows.loader(iter([]))
    with pytest.raises(InvalidArgument, match="must be among the callbacks"):
        next(iter(rows.loader([1])))
    state = rows.state_dict()
    assert state["rows"]["step"] == 0
    rows.load_state_dict(state)
    client.drop_table("t")
