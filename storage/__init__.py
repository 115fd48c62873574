"""Storage of one shard: the rows of its tables, the log of their changes, and checkpoints.

Nothing here knows about RPC. The time comes only from the clocks that callers pass in. In reading
order:

errors.py        what can go wrong
kernels.py       the loops numpy cannot express
registry.py      build objects by name
arena.py         memory that grows in chunks, without copying
slots.py         slots of a tier that pushes can write: key, metadata, home of each row
owners.py        which slots own the rows of a slab
index.py         key -> location of its row
normal.py        the inverse of the normal CDF
initializers.py  the initial embedding of a row
formula.py       formulas of optimizers, written once for the CPU and for a GPU
optimizer.py     the contract of an optimizer
sgd.py           SGD and momentum
adagrad.py       Adagrad, row-wise Adagrad, AdagradDecay
adam.py          Adam, AdamW, AdamAsync
ftrl.py          FTRL and group FTRL
optimizers.py    all optimizers by name
gpu/source.py    the CUDA C of all kernels
gpu/nvrtc.py     compile CUDA C for a GPU
gpu/device.py    the contract of a device, which runs kernels on its own memory
gpu/cuda.py      the device that CuPy gives: an NVIDIA GPU
threads.py       background threads that the system shows by name
histogram.py     measurements, counted in buckets
disk.py          system calls that write; names and files that survive a power failure
segment.py       one file of the version log, made of frames
tail.py          the end of a segment: torn tail or damage
records.py       the record in a frame: one change of the shard
admission/gates.py    gates, which decide which keys get a row
admission/counter.py  exact counters of the keys without a row
admission/sketch.py   approximate counters: a counting Bloom filter
admission/rules.py    the admission rules of a table's schema
eviction/timeline.py   which versions are older than a TTL
eviction/contract.py   the contract of an eviction rule
eviction/rules.py      the eviction rules of a table's schema
eviction/passes.py     one pass over all rows of a table, in memory and on disk
eviction/selection.py  find the rows with the lowest scores, one slice per call
eviction/sweep.py      one pass of eviction rules over the rows of a table
eviction/evictor.py    the eviction of one table: when to sweep
schema.py        the schema of a table
history.py       epochs: which versions belong to the history of a log
marks.py         the newest version that is known to be on disk
logfiles.py      the version log's files
cursor.py        a reader of the version log
logprogress.py   which versions of the log are written and synced, and who waits
versionlog.py    the version log: appended, synced, read, truncated
sums.py          sums of the pieces of a block
block.py         many rows, or tombstones, as one run of bytes
damage.py        which rows of a damaged block can still be read
directory.py     which rows of the blocks of the base are current
basestate.py     which blocks of the base are live
pages.py         check LMDB's pages before LMDB follows them
holes.py         give the disk space of free pages of an LMDB file back
emptybase.py     create the LMDB file of a new base, and begin to read one
base.py          the base: an on-disk copy of all rows at one log version
deadline.py      blocking calls with a deadline
store.py         files under a URL
sealed.py        small JSON files with a checksum
manifest.py      the fields of a checkpoint's manifests
checkpoint.py    the files of a checkpoint, and its parents
part_writer.py   write one shard's part of a checkpoint
part_reader.py   read one shard's part of a checkpoint
blockfile.py     a memory map of the base's file, from which rows are read in place
extents.py       the blocks of a table: where they are, bits of their rows
inplace.py       read rows and metadata of blocks from the map
residency.py     which pages of blocks are in memory
blockscan.py     read blocks on other threads than the engine's
blockcheck.py    verify whole blocks on another thread than the engine's
tiers/base.py    the contract of a tier, which stores rows by place
tiers/host.py    rows in host memory
gpu/staging.py   a queue, and the page-locked memory through which batches reach its kernels
gpu/slab.py      rows in device memory, in pieces that never move
gpu/gpu.py       the GPU of a shard: device, budget, page-locked memory
tiers/places.py  where the rows of an HbmTier are: in host memory, or in GPU memory
tiers/hbm.py     rows in GPU memory and in host memory
tiers/lmdb.py    rows in the blocks of the base
coldrows.py      the rows in blocks, for eviction sweeps
results.py       the results of a table's methods
tierstats.py     the tiers of a table as statistics and tools show them
visits.py        which rows a scan has read, although rows move
tablescan.py     read all rows of a table in slices
reuse.py         how many keys are pushed between the uses of a row
cache.py         which rows leave host memory, if there are blocks on disk
balance.py       which rows of a table are in GPU memory
room.py          how many rows of a table have room in host memory
rescue.py        what a table does when a block is found to be damaged
rowstore.py      the rows of one table by key, in every tier
overwrite.py     overwrite whole rows without reading them
overflow.py      which pushes may leave infinity or NaN in a row
table.py         the part of a table that one shard stores
gpupull.py       pull rows of a table into GPU memory
analysis.py      histograms, extremes and sums over the rows of a table
"""
