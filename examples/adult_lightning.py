"""Train the network of adult.py with PyTorch Lightning, with rows that are pulled ahead.

    python examples/adult_lightning.py DIRECTORY [--staleness 1] [--epochs 8]

adult.py explains DIRECTORY, the columns and the two tables. Lightning's own loop and optimizer
train the dense layers; PsCallback pulls and pushes the rows.
"""

from typing import Any

import adult
import adult_torch
import numpy as np
import torch
from cluster import require_empty, servers
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from psclient import Client
from psclient.lightning import PsCallback
from psclient.torch import Embedding, EmbeddingBag, EmbeddingGroup


class Network(LightningModule):  # type: ignore[misc]
    """The dense part of the network."""

    def __init__(self, samples: adult.Samples) -> None:
        super().__init__()
        self.net = adult.WideDeep(samples.deep.shape[1], samples.numbers.shape[1])
        self.loss_of = nn.BCEWithLogitsLoss()

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        people, outputs = batch  # samples, and {feature: output} of the group
        logits = self.net(outputs, torch.from_numpy(people.numbers))
        loss: torch.Tensor = self.loss_of(logits, torch.from_numpy(people.labels))
        return loss

    def transfer_batch_to_device(self, batch: Any, device: torch.device, number: int) -> Any:
        return batch  # samples are arrays, which stay in host memory

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=adult.DENSE_LR)


def main() -> None:
    given = adult_torch.parse_arguments()
    torch.set_num_threads(1)  # the layers are small; other cores run the servers
    samples, held = adult.load(given.directory, validate=False)
    seed_everything(given.seed)
    with servers(given.servers, given.shards) as addresses, Client(addresses) as ps:
        wide, deep = adult.make_tables(ps, given.seed)
        require_empty(ps, wide.name, deep.name)
        group = EmbeddingGroup(ps, {"wide": EmbeddingBag(wide, "sum"), "deep": Embedding(deep)})
        rows = PsCallback(group, adult.Samples.keys, staleness=given.staleness)
        loader: Any = DataLoader(
            range(len(samples)),  # type: ignore[arg-type]
            batch_size=adult.BATCH,
            shuffle=True,
            drop_last=True,
            collate_fn=lambda chosen: samples.take(np.array(chosen)),
        )
        network = Network(samples)
        trainer = Trainer(
            max_epochs=given.epochs,
            callbacks=[rows],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
        )
        trainer.fit(network, rows.loader(loader))
        print(f"AUC {adult_torch.score(group, network.net.eval(), held):.4f}")


if __name__ == "__main__":
    main()
