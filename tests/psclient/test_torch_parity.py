"""Embedding and EmbeddingBag take and refuse what torch.nn's modules of these names do.

Each case runs a module of psclient.torch and torch's module, with equal rows, on the same inputs.
The outputs, and the gradients that ours pushes, must equal torch's within TOLERANCE: both sum the
same numbers, but not always in the same order. What is refused moves no row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn, tensor

from psclient import Client, Table
from psclient.errors import InvalidArgument
from psclient.torch import Embedding, EmbeddingBag, EmbeddingGroup

DIM, ROWS = 5, 9
TOLERANCE = 1e-6  # relative and absolute; the sums are of at most 10 numbers of about 1
PAD = 3  # row of the padding key in cases that have one
MODES = ("sum", "mean", "max")
ALIKE, DOCUMENTED, WIDER, STRICTER, BOTH = "alike", "documented", "wider", "stricter", "both refuse"
CLASSES: dict[str, tuple[Any, Any]] = {
    "Embedding": (Embedding, nn.Embedding),
    "EmbeddingBag": (EmbeddingBag, nn.EmbeddingBag),
}
PLAIN = np.arange(ROWS)  # ids of the rows
WIDE = np.array([0, -1, 2**62, -(2**63), 5, 2**63 - 1, -(2**40), 7, 1 << 33])


@dataclass(frozen=True)
class Case:
    """Inputs of a module, and what must happen.

    inputs   arguments of a call; their keys are numbers of rows
    options  arguments of the constructor, beside the size
    fate     ALIKE: equal results. BOTH: both refuse. STRICTER: only ours refuses. WIDER: only ours
             takes the inputs, and gives the results of ``theirs``. DOCUMENTED: the same, but torch
             does not do what its documentation says
    theirs   WIDER, DOCUMENTED: arguments for torch
    foreign  whether torch reads memory that is not its own, so that it must not be run
    says     BOTH, STRICTER: a pattern of the error: the argument, the rule and the value
    ids      id of each row
    """

    name: str
    module: str
    inputs: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    fate: str = ALIKE
    theirs: tuple[Any, ...] = ()
    foreign: bool = False
    says: str = ""
    ids: Any = field(default_factory=lambda: PLAIN)


def longs(*values: int) -> Tensor:
    return tensor(values, dtype=torch.long)


def nested(values: Tensor, offsets: Tensor) -> Any:
    return torch.nested.nested_tensor_from_jagged(values, offsets)


KEYS = longs(1, 2, 3, 4, 1, 3, 3, 8, 0, 1)
FLAT: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {  # (options, inputs without weights)
    "offsets": ({}, (KEYS, longs(0, 2, 2, 5))),
    "offsets from 0 and to the end": ({}, (KEYS, longs(0, 0, 10, 10))),
    "one bag": ({}, (KEYS, longs(0))),
    "int32": ({}, (KEYS.int(), longs(0, 2).int())),
    "offsets int32, keys int64": ({}, (KEYS, longs(0, 2).int())),
    "keys int32, offsets int64": ({}, (KEYS.int(), longs(0, 2))),
    "last offset": ({"include_last_offset": True}, (KEYS, longs(0, 2, 2, 10))),
    "2-D": ({}, (KEYS.reshape(5, 2), None)),
    "2-D, last offset": ({"include_last_offset": True}, (KEYS.reshape(2, 5), None)),
    "not contiguous": ({}, (KEYS.reshape(5, 2).T, None)),
    "bags of padding only": ({}, (longs(3, 3, 3, 1, 3), longs(0, 2, 4))),
    "no bags": ({}, (longs(), longs())),
    "bags without keys": ({}, (longs(), longs(0, 0, 0))),
    "2-D without bags": ({}, (torch.zeros(0, 4, dtype=torch.long), None)),
}


def weights_for(keys: Tensor) -> Tensor:
    return torch.linspace(-1, 2, keys.numel()).reshape(keys.shape)


def bags() -> Iterator[Case]:
    """Bags that both take: every mode and option."""
    for (name, (options, inputs)), mode, padding in itertools.product(
        FLAT.items(), MODES, (None, PAD)
    ):
        chosen = {**options, "mode": mode, "padding_idx": padding}
        label = f"{name}, {mode}{', padding' * (padding is not None)}"
        yield Case(label, "EmbeddingBag", inputs, chosen)
        if mode == "sum":
            weighted = (*inputs, weights_for(inputs[0]))
            yield Case(f"{label}, weights", "EmbeddingBag", weighted, chosen)


def cut() -> Iterator[Case]:
    """The last offset before the last key.

    It is "the ending index position of the last bag". But torch divides a mean by the number of all
    keys, has all keys in the last bag of a maximum or with padding, and reads memory that is not
    its own in the backward pass.
    """
    at = longs(0, 4, 6)
    for mode, padding in itertools.product(MODES, (None, PAD)):
        chosen = {"include_last_offset": True, "mode": mode, "padding_idx": padding}
        name, whole, less = f"cut, {mode}, {padding}", (KEYS, at), (KEYS[:6], at)
        yield Case(name, "EmbeddingBag", whole, chosen, DOCUMENTED, less)
    by = weights_for(KEYS)
    chosen = {"include_last_offset": True, "mode": "sum"}
    weighted = ((KEYS, at, by), chosen, DOCUMENTED, (KEYS[:6], at, by[:6]))
    yield Case("cut, weights", "EmbeddingBag", *weighted)


def others() -> Iterator[Case]:
    """What else both take."""
    for shape in [(), (1,), (0,), (3, 0), (2, 5), (2, 1, 5), (10,)]:
        some = KEYS[: int(np.prod(shape))].reshape(shape)
        for padding, by in itertools.product((None, PAD), (False, True)):
            chosen = {"padding_idx": padding, "scale_grad_by_freq": by}
            yield Case(f"keys {shape}, {chosen}", "Embedding", (some,), chosen)
    padded = {"padding_idx": PAD}
    yield Case("only padding", "Embedding", (longs(3, 3),), padded)
    yield Case("a padding key alone", "Embedding", (tensor(3),), padded)
    yield Case("int32", "Embedding", (KEYS.int(),), padded)
    yield Case("not contiguous", "Embedding", (KEYS.reshape(5, 2).T,), padded)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        chosen = {**padded, "dtype": dtype}
        yield Case(f"{dtype}", "Embedding", (KEYS,), chosen)
        inputs = (KEYS, longs(0, 4), weights_for(KEYS).round().to(dtype))
        yield Case(f"{dtype}", "EmbeddingBag", inputs, {**chosen, "mode": "sum"})
    for options in ({"sparse": True}, {"max_norm": None, "norm_type": 2.0, "dtype": torch.float32}):
        yield Case(f"{options}", "Embedding", (KEYS,), options)
        yield Case(f"{options}", "EmbeddingBag", (KEYS, longs(0)), {**options, "mode": "sum"})
    at = longs(0, 2, 2, 10)
    for padding in (None, PAD):
        chosen = {"padding_idx": padding}
        yield Case(f"nested, {chosen}", "Embedding", (nested(KEYS, at),), chosen)
        for mode in MODES:
            chosen = {"padding_idx": padding, "mode": mode}
            yield Case(f"nested, {chosen}", "EmbeddingBag", (nested(KEYS, at),), chosen)
        inputs = (nested(KEYS, at), None, nested(weights_for(KEYS), at))
        yield Case(f"nested, weights, {chosen}", "EmbeddingBag", inputs, {**chosen, "mode": "sum"})


def wide() -> Iterator[Case]:
    """Ids of 64 bits, and other kinds of sequences: torch's numbers of rows must be a tensor."""
    at, by = longs(0, 3, 7), weights_for(KEYS)
    for mode, padding in itertools.product(MODES, (None, PAD)):
        chosen = {"mode": mode, "padding_idx": padding}
        yield Case(f"ids, {chosen}", "EmbeddingBag", (KEYS, at), chosen, ids=WIDE)
        yield Case(f"ids 2-D, {chosen}", "EmbeddingBag", (KEYS.reshape(5, 2),), chosen, ids=WIDE)
    unsigned = WIDE.astype(np.uint64)
    for ids in (WIDE, unsigned):
        chosen = {"padding_idx": PAD}
        yield Case(f"{ids.dtype} ids", "Embedding", (KEYS,), chosen, ids=ids)
    summed = {"mode": "sum"}
    lists = (KEYS.tolist(), at.tolist(), by.tolist())
    arrays = tuple(each.numpy() for each in (KEYS, at, by))
    for name, given in (("lists", lists), ("arrays", arrays)):
        yield Case(name, "EmbeddingBag", given, summed, WIDER, (KEYS, at, by))
        yield Case(name, "Embedding", given[:1], {}, WIDER, (KEYS,))
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint64):
        yield Case(f"{dtype} keys", "Embedding", (KEYS.to(dtype),), {}, WIDER, (KEYS,))
    yield Case("a number", "Embedding", (4,), {}, WIDER, (tensor(4),))
    yield Case("an empty list", "Embedding", ([],), {}, WIDER, (longs(),))
    yield Case("empty lists", "EmbeddingBag", ([], []), summed, WIDER, (longs(), longs()))
    every = {**summed, "include_last_offset": True}
    none = (longs(), longs(0))
    keys = (KEYS, longs(0))
    yield Case("no bags, last offset", "EmbeddingBag", keys, every, WIDER, none, foreign=True)


