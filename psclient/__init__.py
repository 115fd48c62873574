"""Embedding tables on parameter servers, for trainers of any framework.

errors.py      what can go wrong
checked.py     values of arguments
strings.py     keys from strings
batch.py       distinct keys, sums of gradients, pooling
fork.py        gRPC channels of a process that forks
channels.py    one shard: a stream, retries
moved.py       a request sent again where its keys are
client.py      all shards: tables, pull, push, exchange
aio.py         the same for asyncio
combine.py     how rows of several parts become one embedding (imported on demand)
multihash.py   features over several tables, a row of each for a key (imported on demand)
mixed.py       features whose embeddings grow with their frequency (imported on demand)
subscriber.py  every change, in order
follower.py    a copy of tables in memory that follows the cluster
torch.py       PyTorch modules (imported on demand)
admin.py       checkpoints, whole rows (imported on demand)
export.py      tables as files of other programs (imported on demand)
analysis.py    what a table holds, and what is known of a key (imported on demand)
report.py      an analysis for the eye: a page, lines of a terminal (imported on demand)
ctl.py         the command psctl (imported on demand)
"""

from psclient.batch import Batch
from psclient.client import Client, Pending, PulledRows, Table, TableInfo
from psclient.errors import PsError
from psclient.follower import Follower
from psclient.strings import hash_keys
from psclient.subscriber import Change, Subscriber

__all__ = [
    "Batch",
    "Change",
    "Client",
    "Follower",
    "Pending",
    "PsError",
    "PulledRows",
    "Subscriber",
    "Table",
    "TableInfo",
    "hash_keys",
]
