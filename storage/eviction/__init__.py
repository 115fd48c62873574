"""Which rows leave a table.

timeline.py   which versions are older than a TTL
contract.py   what a rule is, and what it looks at
rules.py      the rules of a table's schema
selection.py  the rows of the lowest scores, found by slices
sweep.py      one pass of rules over the rows
evictor.py    the eviction of one table: when to sweep
"""