def refused() -> Iterator[Case]:
    """What both refuse."""
    at, by = longs(0, 3), weights_for(KEYS)

    def bag(name: str, says: str, *inputs: Any, **options: Any) -> Case:
        return Case(name, "EmbeddingBag", inputs, {"mode": "sum", **options}, BOTH, says=says)

    def embedding(name: str, says: str, *inputs: Any, **options: Any) -> Case:
        return Case(name, "Embedding", inputs, options, BOTH, says=says)

    last: dict[str, Any] = {"include_last_offset": True}
    yield bag("offsets from 1", r"offsets must start at 0; got 1$", KEYS, longs(1, 3))
    yield bag(
        "beyond", r"offsets must be at most 10, the number of keys; got 11", KEYS, longs(0, 11)
    )
    yield bag(
        "beyond, last",
        r"offsets must be at most 10, the number of keys; got 11",
        KEYS,
        longs(0, 11),
        **last,
    )
    yield bag(
        "beyond no keys",
        r"offsets must be at most 0, the number of keys; got 1",
        longs(),
        longs(0, 1),
    )
    yield bag("no last", r"offsets must have at least 1 number.*got none", longs(), longs(), **last)
    yield bag("no offsets", "offsets must be given if keys have 1 dimension; got None", KEYS)
    yield bag("offsets 2-D", r"offsets must have 1 dimension; got shape \[1, 2\]", KEYS, at[None])
    yield bag("offset", r"offsets must have 1 dimension; got shape \[\]", KEYS, tensor(0))
    yield bag(
        "offsets with 2-D", "offsets must be None if keys have 2 dim.*got a tensor", KEYS[None], at
    )
    yield bag("float offsets", "offsets must be integers; got dtype float32", KEYS, at.float())
    yield bag("a key", r"keys must have 1 or 2 dimensions; got shape \[\]", tensor(3), at)
    yield bag("3-D", r"keys must have 1 or 2 dim.*shape \[1, 1, 10\]", KEYS[None, None])
    yield bag("no columns", r"at least 1 column; got shape \[2, 0\]", torch.zeros(2, 0, dtype=int))
    yield bag("float keys", "keys must be integers, got dtype float32", KEYS.float(), at)
    yield bag("complex keys", "keys must be integers, got dtype complex64", KEYS + 0j, at)
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool):
        says = f"per_sample_weights must have the dtype of.*float32; got dtype {dtype}"
        yield bag(f"weights {dtype}", says, KEYS, at, by.to(dtype))
    shape = r"per_sample_weights must have the shape of the keys, \[10\]; got shape"
    yield bag("few weights", rf"{shape} \[9\]", KEYS, at, by[1:])
    yield bag("weights 2-D", rf"{shape} \[10, 1\]", KEYS, at, by[:, None])
    yield bag("a weight", rf"{shape} \[\]", KEYS, at, tensor(1.0))
    yield bag("flat weights", r"the keys, \[5, 2\]; got shape \[10\]", KEYS.reshape(5, 2), None, by)
    for mode in ("mean", "max"):
        says = f"per_sample_weights need mode 'sum'; got mode '{mode}'"
        yield bag(f"weights, {mode}", says, KEYS, at, by, mode=mode)
    for mode in ("avg", None, 0):
        says = f"mode must be 'sum', 'mean' or 'max', got {mode!r}"
        yield bag(f"mode {mode}", says, KEYS, at, mode=mode)
    says = "sparse must be False with mode 'max', got True"
    yield bag("max, sparse", says, KEYS, at, mode="max", sparse=True)
    for make in (bag, embedding):
        inputs = (KEYS, at) if make is bag else (KEYS,)
        for padding in (2.0, True, "3"):
            says = f"padding_idx must be a key, an integer.*got {padding!r}"
            yield make(f"padding {padding!r}", says, *inputs, padding_idx=padding)
        yield make("unknown", "unexpected argument 'pad'", *inputs, pad=1)
    says = "include_last_offset must be True or False, got 1"
    yield bag("last 1", says, KEYS, at, include_last_offset=1)
    uneven = nested(by, longs(0, 5, 10))
    says = "per_sample_weights must be nested as the keys are"
    yield bag("weights nested otherwise", says, nested(KEYS, longs(0, 2, 10)), None, uneven)
    yield bag("weights not nested", says, nested(KEYS, longs(0, 2, 10)), None, by)
    yield embedding("float keys", "keys must be integers, got dtype float32", KEYS.float())
    yield embedding("bool keys", "keys must be integers, got dtype bool", KEYS.bool())
    yield embedding("complex keys", "keys must be integers, got dtype complex64", KEYS + 0j)
    yield embedding("None", "keys must be integers, got dtype object: None", None)
    yield embedding("text", "keys must be integers, got dtype <U1", "a")
    yield embedding("sparse keys", "keys must be an array in host memory", KEYS.to_sparse())
    yield embedding("more", "takes keys only, got 1 more arguments", KEYS, at)


