"""Everything that client and server must agree on, bit for bit.

ps.proto        messages and services; its comments are normative
kernelcache.py  cache of compiled kernels
names.py        the rule for names of tables, barriers, checkpoints
keepalive.py    pings on quiet connections: gRPC options of both sides
routing.py      key hash, buckets, shard map, and the kernels that split and join batches
dtypes.py       numbers on the wire
messages.py     the messages that carry arrays
fields.py       the fields of a message, within a budget
encoding.py     messages to bytes
decoding.py     bytes to messages
codec.py        all of that under one name
"""

from psproto import kernelcache

RELEASE = "0.2.0"

kernelcache.install()  # before any module with kernels is imported
