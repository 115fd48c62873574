"""TorchRec's collections of embeddings, with rows on the servers: a DLRM changes one import.

    from psclient.torchrec import EmbeddingBagCollection      # instead of torchrec's

    ebc = EmbeddingBagCollection(client, configs, optimizer="rowwise_adagrad", lr=0.05)
    model = DLRM(embedding_bag_collection=ebc, dense_in_features=13, ...)
    rows = ebc.optimizer()                                    # a torch.optim.Optimizer

Needs the package torchrec, of which only the classes of configs and batches are used.

tables.py      tables on the servers for the configs of a collection, and their initial embeddings
pipeline.py    batches of a loader, whose rows a collection has pulled ahead
collection.py  base class of both collections: the keys of a KeyedJaggedTensor, per feature
pooled.py      EmbeddingBagCollection
sequences.py   EmbeddingCollection
"""

from psclient.torchrec.pooled import EmbeddingBagCollection
from psclient.torchrec.sequences import EmbeddingCollection

__all__ = ["EmbeddingBagCollection", "EmbeddingCollection"]
