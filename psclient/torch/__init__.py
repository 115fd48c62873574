"""PyTorch modules whose rows are stored on the servers.

    group = EmbeddingGroup(client, {"user": EmbeddingBag(users), "item": Embedding(items)})
    out = group({"user": user_keys, "item": item_keys})   # one round trip
    loss(out).backward()
    group.step(step)                                      # one round trip

A forward pass pulls one row for each distinct key into a leaf tensor. Autograd sums the gradients
of equal keys in this tensor, and ``step`` pushes them to the servers, whose optimizer applies them.
``zero_grad`` discards them instead. ``group.optimizer(lr)`` returns a torch.optim.Optimizer, which
GradScaler, gradient clipping and schedulers need.

The modules have no parameters, and their ``state_dict`` contains no rows. Modules of a group may
share a table. MultiHashEmbedding and MixedDimensionEmbedding combine rows of several tables.

In ``eval()`` mode, keys without a row get the table's serving_default. Pickling a module keeps its
client's addresses and options; the unpickled module opens its own connections. A deep copy shares
the client. Neither includes gradients that were not pushed. docs/trainers.md explains more.

ranks.py      ranks of torch.distributed: gradients summed by owner, steps checked
gradients.py  how backward passes collect gradients, and how they are pushed
reach.py      base class of modules with rows; zero_grad and requires_grad_ of models reach it
optimizer.py  RowOptimizer, and the base class of modules that push
feature.py    base classes of the modules, and the pull of a batch
inputs.py     checks of the arguments of a call: which keys to pull, and bags
embedding.py  Embedding
bag.py        EmbeddingBag
multihash.py  MultiHashEmbedding
mixed.py      MixedDimensionEmbedding
transfer.py   copies of rows to a GPU, and of gradients back
pipeline.py   batches of a DataLoader with outputs of a group, pulled ahead
group.py      EmbeddingGroup
job.py        JobRanks: the ranks of a job, for a Checkpointer
"""

from psclient.torch.bag import EmbeddingBag
from psclient.torch.embedding import Embedding
from psclient.torch.group import EmbeddingGroup
from psclient.torch.job import JobRanks
from psclient.torch.mixed import MixedDimensionEmbedding
from psclient.torch.multihash import COMBINE, MultiHashEmbedding
from psclient.torch.optimizer import RowOptimizer

__all__ = [
    "COMBINE",
    "Embedding",
    "EmbeddingBag",
    "EmbeddingGroup",
    "JobRanks",
    "MixedDimensionEmbedding",
    "MultiHashEmbedding",
    "RowOptimizer",
]
