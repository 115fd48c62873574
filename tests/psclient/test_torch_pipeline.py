"""The pipeline of an EmbeddingGroup against a loop without it, and what it refuses."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from psclient import Client
from psclient.errors import InvalidArgument, PushFailed
from psclient.multihash import KHash
from psclient.torch import (
    Embedding,
    EmbeddingBag,
    EmbeddingGroup,
    MultiHashEmbedding,
    RowOptimizer,
    pipeline,
)
from psclient.torch.transfer import CudaTransfer, Transfer

DIM = 4
KEYS = 50
Batch = dict[str, Any]


@pytest.fixture
def client(cluster2: Any, connect: Any) -> Client:
    return connect(cluster2)


def make(client: Client, name: str) -> EmbeddingGroup:
    """Features over four tables; two features share one, and one has two parts in one table."""
    tables = {}
    for table, optimizer in (("a", "adam"), ("b", "adagrad"), ("c", "sgd"), ("d", "sgd")):
        tables[table] = client.create_table(
            f"{name}.{table}", DIM, optimizer=optimizer, lr=0.1, initializer="normal", seed=1
        )
    hashed = KHash(tables["d"], [29, 31], "add")
    return EmbeddingGroup(
        client,
        {
            "user": Embedding(tables["a"], padding_idx=3),
            "basket": EmbeddingBag(tables["b"], "mean"),
            "last": Embedding(tables["b"]),
            "type": EmbeddingBag(tables["c"]),
            "word": MultiHashEmbedding(hashed),
        },
    )


def drop(client: Client, group: EmbeddingGroup) -> dict[str, Any]:
    """Return the rows of all tables, and drop them."""
    names = {remote.table.name for each in group.features.values() for remote in each.remotes()}
    found = {name: client.table(name).pull_rows(np.arange(KEYS)) for name in sorted(names)}
    for name in names:
        client.drop_table(name)
    return found


def batches(seed: int, count: int, size: int = 8) -> list[Batch]:
    rng = np.random.default_rng(seed)
    return [
        {
            "user": torch.from_numpy(rng.integers(0, KEYS, size)),
            "basket": (torch.from_numpy(rng.integers(0, KEYS, 3 * size)), torch.arange(size) * 3),
            "last": rng.integers(0, KEYS, size),
            "type": torch.from_numpy(rng.integers(0, KEYS, (size, 2))),
            "word": torch.from_numpy(rng.integers(0, 1000, size)),
            "y": torch.from_numpy(rng.random(size).astype(np.float32)),
        }
        for _ in range(count)
    ]


def keys_of(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "y"}


class Model:
    """A dense layer over the group, and what a step does."""

    def __init__(self, group: EmbeddingGroup, lr: float | None = None) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5 * DIM, 6), nn.Tanh(), nn.Linear(6, 1))
        self.dense = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        self.rows = group.optimizer(lr)
        self.losses: list[float] = []

    def loss(self, batch: Batch, outputs: dict[str, Tensor]) -> Tensor:
        seen = torch.cat([outputs[name] for name in sorted(outputs)], 1)
        loss = nn.functional.mse_loss(self.net(seen)[:, 0], batch["y"])
        self.losses.append(loss.item())
        return loss

    def step(self, batch: Batch, outputs: dict[str, Tensor]) -> None:
        self.dense.zero_grad()
        self.rows.zero_grad()
        self.loss(batch, outputs).backward()
        self.dense.step()
        self.rows.step()


Step = Callable[[Model, int, Batch, dict[str, Tensor]], None]


def same(
    client: Client,
    name: str,
    step: Step,
    *,
    lr: float | None = None,
    count: int = 30,
    **options: Any,
) -> None:
    """Train without a pipeline and with one; all numbers must be equal."""
    data = batches(1, count)
    group = make(client, name)
    plain = Model(group, lr)
    for at, batch in enumerate(data):
        step(plain, at, batch, group(keys_of(batch)))
    wanted = drop(client, group)
    group = make(client, name)
    ours = Model(group, lr)
    with group.pipeline(data, keys_of, **options) as turns:
        for at, (batch, outputs) in enumerate(turns):
            step(ours, at, batch, outputs)
    assert ours.losses == plain.losses
    for mine, theirs in zip(ours.net.parameters(), plain.net.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    got = drop(client, group)
    for table, rows in got.items():
        for field in ("embeddings", "steps", "frequencies"):
            assert_array_equal(getattr(rows, field), getattr(wanted[table], field))


class TestWithoutStaleness:
    """Everything is as in a loop without the pipeline, bit for bit."""

    @pytest.mark.parametrize("lookahead", [1, 3])
    def test_a_plain_loop(self, client: Client, name: str, lookahead: int) -> None:
        def step(model: Model, at: int, batch: Batch, outputs: dict[str, Tensor]) -> None:
            model.step(batch, outputs)

        same(client, name, step, lookahead=lookahead, count=25)

    def test_scaler_clipping_and_scheduler(self, client: Client, name: str) -> None:
        scalers: dict[int, Any] = {}
        schedules: dict[int, Any] = {}

        def step(model: Model, at: int, batch: Batch, outputs: dict[str, Tensor]) -> None:
            scaler = scalers.setdefault(id(model), torch.amp.GradScaler("cpu", init_scale=64.0))
            schedule = schedules.setdefault(
                id(model), torch.optim.lr_scheduler.ExponentialLR(model.rows, 0.9)
            )
            model.dense.zero_grad()
            model.rows.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model.loss(batch, outputs) * (float("inf") if at % 7 == 3 else 1)
            scaler.scale(loss).backward()
            for each in (model.dense, model.rows):
                scaler.unscale_(each)
            clip_grad_norm_([*model.net.parameters(), *model.rows.leaves()], 0.1)
            for each in (model.dense, model.rows):
                scaler.step(each)
            scaler.update()
            schedule.step()
            model.rows.zero_grad()

        same(client, name, step, lr=0.1)

    def test_accumulation(self, client: Client, name: str) -> None:
        """Three batches, one push; then batches of which only one computes gradients."""

        def step(model: Model, at: int, batch: Batch, outputs: dict[str, Tensor]) -> None:
            if at < 10 or at % 2:
                model.loss(batch, outputs).backward()
            if at % 3 == 2:
                for each in (model.dense, model.rows):
                    each.step()
                    each.zero_grad()

        same(client, name, step, accumulate=3, lookahead=2)

    def test_discarded_and_frozen(self, client: Client, name: str) -> None:
        def step(model: Model, at: int, batch: Batch, outputs: dict[str, Tensor]) -> None:
            if at % 5 == 1:
                model.loss(batch, outputs).backward()
                model.rows.zero_grad()
            elif at % 5 != 2:
                model.step(batch, outputs)

        same(client, name, step)


def numbers(name: str, client: Client) -> tuple[EmbeddingGroup, RowOptimizer]:
    """A group of one table whose rows are minus the sums of gradients."""
    table = client.create_table(name, 1, optimizer="sgd", lr=1.0, initializer="zeros")
    group = EmbeddingGroup(client, {"f": Embedding(table)})
    return group, group.optimizer()


def same_key(batch: Any) -> Batch:
    return {"f": [1]}


@pytest.mark.parametrize("staleness", [0, 2])
def test_rows_and_gradients_of_16_bits(client: Client, name: str, staleness: int) -> None:
    """With wire="bfloat16", both are rounded on the wire, and the table stays in 32 bits."""
    table = client.create_table(name, 1, optimizer="sgd", lr=1.0, initializer="zeros")
    group = EmbeddingGroup(client, {"f": Embedding(table)})
    rows = group.optimizer()
    fine = 1 + 2.0**-12  # in bfloat16: 1
    table.push([1], np.full((1, 1), -fine, np.float32))
    seen = []
    with group.pipeline(range(4), same_key, staleness=staleness, wire="bfloat16") as turns:
        for _, outputs in turns:
            seen.append(outputs["f"].item())
            (outputs["f"].sum() * -fine).backward()
            rows.step()
    assert seen == ([1, 2, 3, 4] if staleness == 0 else [int(each) for each in seen])
    assert client.pull({name: [1]})[name].item() == fine + 4


@pytest.mark.parametrize("staleness", [1, 3])
def test_every_batch_is_pushed_once(client: Client, name: str, staleness: int) -> None:
    """In several epochs, of which one ends early, with its last push outside of the loop."""
    group, rows = numbers(name, client)
    seen = []
    with group.pipeline(range(10), same_key, staleness=staleness) as turns:
        for epoch in range(3):
            for batch, outputs in turns:
                seen.append(outputs["f"].item())
                (outputs["f"].sum() * -1).backward()
                if (epoch, batch) == (1, 4):
                    break
                rows.step()
            else:
                continue
            rows.step()
    assert client.pull({name: [1]})[name].item() == 25
    assert turns.pipe.stats.pushes == 24
    for number, before in enumerate(seen):
        assert max(number - staleness, 0) <= before <= number


class Delayed(Transfer):
    """Stands in for a GPU: copies of rows and gradients end only when somebody waits for them."""

    def __init__(self, seconds: float = 0.002) -> None:
        self.seconds = seconds
        self.under_way: list[tuple[Any, Any]] = []  # (buffer that is read, its numbers)
        self.waits = 0

    def rows(self, array: Any, output: Any) -> Tensor:
        self.under_way.append((array, array.copy()))
        return torch.from_numpy(array.copy())

    def gradients(self, table: str, tensor: Tensor) -> Any:
        def wait() -> Any:
            time.sleep(self.seconds)
            self.finish()
            return tensor.numpy()

        return wait

    def finish(self) -> None:
        self.waits += 1
        under_way, self.under_way = self.under_way[:], []
        for buffer, numbers in under_way:
            assert_array_equal(buffer, numbers)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_buffers_are_not_used_again_before_they_are_copied(
    client: Client, name: str, monkeypatch: pytest.MonkeyPatch, staleness: int
) -> None:
    """A batch that is skipped waits for its copies, too, and so does one without gradients."""
    delayed = Delayed()
    monkeypatch.setattr(pipeline, "transfer_to", lambda device, pushes: delayed)
    table = client.create_table(name, 1, optimizer="sgd", lr=1.0, initializer="zeros")
    group = EmbeddingGroup(client, {"f": Embedding(table)})
    rows = group.optimizer()
    with group.pipeline(
        range(30), lambda each: {"f": np.arange(each % 7 + 1)}, staleness=staleness
    ) as turns:
        for batch, outputs in turns:
            if batch % 5:
                (outputs["f"].sum() * -1).backward()
                rows.step()
            elif batch % 2:
                before = delayed.waits
                rows.step()
                assert delayed.waits > before
    assert delayed.waits >= 30
    assert client.pull({name: [0]})[name].item() == 24


def test_buffers_if_the_staleness_is_larger_than_the_lookahead(
    client: Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop waits for the copy of an older batch while its gradients are under way."""
    delayed = Delayed(seconds=0.05)
    monkeypatch.setattr(pipeline, "transfer_to", lambda device, pushes: delayed)
    group = EmbeddingGroup(client, {"f": Embedding(client.create_table(name, DIM))})
    rows = group.optimizer()
    with group.pipeline(
        range(9), lambda each: {"f": np.arange(10 * each, 10 * each + 10)}, staleness=4, lookahead=0
    ) as turns:
        for _, outputs in turns:
            outputs["f"].sum().backward()
            rows.step()
    assert delayed.waits >= 9


