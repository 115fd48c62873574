"""A shard behind gRPC.

errors.py    why a request is refused
config.py    how a server is set up
sessions.py  which pushes were applied
shard.py     one shard's part of every table, without a network
engine.py    the thread that owns the shard
metrics.py   what a shard tells Prometheus
schemas.py   table schemas as messages
service.py   the gRPC methods
warm.py      kernels compiled before they are needed
server.py    one shard as a process
cluster.py   a local cluster
cli.py       the command line
__main__.py  python -m psserver
"""
