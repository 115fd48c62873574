"""Where rows lie. An index knows the tier and place of a key; a tier knows only places.

base.py   the contract of a tier
host.py   rows in host memory
"""
