"""The server of one shard: its rows in memory and on disk, its log, and the gRPC services.

A shard is the part of every table that one server stores. The modules, from the lowest layer up:

errors.py        exceptions with which a request is refused
addresses.py     hosts and ports to listen on
unusable.py      the error of a setting that cannot be used
status.py        convert errors to gRPC statuses
loops.py         calls from other threads to an event loop
pool.py          thread pool whose threads do not block the exit of the process
security/verbs.py       the verbs of a policy, and the rights that each gRPC method needs
security/budgets.py     limit the requests and bytes of one principal
security/policy.py      read a policy: principals, their credentials, rights and budgets
security/audit.py       write a line for each change and each refused attempt
security/policyfile.py  read the policy file again when it changes
security/httptoken.py   protect the HTTP port with a token
security/pem.py          read certificates and private keys in the format PEM
security/guard.py       find out who calls, and refuse what the policy does not allow
memory.py        find the memory limit of the process, and divide it among its uses
flaghelp.py      format the text of `psserver serve --help`
tablesettings.py  settings of single tables
shardsettings.py  settings of a shard, without those of security
config.py        settings of a server
settings.py      write a TOML file that lists all settings
schemas.py       table schemas as messages and as JSON
alterations.py   which settings of a live table can be altered
sessions.py      records of applied pushes, so that a retry is not applied twice
requests.py      requests to a shard as Python objects
tombstones.py    records of deleted keys
tombstonequeue.py  the newest of them, within a limit
tables.py        the tables of a shard, by name and by number
sequencer.py     number the changes: each gets the next version and a log record
afterimages.py   buffers for the new contents of pushed rows, for the log
views.py         results of reads from a shard
capture.py       access to all data of a shard as of one version
work.py          run one long operation on checkpoints at a time, with progress
cuts.py          capture a shard at the moment at which a barrier is placed
sweeps.py        evict rows on the engine thread, one slice per call
recovery.py      load a shard from its base (rows at one version) and replay its log
fills.py         tables that are hidden while they are filled
pushroom.py      make room in memory for the rows of pushes
blockchecks.py   verify the blocks on disk, on the engine thread
reads.py         the methods of a shard that change nothing
preloads.py      load rows from disk into host memory, on the engine thread
shard.py         one shard's rows of every table, and the changes to them; no networking
gpu.py           open the GPU, and end the process if it fails
busypoll.py      keep an event loop awake for a short time
eventloop.py     the event loop of a server
engine.py        the thread that owns the shard
sweeper.py       evict rows in the background and on demand
packing.py       pack the rows of a shard into blocks, the unit of files on disk
counted.py       write tombstones and admission counters to the base
compaction.py    move the live rows of sparse and small blocks to new blocks
basewriter.py    write the changes of a shard to its base, as one flush
replay.py        recover a shard from its data directory when its server starts
pinned.py        read the rows of the base as of one flush
preloader.py     the thread that loads rows into host memory after a start
timings.py       record durations and failures of an operation
flusher.py       write changed rows to the base in the background
scrubber.py      the thread that verifies the blocks on disk
stored.py        read the contents of a checkpoint for one shard
uses.py          record which checkpoints are being read
catalog.py       list, open and verify checkpoints
calls.py         calls that wait until their client sends Continue
deletion.py      delete checkpoints
slices.py        split whole rows into slices for the engine thread
rowwrites.py     write whole rows, after a flush has made room for them
rows.py          read and write whole rows
loading.py       fill a table from a checkpoint
completion.py    make the parts of all shards one checkpoint
checkpoints.py   write this shard's part of a named checkpoint
swap.py          store the phase of a restore, and swap the live and the restored data
staging.py       write a new base from a checkpoint
restore.py       restore a shard from a checkpoint, in phases
pace.py          run analyses in slices, with pauses
outbox.py        messages with rows of an analysis, and its progress
summaries.py     options and summary of an analysis as messages
inspection.py    report what the shard knows about single keys
analysis.py      summarize the rows of a table
position.py      a subscriber's position in a shard's history, and its token
wanted.py        read the options of a subscription
batches.py       collect changes that a subscriber gets together
deltas.py        encode log records and rows as messages of a subscription
freshness.py     measure when acknowledged pushes reach subscribers
source.py        log, engine and threads that subscriptions share
sender.py        write messages to one subscriber
logtail.py       read the log, and encode it for one subscriber
rowscan.py       send all or changed rows to one subscriber, while pushes continue
subscription.py  serve one subscription, from the log or by a scan of the rows
feed.py          the subscriptions of one shard
recent.py        the last errors with which requests failed
stats.py         count requests, bytes and errors
peers.py         list the connections of the process, with their byte counts
connections.py   close connections whose peers do not finish their messages
warm.py          compile the kernels before they are needed
datadir.py       lock, recover and close a shard's data directory
security/certificates.py  the server's TLS certificates, read again when their files change
doctor.py        check whether the machine and the settings suit a server
phase.py         what a server is doing, from its start to its stop
turns.py         decide when a request may begin, fairly, and refuse it if that is too late
limits.py        admit requests: memory in flight, restore, drain
workers.py       the thread pools of a server
transport.py     gRPC options that limit memory
identity.py      the shard that this server is, and the one that a call is for
door.py          checks that every gRPC method passes first
health.py        the health service
handlers.py      build the gRPC handlers of all kinds of methods
coldruns.py      run exchanges whose rows may be on disk
checks.py        checks of a request that need no tables
exchange.py      pulls, pushes, deletes and exchanges
flow.py          one stream: the client's end, and its requests in flight
queued.py        a request of a stream that waits for its turn
stream.py        the bidirectional stream
regions.py       map the memory that clients of the same-host lane register
laneconnection.py  one connection of the same-host lane: a stream over a Unix socket
lane.py          the same-host lane: its socket, and who may use it
parts.py         the components of a shard whose figures are shown
budgets.py       memory and disk space that have a limit, and their use
livestatus.py    live figures of a shard, for displays
info.py          what GetServerInfo, Diagnose and GetStatus report
service.py       the gRPC methods of all services
metrics/samples.py      make metrics of prometheus_client from counts
metrics/labels.py       give label values to tables, so that the series stay bounded
metrics/reading.py      read many tables without Python's garbage collector
metrics/start.py        metrics of the build and of the phase of the server
metrics/traffic.py      metrics of requests
metrics/tables.py       metrics of tables: tiers, admission, eviction and damage
metrics/engine.py       metrics of the engine
metrics/budgets.py      metrics of memory and disk in use, and of their limits
metrics/log.py          metrics of the version log
metrics/subscribers.py  metrics of subscriptions
metrics/flushes.py      metrics of flushes and checkpoints
metrics/scrub.py        metrics of the search for damage on disk
metrics/lanes.py        metrics of the same-host lane
metrics/connections.py  metrics of connections
metrics/certificates.py  metrics of certificates
metrics/access.py       metrics of the policy, refused callers and the audit log
metrics/registry.py     all metrics of one server
page/document.py  the status page as one HTML file
hostnames.py     the host names that requests over HTTP may have
statusjson.py    live figures as JSON
httppeers.py     fetch the figures of other shards
overview.py      the figures of all shards
webmessages.py   requests and responses of HTTP
site.py          the pages of the HTTP port
exposition.py    serve them, and limit what clients can occupy
acceptor.py      the gRPC server, which no call can stop
listener.py      open the gRPC port, with health and reflection
server.py        open and close the components of one server, in order
logs.py          write log lines to stderr
process.py       run one shard as a process: signals, restart, exit status
member.py        run and restart the process of one shard of a local cluster
cluster.py       run a local cluster: one process per shard
cli.py           the command line
__main__.py      python -m psserver
"""
