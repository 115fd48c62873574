"""Rows by key, in tiers. No RPC, no clock that it was not given.

errors.py        what can go wrong
kernels.py       the loops numpy cannot express
arena.py         memory that grows by chunks and never moves
index.py         key -> location
initializers.py  what a row starts from
optimizers.py    in-place steps over rows of a slab
schema.py        what a table is
tiers/base.py    the contract of a tier
tiers/host.py    rows in host memory
table.py         a table's part on one shard
"""
