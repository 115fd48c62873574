"""Measurements of the service. Each figure is next to the limit measured in the same run.

report.py      medians, tables, JSON
servers.py     shards and bare echo servers as processes
work.py        the standard work
peers/         other systems that do the standard work
kernels.py     index, gather and optimizer steps, against C++ and the machine
wire.py        pull and push, against a bare grpcio echo
step.py        the standard work through the client, against the peers
scale.py       shards, clients, table sizes, memory, start-up
durability.py  pushes at each level of durability
freshness.py   latency and cost of followers
checkpoint.py  cost of checkpoints, speed of restore and replay
eviction.py    cost of eviction in the background
analyze.py     cost of an analysis
"""
