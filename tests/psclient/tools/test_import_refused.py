"""Files of other programs that do not fit are refused by name, and no code in them runs."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kindfiles import DIM, KEYS, WEIGHT, N, joined, pieces, save_distributed
from safetensors.numpy import save_file

from psclient.errors import InvalidArgument
from psclient.tools import arraypiece
from psclient.tools.incoming import Piece, Target


def array(path: Path, values: Any, **more: Any) -> Path:
    np.save(path / "x.npy", values, **more)
    return path / "x.npy"


REFUSED: dict[str, tuple[Callable[[Path], list[Piece]], str]] = {
    "wrong dim": (
        lambda path: pieces("npy", array(path, np.zeros((3, 5), "f4"))),
        "'embedding' must have shape [n, 2] (table 't', dim 2), got [3, 5]",
    ),
    "integers": (
        lambda path: pieces("npy", array(path, np.zeros((3, 2), int))),
        "'embedding' must be float16, bfloat16, float32 or float64, got int64",
    ),
    "no matrix": (
        lambda path: pieces("npy", array(path, np.zeros((3, 2, 2), "f4"))),
        "'embedding' must have shape [n, 2] (table 't', dim 2), got [3, 2, 2]",
    ),
    "flat": (
        lambda path: pieces("npy", array(path, np.zeros(6, "f4"))),
        "'embedding' must have shape [n, 2] (table 't', dim 2), got [6]",
    ),
    "a number": (
        lambda path: pieces("npy", array(path, np.zeros((), "f4")), Target("t", 1, 1, "sgd")),
        "'embedding' must have shape [n, 1] (table 't', dim 1), got []",
    ),
    "records": (
        lambda path: pieces("npy", array(path, np.zeros(6, [("a", "f4")]))),
        "'embedding' must be float16, bfloat16, float32 or float64, got void32",
    ),
    "columns first": (
        lambda path: pieces("npy", array(path, np.zeros((3, 2), "f4", "F"))),
        "rows must be stored one after the other (C order), got Fortran order",
    ),
    "no array": (
        lambda path: (text(path / "x.npy"), pieces("npy", path / "x.npy"))[1],
        "cannot be read as an array of NumPy",
    ),
    "no archive": (
        lambda path: (text(path / "x.npz"), pieces("npz", path / "x.npz"))[1],
        "cannot be read as .npz",
    ),
    "no safetensors": (
        lambda path: (text(path / "x.safetensors"), pieces("safetensors", path / "x.safetensors"))[
            1
        ],
        "cannot be read as safetensors",
    ),
    "no torch": (
        lambda path: (text(path / "x.pt"), pieces("torch", path / "x.pt"))[1],
        "cannot be loaded with weights_only=True",
    ),
    "cut off": (
        lambda path: (cut(array(path, np.zeros((3, 2), "f4"))), pieces("npy", path / "x.npy"))[1],
        "the file is truncated: an array of float32 with the shape (3, 2) ends at byte",
    ),
    "nothing there": (lambda path: pieces("npy", path / "x.npy"), "x.npy does not exist"),
    "a directory": (lambda path: pieces("npy", path), "must be a file"),
    "unknown field": (
        lambda path: pieces("npy", array(path, WEIGHT), map={"weight": "x"}),
        "'map': this kind of file has the fields key, state, step, frequency, got 'weight'",
    ),
    "too few keys": (
        lambda path: (
            np.save(path / "k.npy", KEYS[1:]),
            pieces("npy", array(path, WEIGHT), map={"key": "k.npy"}),
        )[1],
        "k.npy: 'key' must have one integer for each of the 7 embeddings, got shape [6]",
    ),
    "keys of floats": (
        lambda path: (
            np.save(path / "k.npy", KEYS * 1.0),
            pieces("npy", array(path, WEIGHT), map={"key": "k.npy"}),
        )[1],
        "k.npy: 'key' must be integers, got float64",
    ),
    "state of a wrong size": (
        lambda path: (
            np.save(path / "s.npy", np.zeros((N, 3), "f4")),
            pieces("npy", array(path, WEIGHT), map={"state": "s.npy"}),
        )[1],
        "'state' must have 2 numbers per row (optimizer 'adagrad', dim 2), got 3",
    ),
    "step out of range": (
        lambda path: (
            np.save(path / "s.npy", np.array([1, 2**47, 1, 1, 1, 1, 1])),
            [joined(pieces("npy", array(path, WEIGHT), map={"step": "s.npy"}))],
        )[1],
        "row 1 (counted from 0): 'step' must be in",
    ),
    "no such array": (
        lambda path: (
            np.savez(path / "x.npz", a=WEIGHT),
            pieces("npz", path / "x.npz", map={"embedding": "b"}),
        )[1],
        "'map': embedding must be one of the arrays a float32[7, 2], got 'b'",
    ),
    "two matrices": (
        lambda path: (np.savez(path / "x.npz", a=WEIGHT, b=WEIGHT), pieces("npz", path / "x.npz"))[
            1
        ],
        "must have an array 'embeddings', or exactly one matrix",
    ),
    "half a row": (
        lambda path: (
            (path / "key").write_bytes(bytes(8)),
            (path / "emb_vector").write_bytes(bytes(12)),
            pieces("hps", path),
        )[2],
        "emb_vector: the size must be a multiple of 8 bytes (2 float32), got 12 bytes",
    ),
    "no files of the kind": (
        lambda path: pieces("tfra", path),
        "contains no file such as NAME_mht_1of1-keys",
    ),
    "scores of no kind": (
        lambda path: pieces("dynamicemb", path, map={"step": "x"}),
        "'map': step must be 'scores', got 'x'",
    ),
    "a column of csv": (
        lambda path: (
            (path / "x.csv").write_text("key,embedding_0\n1,2\n"),
            pieces("csv", path / "x.csv"),
        )[1],
        "must have the columns embedding_0..embedding_1 (table 't', dim 2), got 1 columns",
    ),
    "no key in csv": (
        lambda path: (
            (path / "x.csv").write_text("embedding_0,embedding_1\n1,2\n"),
            pieces("csv", path / "x.csv"),
        )[1],
        "must have exactly one column 'key', got 0",
    ),
    "words in csv": (
        lambda path: (
            (path / "x.csv").write_text("key,embedding_0,embedding_1\n1,2,x\n"),
            [joined(pieces("csv", path / "x.csv"))],
        )[1],
        "cannot be read as CSV",
    ),
    "no TensorFlow checkpoint": (
        lambda path: pieces("deeprec", path / "model"),
        "model.index does not exist",
    ),
}


def text(path: Path) -> None:
    path.write_text("key,embedding\n1,2\n" * 99)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, case: str) -> None:
    run, message = REFUSED[case]
    with pytest.raises(InvalidArgument) as caught:
        run(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "'map'" in message or str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors", "torchrec"])
def test_a_damaged_file_is_refused_or_has_as_many_rows(tmp_path: Path, kind: str) -> None:
    path = file = tmp_path / f"x.{kind}"
    if kind == "npy":
        np.save(path, WEIGHT)
    elif kind == "npz":
        np.savez_compressed(path, keys=np.arange(N), embeddings=np.round(WEIGHT))
    elif kind == "safetensors":
        save_file({"keys": KEYS, "embeddings": WEIGHT}, path)
    else:
        save_distributed({"embedding_bags.t.weight": torch.from_numpy(WEIGHT)}, path)
        file = path / ".metadata"
    data, rng, refused = file.read_bytes(), np.random.default_rng(0), 0
    for at in rng.choice(len(data), min(len(data), 150), replace=False).tolist():
        wrong = data[at] ^ (1 << int(rng.integers(8)))
        file.write_bytes(data[:at] + bytes([wrong]) + data[at + 1 :])
        try:
            found = joined(pieces(kind, path))
        except InvalidArgument as error:
            assert "\n" not in str(error)  # noqa: PT017  the other outcome is checked too
            refused += 1
        else:
            assert found.rows.shape[1] == DIM
            assert len(found.rows) <= N
    assert refused > 30


# ---- no code in a file runs


class Evil:
    """An object whose unpickling creates a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def evil_torch(path: Path, evil: Evil) -> list[Piece]:
    torch.save({"weight": torch.from_numpy(WEIGHT), "x": evil}, path / "x.pt")
    return pieces("torch", path / "x.pt")


