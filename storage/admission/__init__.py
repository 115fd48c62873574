"""Which keys may have a row.

gates.py    the counters of one table: the contract, and gates that keep none
counter.py  exact counters
sketch.py   a counting Bloom filter
rules.py    the rules of a table's schema
"""