def stricter() -> Iterator[Case]:
    """What torch takes, or does not check, and ours refuses."""
    at = longs(0, 3)

    def bag(name: str, says: str, *inputs: Any, foreign: bool = False, **options: Any) -> Case:
        chosen = {"mode": "mean", **options}
        return Case(name, "EmbeddingBag", inputs, chosen, STRICTER, (), foreign, says)

    falling = r"offsets must not decrease; got 7, 5 at position 1"
    yield bag("decreasing", falling, KEYS, longs(0, 7, 5), foreign=True)
    last = {"include_last_offset": True}
    yield bag("decreasing, last", falling, KEYS, longs(0, 7, 5), foreign=True, **last)
    negative = r"offsets must not decrease; got 0, -1 at position 0"
    yield bag("negative", negative, KEYS, longs(0, -1), foreign=True)
    none = r"offsets must have at least 1 number, the start of a bag of 10 keys; got none"
    yield bag("keys without bags", none, KEYS, longs(), foreign=True)
    yield bag("bool keys", "keys must be integers, got dtype bool", KEYS.bool(), at)
    yield bag("bool offsets", "offsets must be integers; got dtype bool", KEYS, tensor([False]))
    jagged = nested(KEYS, longs(0, 2, 10))
    yield bag("nested, offsets", "offsets must be None if keys are a nested", jagged, at)
    for name, value in (("max_norm", 1.0), ("norm_type", 1.0)):
        says = rf"{name} must be left out \(.*\); got {value!r}"
        yield bag(name, says, KEYS, at, **{name: value})
        yield Case(name, "Embedding", (KEYS,), {name: value}, STRICTER, says=says)
    says = r"scale_grad_by_freq must be left out \(only Embedding has it.*\); got True"
    yield bag("by frequency", says, KEYS, at, scale_grad_by_freq=True)
    says = "keys must be an array in host memory"
    yield Case("meta", "Embedding", (KEYS.to("meta"),), {}, STRICTER, (), True, says)


