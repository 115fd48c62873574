"""Tiers: the kinds of storage for rows. A place is the position of a row in its tier.

base.py    the contract of a tier
host.py    rows in host memory
places.py  where the rows of hbm.py are
hbm.py     rows in GPU memory, with others in host memory
lmdb.py    rows in the blocks of the base
"""
