"""The commands of psctl, in groups; importing a module adds its commands to psctl.

shell.py         options, connection and error handling of all commands
cluster.py       psctl status, tail
tables.py        psctl tables, table, create, drop, evict
alter.py         psctl alter
checkpoints.py   psctl checkpoint, checkpoints, verify, restore, delete, prune
rows.py          psctl export, import
analyses.py      psctl analyze, inspect
"""
