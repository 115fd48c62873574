"""The commands of psctl, in groups.

shell.py         options, connection and error handling of all commands
cluster.py       psctl status, tail
tables.py        psctl tables, table, create, drop, evict
alter.py         psctl alter
checkpoints.py   psctl checkpoint, checkpoints, verify, restore, delete, prune
rows.py          psctl export, import
analyses.py      psctl analyze, inspect
"""
