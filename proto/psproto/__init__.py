"""What client and server agree on, bit for bit.

ps.proto     messages and services; its comments are normative
routing.py   key hash, buckets, shard map, and the kernels that split and join batches
codec.py     arrays <-> messages
"""

RELEASE = "0.1.0"
