"""Eviction: which rows are removed from a table because they are stale, small or too many.

timeline.py   the versions that are older than a TTL
contract.py   the contract of an eviction rule
rules.py      the eviction rules of a table's schema
passes.py     one pass over all rows of a table, in memory and on disk
selection.py  choose the rows with the lowest scores, one slice per call
sweep.py      one pass of rules over the rows of a table
evictor.py    the eviction of one table: when to sweep, and the table's step
"""
