"""Write a table as an ONNX model: keys in, embeddings out, without servers. Needs onnx.

    DIR/model.onnx   input "keys" int64[batch, size], output "embeddings" float32[batch, dim]; with
                     the mode "none" float32[batch, size, dim]
    DIR/weight.bin   the rows, which the model maps: the last one is that of all other keys
    DIR/keys.npy     int64[n] sorted; only if the table has more than ENCODED keys. The input is
                     then "rows": the index of each key in keys.npy, or n

Keys become row numbers by the operator LabelEncoder of ai.onnx.ml, which keeps a hash table of all
keys in memory: in ONNX Runtime about 60 bytes per key, besides the rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.errors import InvalidArgument
from psclient.tools.arrow import SCHEMA, schema_text
from psclient.tools.columns import OnProgress, Part
from psclient.tools.spool import Spool

ENCODED = 100_000_000  # maximum number of keys in model.onnx, a file of at most 2 GiB
MODES = {"sum": "ReduceSum", "mean": "ReduceMean", "max": "ReduceMax"}


def write_onnx(part: Part, progress: OnProgress) -> int:
    """Write the rows of ``part`` as an ONNX model into a directory; return their number.

    The option "mode" says how the rows of a line of keys are combined: sum (default), mean, max, or
    none.
    """
    onnx = _onnx()
    mode = str(part.options.get("mode") or "sum")
    if mode not in (*MODES, "none"):
        raise InvalidArgument(f"'mode' must be one of {', '.join(MODES)}, none, got {mode!r}")
    with Spool(part) as spool:
        spool.fill(progress)
        keys, order = spool.ordered()
        with (part.path / "weight.bin").open("wb") as out:
            for some in spool.sorted_rows(order):
                out.write(np.ascontiguousarray(some).data)
            out.write(np.full(part.schema.dim, part.schema.serving_default, "<f4").tobytes())
    encoded = 0 < len(keys) <= ENCODED
    if not encoded:
        np.save(part.path / "keys.npy", keys)
    model = _model(onnx, part, keys, encoded=encoded, mode=mode)
    (part.path / "model.onnx").write_bytes(model.SerializeToString())
    return len(keys)


def _onnx() -> Any:
    """Import onnx. Raises InvalidArgument if it is not installed."""
    try:
        import onnx
    except ImportError as error:
        raise InvalidArgument("this format needs onnx: pip install 'embedding-ps[onnx]'") from error
    return onnx


def _model(onnx: Any, part: Part, keys: NDArray[np.int64], *, encoded: bool, mode: str) -> Any:
    """Return the model.

    onnx     the module
    keys     int64[n], sorted
    encoded  whether the model contains the keys
    """
    make, kinds = onnx.helper, onnx.TensorProto
    nodes, name = [], "keys" if encoded else "rows"
    if encoded:
        nodes.append(_encoder(onnx, keys))
    nodes.append(make.make_node("Gather", ["weight", "rows"], ["each"], axis=0))
    shape: list[str | int] = ["batch", "size", part.schema.dim]
    if mode == "none":
        nodes[-1].output[0] = "embeddings"
    else:
        axes = onnx.numpy_helper.from_array(np.array([1]), "axes")
        nodes.append(make.make_node(MODES[mode], ["each", "axes"], ["embeddings"], keepdims=0))
        shape.remove("size")
    graph = make.make_graph(
        nodes,
        part.schema.name,
        [make.make_tensor_value_info(name, kinds.INT64, ["batch", "size"])],
        [make.make_tensor_value_info("embeddings", kinds.FLOAT, shape)],
        [_weight(onnx, len(keys) + 1, part.schema.dim), *([] if mode == "none" else [axes])],
    )
    opsets = [make.make_opsetid("", 18), make.make_opsetid("ai.onnx.ml", 4)]
    model = make.make_model(graph, opset_imports=opsets, producer_name="embedding-ps")
    model.ir_version = 9  # of the releases that have these operators
    make.set_model_props(model, {SCHEMA: schema_text(part.schema)})
    return model


def _encoder(onnx: Any, keys: NDArray[np.int64]) -> Any:
    """Return the node that turns keys into row numbers; other keys become len(keys)."""
    tensor = onnx.numpy_helper.from_array
    return onnx.helper.make_node(
        "LabelEncoder",
        ["keys"],
        ["rows"],
        domain="ai.onnx.ml",
        keys_tensor=tensor(keys, "keys"),
        values_tensor=tensor(np.arange(len(keys)), "values"),
        default_tensor=tensor(np.array([len(keys)]), "default"),
    )


def _weight(onnx: Any, rows: int, dim: int) -> Any:
    """Return the description of the rows in weight.bin."""
    weight = onnx.TensorProto(
        name="weight",
        data_type=onnx.TensorProto.FLOAT,
        dims=[rows, dim],
        data_location=onnx.TensorProto.EXTERNAL,
    )
    values = {"location": "weight.bin", "offset": "0", "length": str(rows * dim * 4)}
    for key, value in values.items():
        weight.external_data.add(key=key, value=value)
    return weight
