"""Embedding tables on parameter servers, for trainers of any framework.

errors.py      errors that psclient raises
checked.py     checks of arguments
strings.py     keys from strings
addresses.py   addresses of servers
choices.py     strings that arguments accept: modes, dtypes on the wire, durability levels
arrays.py      keys and gradients from arrays of any framework
batch.py       distinct keys of a batch, sums of their gradients
pooling.py     rows combined by bags of keys
padding.py     sizes of padded arrays
versions.py    versions of shards, and their epochs
schema.py      schemas of tables
alteration.py  settings of a live table
signals.py     signal handlers, delayed while they could do harm
routes.py      the address of one shard, and the shard expected there
lookup.py      look up all addresses of a DNS name
tls.py         files for TLS
access.py      how to connect: options of gRPC, TLS, token
handshake.py   why TLS permits no connection to a server
channel.py     gRPC channels that survive forks and signals
retry.py       errors of failed calls, pauses between attempts
session.py     one request to one shard, and the sequence numbers of its pushes
discovery.py   find the shards of a cluster behind one DNS name
status.py      ask each shard for its state, even while some are down
places.py      where the shards are: at listed addresses, or behind one name
patience.py    how a connection waits while its shard is overloaded
link.py        connection to one shard: base class of stream.py and unary.py
window.py      how many requests of a stream may be in flight
pipe.py        connections that carry many requests at once, and the one through gRPC
stream.py      connection to one shard through a stream, which is a pipe
regions.py     shared memory of a same-host lane
gpuregions.py  GPU memory of a same-host lane
lanepipe.py    the pipe through a same-host lane
lanelink.py    connection to one shard through its same-host lane, or else through gRPC
unary.py       connection to one shard through unary calls
moved.py       requests sent again to the owners of their keys
fanout.py      unary calls to several shards at once
cluster.py     connections to all shards, and the shard map
gpurows.py     copy pulled rows within GPU memory
outputs.py     arrays of the caller that rows are written to
request.py     pushes and pulls of a request, and the messages that carry them
arguments.py   check the arguments of pulls and pushes
inflight.py    a request in progress: its messages and answers
pending.py     the result of a request that may be in progress
deletes.py     delete rows on every shard
connection.py  base class of the client: addresses, options, connecting and closing
rowclient.py   pull, push, exchange, delete
table.py       one table
hashtable.py   kernels that find, write and remove rows by key
outstanding.py  requests of a Pipeline in progress, oldest first
ticket.py      batches on their way through a Pipeline
schedule.py    which rows a Pipeline requests when
pipeline.py    pull rows ahead and push gradients while a batch is computed
client.py      the client: create, describe, evict and drop tables
identity.py    identity of a rank of a distributed job
aio.py         the client for asyncio
combine.py     rows of several parts combined into one embedding (imported on demand)
parts.py       parts of features over several tables: sizes, checks, hashes
multihash.py   features over several small tables (imported on demand)
mixed.py       features whose embeddings grow with their frequency (imported on demand)
changes.py     one change of rows or of a table, as a subscriber receives it
shardstream.py  receive the changes of one shard
subscriber.py  receive the changes of all shards
copies.py      copy in memory of one table's rows on one shard
replica.py     copies in memory of all tables of one shard
follower.py    copies in memory of tables of all shards, kept up to date
calls.py       unary and streaming calls to all shards, which may take hours
checkpoints.py  take, list and verify checkpoints
pruning.py     delete checkpoints
restores.py    restore a cluster from a checkpoint
rows.py        read and write whole rows of a table
repairs.py     verify live rows on disk, and replace those that cannot be read
admin.py       all functions of the five files above (imported on demand)
together.py    what the processes of one trainer do together
trainerstate.py  the files of a Checkpointer: the dense state, and where the servers stood
behind.py      compare a saved trainer with its servers: how it can come back
writing.py     one checkpoint on a background thread, up to a barrier
checkpointer.py  Checkpointer: save a trainer with its rows (imported on demand)

PyTorch modules (imported on demand):

torch/ranks.py      ranks of torch.distributed: gradients summed by owner, steps checked
frozen.py           a table as a plain module, without servers
torch/gradients.py  how backward passes collect gradients, and how they are pushed
torch/reach.py      base class of modules with rows; zero_grad and requires_grad_ of models reach it
torch/optimizer.py  RowOptimizer, and the base class of modules that push
torch/inputs.py     checks of the arguments of a call: which keys to pull, and bags
torch/feature.py    base classes of the modules, and the pull of a batch
torch/embedding.py  Embedding
torch/bag.py        EmbeddingBag
torch/multihash.py  MultiHashEmbedding
torch/mixed.py      MixedDimensionEmbedding
torch/transfer.py   copies of rows to a GPU, and of gradients back
torch/pipeline.py   batches of a DataLoader with outputs of a group, pulled ahead
torch/group.py      EmbeddingGroup
torch/job.py        JobRanks: the ranks of a job, for a Checkpointer
lightning.py        callback and loader for PyTorch Lightning

TorchRec's collections (imported on demand):

torchrec/tables.py      tables on the servers for the configs of a collection
torchrec/pipeline.py    batches of a loader, whose rows a collection has pulled ahead
torchrec/collection.py  base class of both collections: the keys of a batch, per feature
torchrec/pooled.py      EmbeddingBagCollection
torchrec/sequences.py   EmbeddingCollection

JAX (imported on demand):

jax.py  Feed: rows as inputs of a compiled step; lookup inside jit

Keras models (imported on demand):

keras/clients.py    tables of layers in saved models
keras/layer.py      Embedding
keras/features.py   the features of a model, and the inputs made of them
keras/feed.py       feed: batches with rows, for fit, evaluate and predict
keras/push.py       Push: the callback of fit
keras/saving.py     load_model, export

None of the following is imported by the client:

tools/staged.py                 files that get their final name once they are complete
tools/arrow.py                  helpers for reading and writing Parquet
tools/columns.py                columns of an exported table, for every file format
tools/parquet.py                a table as a Parquet file
tools/spool.py                  columns of an exported table in temporary files
tools/safetensors.py            a table as a safetensors file
tools/numpyfiles.py             a table as files of plain numbers: NumPy, HugeCTR, TFRA
tools/models.py                 a table as a model of PyTorch or TorchRec
tools/onnxfile.py               a table as an ONNX model
tools/locations.py              files by path or by URL
tools/offline.py                read a checkpoint without running servers
tools/export.py                 export a table to one file, or to one file per shard
tools/incoming.py               rows on their way from a file into a table
tools/cells.py                  columns of a Parquet file, checked and converted to arrays
tools/source.py                 read and check the rows of Parquet files
tools/stored.py                 arrays in files, of which any range of rows can be read
tools/arraypiece.py             rows whose fields are arrays
tools/kinds.py                  arrays of NumPy, safetensors, HugeCTR, TFRA, DynamicEmb
tools/csvsource.py              rows of CSV files
tools/inert.py                  read a pickle as data, so that no code of it can run
tools/distributed.py            tensors of PyTorch's distributed checkpoints
tools/torchfiles.py             files of PyTorch and TorchRec
tools/deeprec.py                checkpoints of DeepRec
tools/duplicates.py             count keys that occur several times
tools/journal.py                how far an import got
tools/importer.py               import files into a table
tools/summary.py                summary statistics of a table
tools/misses.py                 how often rows would miss in host memory of any size
tools/analysis.py               compute the summary of a live table, or of one in a checkpoint
tools/sink.py                   write the rows that an analysis read to a Parquet file
tools/history.py                a file with the results of past analyses: how a table grew
tools/keys.py                   where a key's row is, or why it has none
tools/figures.py                numbers and counts of an analysis, formatted as text
tools/resources.py              what psctl doctor finds in live figures
tools/doctor.py                 what is wrong with a cluster, and what to do
tools/rules.py                  rules as typed on the command line: counter:threshold=3
tools/rates.py                  rates of a cluster between two samples
tools/listing.py                aligned columns of text for the terminal
tools/terminal.py               an analysis for the terminal
tools/charts.py                 an analysis as plots
tools/document.py               the frame that all HTML reports share
tools/page.py                   an analysis as an HTML page
tools/bench/plan.py             what a load test sends: mix, keys, tables, clients
tools/bench/arrivals.py         when the requests of an open loop start
tools/bench/draws.py            which keys a request has: Zipf, uniform, recent keys
tools/bench/mixes.py            what a request does: pulls, pushes, training steps
tools/bench/latencies.py        histograms of latencies, merged over processes
tools/bench/worker.py           process that sends requests
tools/bench/result.py           what a run measured
tools/bench/fleet.py            the tables and processes of a load test
tools/bench/knee.py             the highest rate at which a cluster keeps its objective
tools/bench/shards.py           what the shards use during a run
tools/bench/sizing.py           how many shards a rate needs, in words
tools/bench/trial.py            a run, or a sweep that finds the knee
tools/bench/words.py            main figures and sentences about a load test
tools/bench/plots.py            plots as HTML and SVG, without scripts
tools/bench/report.py           a load test as an HTML page
tools/bench/live.py             figures of a run in the terminal, while it runs
tools/topview.py                draw a sample of psctl top
tools/commands/exits.py         exit statuses, and the status for each error
tools/commands/output.py        results and errors as text or as JSON
tools/commands/progress.py      progress bar
tools/commands/shell.py         options, connection and errors of all commands
tools/commands/completion.py    names of tables and checkpoints for the completion of a shell
tools/commands/cluster.py       psctl status, tail
tools/commands/top.py           psctl top
tools/commands/doctor.py        psctl doctor
tools/commands/tables.py        psctl tables, table, create, drop, evict
tools/commands/alter.py         psctl alter
tools/commands/checkpoints.py   psctl checkpoint, checkpoints, restore, delete, prune
tools/commands/repairs.py       psctl verify, repair
tools/commands/rows.py          psctl export, import
tools/commands/analyses.py      psctl analyze, inspect
tools/commands/bench.py         psctl bench
tools/ctl.py                    the command psctl
"""

from psclient.alteration import Alteration
from psclient.batch import Batch
from psclient.changes import Change
from psclient.client import Client
from psclient.errors import PsError
from psclient.follower import Follower
from psclient.identity import rank_identity
from psclient.pending import Pending
from psclient.pipeline import Pipeline
from psclient.schema import TableInfo
from psclient.status import ShardStatus
from psclient.strings import hash_keys
from psclient.subscriber import Subscriber
from psclient.table import PulledRows, Table
from psclient.tls import Tls
from psclient.versions import Versions

__all__ = [
    "Alteration",
    "Batch",
    "Change",
    "Client",
    "Follower",
    "Pending",
    "Pipeline",
    "PsError",
    "PulledRows",
    "ShardStatus",
    "Subscriber",
    "Table",
    "TableInfo",
    "Tls",
    "Versions",
    "hash_keys",
    "rank_identity",
]
