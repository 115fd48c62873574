"""The protocol of client and server: messages, their encoding, and the routing of keys to shards.

ps.proto        messages and services; its comments specify their behavior
cpu.py          check that the processor can run the compiled kernels
kernelcache.py  cache of kernels that Numba compiled
names.py        rules for names of tables, barriers, checkpoints
certfiles.py    read files that belong together while they change
keepalive.py    gRPC options of clients and servers for pings on quiet connections
routing.py      key hash, buckets, shard map, and the kernels that split and join batches
dtypes.py       number types in messages
messages.py     Python classes for the messages that carry arrays
fields.py       splits a message into fields, with a limit on their number
encoding.py     converts messages to bytes
decoding.py     converts bytes to messages
codec.py        re-exports the five modules above
lanes.py        messages of the same-host lane, whose arrays are in shared memory
cudaipc.py      GPU memory that two processes share
"""

from psproto import kernelcache

RELEASE = "0.3.0"

kernelcache.install()  # before any module with kernels is imported
