"""A shard behind gRPC.

errors.py        why a request is refused
addresses.py     hosts and ports to listen on
memory.py        find the memory limit of the process, and divide it
config.py        settings of a server
schemas.py       table schemas as messages and as JSON
alterations.py   which settings of a live table can be altered
sessions.py      which pushes were applied
requests.py      what a shard is asked to do
tombstones.py    keys that were deleted
tables.py        the tables of a shard, by name and by number
sequencer.py     versions: each change gets the next one
afterimages.py   buffers for the rows that a push left
views.py         what readers of a shard get
sweeps.py        eviction on the engine thread, one slice at a time
recovery.py      a shard brought back from its base and its log
fills.py         tables that are hidden while they are filled
reads.py         what can be read of a shard
shard.py         one shard's part of every table, without a network
loops.py         calls handed to an event loop by other threads
engine.py        the thread that owns the shard
sweeper.py       eviction in the background and on demand
replay.py        a shard brought back from its data directory
packing.py       rows of a shard packed into blocks
flusher.py       dirty rows written to the base
work.py          long work: one piece at a time, with its progress
stored.py        what a checkpoint contains for a shard
uses.py          which checkpoints are in use
catalog.py       list, open and verify checkpoints
calls.py         calls that wait until their client lets them go on
deletion.py      delete checkpoints
slices.py        whole rows in portions for the engine
rows.py          whole rows in and out
loading.py       fill a table from a checkpoint
checkpoints.py   take named checkpoints of this shard
swap.py          how far a restore is, and the directories that it moves
staging.py       a base made of a checkpoint
restore.py       replace a shard's state by a checkpoint's
pace.py          turns for slow readers on the engine
summaries.py     summaries of tables as messages
inspection.py    what is known of single keys
analysis.py      what a table holds
position.py      a subscriber's position in a shard's history, and its token
wanted.py        what a subscriber asked for
deltas.py        records and rows as messages of a subscription
source.py        log, engine and threads that subscriptions share
sender.py        one subscriber's stream
logtail.py       messages of a subscription made of the log
rowscan.py       snapshots and catch-ups: rows sent while pushes go on
subscription.py  one subscription: the log, or a scan where the log does not reach back
feed.py          the subscriptions of one shard
stats.py         count requests, bytes and errors
connections.py   connections whose peers do not finish their messages
info.py          what a shard reports about itself
status.py        the status with which an error reaches a client
limits.py        admission of requests
workers.py       threads for what blocks
transport.py     what gRPC may hold before the service sees it
door.py          the way to all methods
health.py        the health service
handlers.py      gRPC method handlers, the same for every method
checks.py        what a request can get wrong by itself
exchange.py      pulls, pushes, deletes and exchanges
stream.py        the bidirectional stream
service.py       the gRPC methods of all services
datadir.py       lock, recover and close a shard's data directory
metrics.py       collect the metrics of a shard
exposition.py    serve /metrics over HTTP
listener.py      open the gRPC port, with health and reflection
server.py        open and close the parts of one shard, in order
warm.py          compile the kernels before they are needed
logs.py          write log lines to stderr
process.py       run one shard as a process: signals, restart, exit status
cluster.py       run a local cluster: one process per shard
cli.py           the command line
__main__.py      python -m psserver
"""
