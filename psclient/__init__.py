"""Embedding tables on parameter servers, for trainers of any framework.

errors.py    what can go wrong
strings.py   keys from strings
batch.py     distinct keys, sums of gradients, pooling
fork.py      gRPC channels of a process that forks
channels.py  one shard: a stream, retries
client.py    all shards: tables, pull, push, exchange
aio.py       the same for asyncio
torch.py     PyTorch modules (imported on demand)
"""

from psclient.batch import Batch
from psclient.client import Client, Pending, PulledRows, Table, TableInfo
from psclient.errors import PsError
from psclient.strings import hash_keys

__all__ = ["Batch", "Client", "Pending", "PsError", "PulledRows", "Table", "TableInfo", "hash_keys"]
