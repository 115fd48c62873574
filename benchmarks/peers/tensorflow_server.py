"""TensorFlow's parameter server as a peer.

Its processes run under the Python interpreter that the environment variable PEERS_TF_PYTHON names.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.peer import Peer, Unavailable, free_port
from benchmarks.work import Ids, Rows, Step, Work

ROOT = Path(__file__).parents[2]


class TensorFlow(Peer):
    """A server process (``tf.distribute.Server``) with the table, and a worker process.

    The worker reads its batches from a file before it measures the steps. With ``eager`` it streams
    operations: a push returns when it is queued, and the next pull waits for it. Without, it runs a
    graph session, which waits for pulls and pushes.
    """

    def __init__(self, work: Work, *, eager: bool = True) -> None:
        self.name = "tensorflow remote ps" if eager else "tensorflow remote ps, session"
        hint = "PEERS_TF_PYTHON=<a python in whose environment pip installed tensorflow-cpu>"
        python = os.environ.get("PEERS_TF_PYTHON")
        if not python or shutil.which(python) is None:
            raise Unavailable(hint)
        look = "import importlib.util as u; raise SystemExit(u.find_spec('tensorflow') is None)"
        if subprocess.run([python, "-c", look], check=False).returncode:
            raise Unavailable(hint)
        self._directory = tempfile.TemporaryDirectory(prefix="peers-")
        self._files = Path(self._directory.name)
        self._children: list[subprocess.Popen[str]] = []
        cluster = {
            "ps": [f"127.0.0.1:{free_port()}"],
            "worker": [f"127.0.0.1:{free_port()}"],
        }
        try:
            self._start(python, "tensorflow-server", {"cluster": cluster})
            self._worker = self._start(
                python,
                "tensorflow-worker",
                {"cluster": cluster, "work": dataclasses.asdict(work), "eager": eager},
            )
        except BaseException:
            self.close()
            raise

    def step(self, ids: Ids, distinct: Ids, grads: Rows) -> Rows:
        self.run([(ids, distinct, grads)])
        rows: Rows = np.load(self._files / "rows.npy")
        return rows

    def run(self, steps: Sequence[Step]) -> list[float]:
        arrays = {
            f"{name}{i}": array
            for i, step in enumerate(steps)
            for name, array in zip(("ids", "distinct", "grads"), step, strict=True)
        }
        # mypy matches the names in ** with another parameter of savez.
        np.savez(self._files / "steps.npz", **arrays)  # type: ignore[arg-type, unused-ignore]
        order = {
            "steps": str(self._files / "steps.npz"),
            "count": len(steps),
            "rows": str(self._files / "rows.npy"),
        }
        print(json.dumps(order), file=self._worker.stdin, flush=True)
        seconds: list[float] = self._answer(self._worker)["seconds"]
        return seconds

    def close(self) -> None:
        for child in reversed(self._children):
            atexit.unregister(child.kill)
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    stream.close()
        self._directory.cleanup()

    def _start(self, python: str, role: str, options: dict[str, Any]) -> subprocess.Popen[str]:
        """Start tensorflow_program.py as ``role``, and wait until it is ready.

        python   interpreter
        options  passed to the program as JSON
        """
        environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        environment |= {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""}
        with open(self._files / f"{role}.log", "wb") as log:
            child = subprocess.Popen(
                [python, "-m", "benchmarks.peers.tensorflow_program", role, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                cwd=ROOT,
                text=True,
            )
        atexit.register(child.kill)
        self._children.append(child)
        self._answer(child)
        return child

    def _answer(self, child: subprocess.Popen[str]) -> dict[str, Any]:
        line = child.stdout.readline() if child.stdout else ""
        if not line:
            logs = "\n".join(path.read_text()[-2000:] for path in self._files.glob("*.log"))
            raise RuntimeError(f"{self.name}: a process ended unexpectedly\n{logs}")
        answer: dict[str, Any] = json.loads(line)
        return answer
