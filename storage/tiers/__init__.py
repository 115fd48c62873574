"""Storage for rows. An index maps a key to tier and place; a tier knows only places.

base.py   the contract of a tier
host.py   rows in host memory
"""