CASES = [*bags(), *cut(), *others(), *wide(), *refused(), *stricter()]


@pytest.fixture(scope="module")
def table(cluster3: Any) -> Iterator[Table]:
    with Client(cluster3.addresses, timeout=60.0) as client:
        yield client.create_table(
            "parity", DIM, optimizer="sgd", lr=0.01, initializer="normal", seed=1
        )


def ours(table: Table, case: Case) -> Any:
    options = dict(case.options)
    if type(options.get("padding_idx")) is int:
        options["padding_idx"] = int(case.ids[options["padding_idx"]])
    return CLASSES[case.module][0](table, **options)


def theirs(table: Table, case: Case) -> Any:
    """torch's module with the rows of the table, except the padding row, which is 0."""
    made = CLASSES[case.module][1](ROWS, DIM, **case.options)
    rows = torch.from_numpy(table.pull(case.ids))
    if case.module == "Embedding" and case.options.get("padding_idx") is not None:
        rows[case.options["padding_idx"]] = 0
    with torch.no_grad():
        made.weight.copy_(rows)
    return made


def own(case: Case) -> tuple[Any, ...]:
    """The inputs for ours: ids instead of numbers of rows, and weights of its own."""
    first, *rest = case.inputs
    if case.ids is not PLAIN:
        first = torch.from_numpy(case.ids[first.numpy()])
    return first, *(recording(each) for each in rest)


