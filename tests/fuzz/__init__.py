"""Fuzzing of all decoders that the network reaches.

targets.py   one function per decoder; it raises nothing if the decoder keeps its promise
methods.py   a server in this process, whose gRPC methods are called with any bytes
seeds/       inputs that reach new code, one per line, as hexadecimal

``make fuzz`` runs each target for 10 minutes with atheris, which is guided by coverage, and adds
the inputs that it finds to the seeds. The quick tests run all seeds, and some mutations of them.
"""