class OnGpu(Tensor):
    """A tensor that says that it is on a GPU."""

    device = torch.device("cuda")

    def record_stream(self, stream: Any) -> None:
        """Do nothing."""


def test_tables_do_not_share_buffers_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those whose rows have the same length."""
    for each in ("Stream", "Event", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, each, MagicMock())
    monkeypatch.setattr(
        CudaTransfer, "empty", lambda self, shape: np.full(shape, np.nan, np.float32)
    )
    copies = CudaTransfer(torch.device("cuda"), pushes=3)
    for _ in range(2):
        waits = [
            copies.gradients(f"t{number}", torch.full((5, DIM), number).as_subclass(OnGpu))
            for number in range(8)
        ]
        for number, wait in enumerate(waits):
            assert_array_equal(wait(), np.full((5, DIM), number))


class TestRefusals:
    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_gradients_must_be_pushed_before_the_next_batch(
        self, client: Client, name: str, accumulate: int
    ) -> None:
        group, rows = numbers(name, client)
        seen = []

        def run() -> None:
            for batch, outputs in turns:
                seen.append(batch)
                outputs["f"].sum().backward()

        expected = rf"the batch of step {accumulate - 1} were neither pushed nor discarded"
        with group.pipeline(range(9), same_key, accumulate=accumulate) as turns:
            with pytest.raises(InvalidArgument, match=expected):
                run()
            rows.zero_grad()
        assert len(seen) == accumulate

    def test_one_push_a_batch(self, client: Client, name: str) -> None:
        group, rows = numbers(name, client)
        with group.pipeline(range(9), same_key) as turns:
            for _, outputs in turns:
                outputs["f"].sum().backward()
                rows.step()
                with pytest.raises(InvalidArgument, match="call step once per batch"):
                    rows.step()
                break

    def test_modules_outside_the_group(self, client: Client, name: str) -> None:
        group, _ = numbers(name, client)
        other = Embedding(client.create_table(f"{name}.other", 1))
        joint = RowOptimizer([group, other])
        with group.pipeline(range(9), same_key) as turns:
            for _, outputs in turns:
                outputs["f"].sum().backward()
                with pytest.raises(InvalidArgument, match="must have modules of this group only"):
                    joint.step()
                break
            with pytest.raises(InvalidArgument, match="is in another pipeline"):
                group.pipeline(range(9), same_key).__enter__()
        joint.step()

    def test_it_needs_a_with_block(self, client: Client, name: str) -> None:
        group, _ = numbers(name, client)
        with pytest.raises(InvalidArgument, match="must be used in a 'with' block"):
            next(iter(group.pipeline(range(9), same_key)))

    def test_wrong_keys(self, client: Client, name: str) -> None:
        group, _ = numbers(name, client)
        for keys, message in (
            ({"g": [1]}, r"must return a mapping with the features \['f'\], got \['g'\]"),
            ([1], r"must return a mapping .* got list"),
            ({"f": [1.5]}, r"feature 'f': keys must be integers"),
        ):
            with (
                group.pipeline(range(9), lambda batch, keys=keys: keys) as turns,
                pytest.raises(InvalidArgument, match=message),
            ):
                next(iter(turns))

    def test_not_finite_gradients(self, client: Client, name: str) -> None:
        """The batch is discarded, as without a pipeline; the loop may go on."""
        group, rows = numbers(name, client)
        with group.pipeline(range(9), same_key, staleness=1) as turns:
            for batch, outputs in turns:
                (outputs["f"].sum() * (float("nan") if batch == 4 else -1)).backward()
                if batch == 4:
                    with pytest.raises(InvalidArgument, match="all numbers must be finite"):
                        rows.step()
                else:
                    rows.step()
        assert client.pull({name: [1]})[name].item() == 8

    def test_a_push_that_the_server_refuses(self, client: Client, name: str) -> None:
        group, rows = numbers(name, client)

        def run() -> None:
            with group.pipeline(range(9), same_key, staleness=1) as turns:
                for batch, outputs in turns:
                    outputs["f"].sum().backward()
                    rows.param_groups[0]["lr"] = float("nan") if batch == 4 else 1.0
                    rows.step()

        with pytest.raises(PushFailed, match=f"the push of step 4 to table '{name}' failed"):
            run()
        outputs = group({"f": [1]})  # the group works on without it
        outputs["f"].sum().backward()
        rows.param_groups[0]["lr"] = 1.0
        rows.step()
