#!/bin/sh
# The committed generated code is what ps.proto generates.
set -eu
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
.venv-proto/bin/python -m grpc_tools.protoc -I proto --python_out="$out" --pyi_out="$out" \
    --grpc_python_out="$out" psproto/ps.proto
for file in ps_pb2.py ps_pb2.pyi ps_pb2_grpc.py; do
    diff -u "proto/psproto/$file" "$out/psproto/$file" || {
        echo "proto/psproto/$file is stale: run make proto" >&2
        exit 1
    }
done
