"""TorchRec is installed with kernels for the CPU."""

from __future__ import annotations

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def test_torchrec_has_its_kernels() -> None:
    bags = KeyedJaggedTensor.from_lengths_sync(
        keys=["user", "item"],
        values=torch.tensor([7, 8, 9]),
        lengths=torch.tensor([1, 0, 0, 2]),  # of two samples, by feature
    )
    swapped = bags.permute([1, 0])  # by a kernel of fbgemm
    assert swapped.keys() == ["item", "user"]
    assert swapped.values().tolist() == [8, 9, 7]
