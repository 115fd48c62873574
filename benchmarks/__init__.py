"""Benchmarks of the service. Each compares its results with a limit measured in the same run.

report.py       times contenders, prints tables of results, writes JSON
servers.py      runs shards and bare echo servers as processes
followers.py    processes that follow a table, and when versions are on disk
work.py         the standard work: a table, and batches of keys and gradients drawn from it
disk.py         the file cache, and random reads of the disk
rowstores.py    stores of rows on disk: LMDB with a row per key, RocksDB
coldtable.py    a table whose rows are in blocks on disk, without a server
peers/          other systems that do the standard work
kernels.py      index, gather and optimizer steps, against C++ and the machine
flood.py        sends requests at a given rate, whether or not the server keeps up
overload.py     three times the requests that a shard can serve
wire.py         pull and push, against a bare gRPC echo server
step.py         the standard work through the client, against the peers
scale.py        shards, clients, table sizes, memory, start-up
durability.py   pushes at each level of durability
freshness.py    latency and cost of followers (processes that mirror a table)
checkpoint.py   cost of checkpoints, speed of restore and replay
eviction.py     cost of eviction in the background
analyze.py      cost of an analysis
tierservice.py  pulls and training steps of tables that are larger than memory
threads.py      processor time of a server, by thread
tierbudget.py   memory and disk of a server with more rows than fit into memory
tierlatency.py  pulls of rows in memory while the server uses the disk
tiers.py        tables that are larger than memory: all of the above, and other stores
restart.py      time from the start of a shard until it serves
metrics.py      cost of counting for the metrics, and of a scrape
models.py       exported models, and imports of files
"""
