"""The commands of psctl, in groups; importing a module adds its commands to psctl.

exits.py         exit statuses, and the status for each error
output.py        results and errors as text or as JSON
progress.py      progress bar
shell.py         options, connection and errors of all commands
completion.py    names of tables and checkpoints for the completion of a shell
cluster.py       psctl status, tail
top.py           psctl top
doctor.py        psctl doctor
tables.py        psctl tables, table, create, drop, evict
alter.py         psctl alter
checkpoints.py   psctl checkpoint, checkpoints, restore, delete, prune
repairs.py       psctl verify, repair
rows.py          psctl export, import
analyses.py      psctl analyze, inspect
bench.py         psctl bench
"""
