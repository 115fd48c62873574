"""The commands of psctl, in groups; importing a module adds its commands to psctl.

shell.py         options, connection and error handling of all commands
cluster.py       psctl status, tail
doctor.py        psctl doctor
tables.py        psctl tables, table, create, drop, evict
alter.py         psctl alter
checkpoints.py   psctl checkpoint, checkpoints, restore, delete, prune
repairs.py       psctl verify, repair
rows.py          psctl export, import
analyses.py      psctl analyze, inspect
"""