def recording(value: Any) -> Any:
    """``value``; if it is a tensor of floats, a copy that records gradients."""
    if isinstance(value, Tensor) and value.is_floating_point() and not value.is_nested:
        return value.clone().requires_grad_()
    return value


def run(module: Any, inputs: tuple[Any, ...]) -> Tensor:
    """Call a module, and run the backward pass with fixed gradients; return the output."""
    out = module(*inputs)
    flat = out.values() if out.is_nested else out
    shares = torch.from_numpy(np.random.default_rng(0).integers(-8, 9, flat.shape) / 4).float()
    flat.backward(shares)
    return out


def check_alike(table: Table, case: Case, sent: list[Any]) -> None:
    module, inputs = ours(table, case), own(case)
    reference = theirs(table, case)
    given = tuple(recording(each) for each in (case.theirs or case.inputs))
    del sent[:]
    out, expected = run(module, inputs), run(reference, given)
    equal(out, expected)
    pulled = {int(key) for message in sent for pull in message.pulls for key in pull.keys}
    del sent[:]
    module.step()
    pushed = {}
    for push in (push for message in sent for push in message.pushes):
        rows = push.gradients.reshape(-1, DIM)
        pushed |= dict(zip(push.keys.tolist(), rows, strict=True))
    assert set(pushed) == pulled
    gradients = reference.weight.grad.to_dense().float().numpy()
    for row, key in enumerate(case.ids.tolist()):
        mine = pushed.pop(key % 2**64, np.zeros(DIM, np.float32))
        assert_allclose(mine, gradients[row], rtol=TOLERANCE, atol=TOLERANCE)
        if row == case.options.get("padding_idx"):
            assert key % 2**64 not in pulled
    assert pushed == {}
    if len(inputs) > 2 and isinstance(inputs[2], Tensor) and not inputs[2].is_nested:
        check_weights(inputs[2], given[2])
    with torch.no_grad():
        group = EmbeddingGroup(table.client, {"it": module})
        equal(group({"it": inputs})["it"], module(*inputs))


def check_weights(weights: Tensor, theirs: Tensor) -> None:
    """Require equal gradients of the weights; those of keys after all bags must be 0."""
    assert weights.grad is not None
    assert theirs.grad is not None
    mine, other = weights.grad.reshape(-1).float(), theirs.grad.reshape(-1).float()
    assert_allclose(mine[: len(other)], other, rtol=TOLERANCE, atol=TOLERANCE)
    assert not mine[len(other) :].any()


def equal(out: Tensor, expected: Tensor) -> None:
    """Require equal numbers, dtypes and shapes."""
    assert out.is_nested == expected.is_nested
    if out.is_nested:
        assert torch.equal(out.offsets(), expected.offsets())
        out, expected = out.values(), expected.values()
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    mine, other = (each.detach().float().numpy() for each in (out, expected))
    tolerance = max(TOLERANCE, 4 * torch.finfo(out.dtype).eps)  # each sum is rounded several times
    assert_allclose(mine, other, rtol=tolerance, atol=tolerance)


def check_refused(table: Table, case: Case, sent: list[Any]) -> None:
    """Require that ours refuses in every way to call it, and that no message is sent."""
    del sent[:]
    calls: list[Callable[[Any], object]] = [
        lambda module: module(*case.inputs),
        lambda module: module.prefetch(*case.inputs),
        lambda module: EmbeddingGroup(table.client, {"it": module})({"it": case.inputs}),
    ]
    for call in calls:
        with pytest.raises((InvalidArgument, TypeError), match=case.says):
            call(ours(table, case))
    assert sent == []


@pytest.mark.quick(70)
@pytest.mark.parametrize("case", CASES, ids=[f"{c.fate}: {c.module}: {c.name}" for c in CASES])
def test_case(table: Table, messages: list[Any], case: Case) -> None:
    if case.fate in (ALIKE, DOCUMENTED, WIDER):
        check_alike(table, case, messages)
    else:
        check_refused(table, case, messages)
    if case.foreign:
        return
    if case.fate in (BOTH, WIDER):
        with pytest.raises(Exception):  # noqa: B017, PT011  (torch raises many classes)
            run(theirs(table, case), case.inputs)
    elif case.fate == STRICTER:
        run(theirs(table, case), case.inputs)
