"""Admission: which keys get a row.

gates.py    the contract of a gate, and gates without counters
counter.py  a gate with exact counters
sketch.py   a gate with a counting Bloom filter
rules.py    the admission rules of a table's schema
"""
