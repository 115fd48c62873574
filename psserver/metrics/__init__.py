"""Metrics of a server for Prometheus.

A collector reads counts of the server at each scrape (Prometheus' request for /metrics) and
returns them as metrics. Each file has the metrics of one subject. docs/metrics.md describes every
metric. Keys and clients are never labels, because there are too many of them.

samples.py      make metrics of prometheus_client from counts
labels.py       give label values to tables, so that the series stay bounded
reading.py      read many tables without Python's garbage collector
start.py        the build, and the phase of the server
traffic.py      requests: latency, size, keys, bytes and errors
tables.py       tiers, admission, eviction and damage, by table
engine.py       the thread that owns the shard
budgets.py      memory and disk in use, their limits, and what is left
log.py          the version log
subscribers.py  subscriptions to the log
flushes.py      flushes, and checkpoints
scrub.py        the search for damage on disk
lanes.py        the same-host lane
connections.py  connections and their incomplete messages
certificates.py  when certificates expire
access.py       the policy, refused callers and the audit log
registry.py     all metrics of one server
"""
