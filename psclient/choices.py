"""Strings that arguments accept (modes, dtypes, durabilities), and their numbers in ps.proto."""

from __future__ import annotations

from typing import Literal

from psproto import ps_pb2 as pb

Mode = Literal["train", "serve"]
Wire = Literal["float32", "bfloat16", "float16"]
Transport = Literal["stream", "unary"]
Lane = Literal["auto", "never", "require"]
Durability = Literal["applied", "log", "fsync"]

WIRES: dict[str, int] = {
    "float32": pb.DTYPE_FLOAT32,
    "bfloat16": pb.DTYPE_BFLOAT16,
    "float16": pb.DTYPE_FLOAT16,
}
LARGEST: dict[int, float | None] = {  # by dtype, its largest finite number; None: no smaller limit
    pb.DTYPE_FLOAT32: None,
    pb.DTYPE_BFLOAT16: float.fromhex("0x1.fep127"),
    pb.DTYPE_FLOAT16: 65504.0,
}
DURABILITIES: dict[str, int] = {
    "applied": pb.DURABILITY_APPLIED,
    "log": pb.DURABILITY_LOG,
    "fsync": pb.DURABILITY_FSYNC,
}
MODES: dict[str, int] = {"train": pb.MODE_TRAIN, "serve": pb.MODE_SERVE}
