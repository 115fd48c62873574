"""Modules whose outputs are on a device, trained beside torch's own; rows in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("grpc")
pytest.importorskip("google.protobuf")

from torch import nn  # noqa: E402

from psclient.batch import Batch  # noqa: E402
from psclient.table import Table  # noqa: E402
from psclient.torch import Embedding, EmbeddingBag, EmbeddingGroup  # noqa: E402
from psproto import routing  # noqa: E402

DIM, ROWS = 8, 50
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class RowsHere:
    """In place of a client: one table, in memory, trained by SGD."""

    def __init__(self) -> None:
        seed = np.random.default_rng(0)
        self.rows = seed.normal(size=(ROWS, DIM)).astype(np.float32)

    def batch(self, keys: Any) -> Batch:
        return Batch(keys, routing.even_map(1))

    def pull_distinct(
        self, keys: Mapping[str, Batch], *, mode: str, out: Mapping[str, Any]
    ) -> dict[str, Any]:
        rows = {name: self.rows[batch.keys.astype(int)] for name, batch in keys.items()}
        for name, tensor in out.items():
            rows[name] = tensor.copy_(torch.from_numpy(rows[name]))
        return rows

    def push_distinct(self, gradients: Mapping[str, Any], *, step: int, lr: float) -> None:
        for name, (batch, sums) in gradients.items():
            self.rows[batch.keys.astype(int)] -= lr * batch.check(sums, name, DIM)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


def train(embed: Any, rows: Any, device: str, on_device: bool) -> tuple[list[float], Any]:
    """Eight steps with a scaler, clipping and a schedule; returns the losses and the dense layer.

    on_device  whether the keys are on the device, too
    """
    torch.manual_seed(0)
    head = nn.Linear(DIM, 1).to(device)
    dense = torch.optim.SGD(head.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(rows, step_size=2, gamma=0.5)
    scaler = torch.amp.GradScaler(device, init_scale=256.0, growth_interval=1000)
    losses = []
    for step in range(8):
        seed = np.random.default_rng(step)
        keys = torch.from_numpy(seed.integers(0, ROWS, (16, 3))).to(device if on_device else "cpu")
        labels = torch.from_numpy(seed.normal(size=(16, 1)).astype(np.float32)).to(device)
        out = embed(keys)
        assert out.device.type == device
        loss = (head(out) - labels).square().mean() * (float("inf") if step == 3 else 1)
        for optimizer in (dense, rows):
            optimizer.zero_grad()
        scaler.scale(loss).backward()
        for optimizer in (dense, rows):
            scaler.unscale_(optimizer)
        leaves = [leaf for group in rows.param_groups for leaf in group["params"]]
        nn.utils.clip_grad_norm_([*head.parameters(), *leaves], 0.5)
        for optimizer in (dense, rows):
            scaler.step(optimizer)
        scaler.update()
        if step != 3:
            schedule.step()
        losses.append(loss.item())
    assert scaler.get_scale() == 128.0
    return losses, head.weight.detach().cpu().numpy()


@pytest.mark.parametrize("on_device", [False, True], ids=["host keys", "device keys"])
def test_it_trains_as_torchs_module_on_the_same_device(device: str, on_device: bool) -> None:
    client: Any = RowsHere()
    theirs = nn.EmbeddingBag.from_pretrained(
        torch.from_numpy(client.rows.copy()), mode="sum", freeze=False
    ).to(device)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.2)
    expected = train(theirs, reference, device, on_device=True)
    group = EmbeddingGroup(client, {"a": EmbeddingBag(Table(client, "t", DIM))}).to(device)
    losses, weight = train(
        lambda keys: group({"a": keys})["a"], group.optimizer(lr=0.2), device, on_device
    )
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    np.testing.assert_allclose(weight, expected[1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(client.rows, theirs.weight.detach().cpu(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_have_the_dtype_and_device_of_the_module(device: str, dtype: Any) -> None:
    client: Any = RowsHere()
    bag = EmbeddingBag(Table(client, "t", DIM)).to(device, dtype)
    keys = torch.arange(6).reshape(2, 3)
    weights = torch.full((2, 3), 0.5, device=device, dtype=dtype)
    out = bag(keys, None, weights)
    assert (out.device.type, out.dtype) == (device, dtype)
    out.sum().backward()
    before = client.rows.copy()
    bag.step(lr=1.0)
    np.testing.assert_array_equal(client.rows[:6], before[:6] - np.float32(0.5))


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("nested", [False, True])
def test_all_inputs_may_be_on_the_device(device: str, padding: int | None, nested: bool) -> None:
    keys = torch.tensor([1, 3, 2, 3, 1, 4, 4, 9], device=device)
    offsets = torch.tensor([0, 2, 2, 8], device=device)
    weights = torch.linspace(-1, 1, 8, device=device)
    jagged = torch.nested.nested_tensor_from_jagged
    whole = jagged(keys, offsets) if nested else keys
    bags = (whole, None, jagged(weights, offsets)) if nested else (keys, offsets, weights)
    options: Any = {"padding_idx": padding, "include_last_offset": True}
    for ours, theirs, inputs, chosen in (
        (EmbeddingBag, nn.EmbeddingBag, bags, {**options, "mode": "sum"}),
        (EmbeddingBag, nn.EmbeddingBag, bags[:2], {**options, "mode": "max"}),
        (Embedding, nn.Embedding, (whole,), {"padding_idx": padding}),
    ):
        client: Any = RowsHere()
        if padding is not None:
            client.rows[padding] = 0
        before = client.rows.copy()
        module = ours(Table(client, "t", DIM), device=device, **chosen)
        reference = theirs(ROWS, DIM, device=device, **chosen)
        with torch.no_grad():
            reference.weight.copy_(torch.from_numpy(before))
        outputs = []
        for each in (module, reference):
            out = each(*inputs)
            outputs.append(out.values() if out.is_nested else out)
            outputs[-1].square().sum().backward()
        assert outputs[0].device.type == device
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-6)
        module.step(lr=1.0)
        gradients = reference.weight.grad.cpu().numpy()
        np.testing.assert_allclose(before - client.rows, gradients, rtol=1e-5, atol=1e-6)
