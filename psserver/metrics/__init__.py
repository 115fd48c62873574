"""Metrics of a server for Prometheus.

A collector reads counts of the server at each scrape (Prometheus' request for /metrics) and
returns them as metrics. Each file has the metrics of one subject. docs/metrics.md describes every
metric. Keys and clients are never labels, because there are too many of them.

samples.py      convert the server's counts to samples
traffic.py      requests, their keys, bytes, latency and errors
engine.py       the thread that owns the shard
tiers.py        rows, bytes, hits and moves of each kind of memory, by table
admission.py    keys admitted, refused and evicted, by table
budgets.py      memory in use, and its limits
log.py          the version log
subscribers.py  subscriptions to the log
flushes.py      writes of changed rows to disk
scrub.py        damage on disk, and the search for it
lanes.py        the same-host lane
connections.py  connections and their incomplete messages
registry.py     collect all metrics of one server
"""