def evil_old_torch(path: Path, evil: Evil) -> list[Piece]:
    torch.save({"x": evil}, path / "x.pt", _use_new_zipfile_serialization=False)
    return pieces("torch", path / "x.pt")


def evil_torchrec(path: Path, evil: Evil) -> list[Piece]:
    torch.save({"embedding_bags.t.weight": evil}, path / "x.pt")
    return pieces("torchrec", path / "x.pt")


def evil_npy(path: Path, evil: Evil) -> list[Piece]:
    np.save(path / "x.npy", np.array([[evil, evil]], object), allow_pickle=True)
    return pieces("npy", path / "x.npy")


def evil_pickle_as_npy(path: Path, evil: Evil) -> list[Piece]:
    (path / "x.npy").write_bytes(pickle.dumps(evil))
    return pieces("npy", path / "x.npy")


def evil_npz(path: Path, evil: Evil) -> list[Piece]:
    np.savez(path / "x.npz", embeddings=WEIGHT, keys=np.array([evil] * N, object))
    return pieces("npz", path / "x.npz")


def evil_metadata(path: Path, evil: Evil) -> list[Piece]:
    (path / ".metadata").write_bytes(pickle.dumps(evil))
    return pieces("torchrec", path)


def evil_part(path: Path, evil: Evil) -> list[Piece]:
    save_distributed({"embedding_bags.t.weight": torch.from_numpy(WEIGHT)}, path)
    [data] = path.glob("*.distcp")
    size = data.stat().st_size
    torch.save(evil, data)
    with data.open("ab") as file:
        file.write(bytes(max(0, size - data.stat().st_size)))
    return [joined(pieces("torchrec", path))]  # type: ignore[list-item]


EVIL = [
    evil_torch, evil_old_torch, evil_torchrec, evil_npy, evil_pickle_as_npy, evil_npz,
    evil_metadata, evil_part,
]  # fmt: skip


@pytest.mark.parametrize("write", EVIL)
def test_no_code_in_a_file_runs(tmp_path: Path, write: Callable[..., Any]) -> None:
    proof, directory = tmp_path / "proof", tmp_path / "files"
    directory.mkdir()
    assert pickle.loads(pickle.dumps(Evil(tmp_path / "works"))) is None  # noqa: S301
    assert (tmp_path / "works").is_dir()  # the attack works where a file is unpickled
    with pytest.raises(InvalidArgument, match="files"):
        write(directory, Evil(proof))
    assert not proof.exists()


def test_a_checkpoint_cannot_lead_to_a_file_outside(tmp_path: Path) -> None:
    save_distributed({"embedding_bags.t.weight": torch.from_numpy(WEIGHT)}, tmp_path / "x")
    file = tmp_path / "x" / ".metadata"
    file.write_bytes(file.read_bytes().replace(b"__0_0.distcp", b"../../secret"))
    with pytest.raises(InvalidArgument, match="has a file outside"):
        pieces("torchrec", tmp_path / "x")


def test_the_smallest_batch_has_one_row() -> None:
    assert arraypiece.batch_rows(Target("t", 1 << 40, 1 << 41, "adagrad")) == 1
