"""What the service costs, each figure beside the limit measured in the same run.

report.py   medians, tables, JSON
servers.py  shards and bare echo servers as processes
work.py     the standard work
peers/      other systems doing it
kernels.py  index, gather, optimizer steps against C++ and the machine
wire.py     pull and push against a bare grpcio echo
step.py     the standard work through the client, against the peers
scale.py    shards, clients, table sizes, memory, start
"""
