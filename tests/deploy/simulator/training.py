"""Run trainer.py in a pod of a simulator during a block, and read its report."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.deploy import image
from tests.deploy.simulator.objects import Object
from tests.deploy.simulator.pods import Simulator

SCRIPT = Path(__file__).with_name("trainer.py")


@dataclass(frozen=True, slots=True)
class Report:
    """What a trainer saw.

    steps   number of steps
    errors  messages of the steps that failed
    stalls  (time on the monotonic clock, seconds) of each step that took more than half a second
    exact   whether each row is the sum of its acknowledged gradients
    off     number of rows that are not
    """

    steps: int
    errors: list[str]
    stalls: list[tuple[float, float]]
    exact: bool
    off: int

    def stall(self, begin: float, end: float) -> float:
        """Return the longest stall that began between two times, in seconds; 0 if there is none."""
        return max((took for at, took in self.stalls if begin <= at <= end), default=0.0)


class Trainer:
    """A trainer in a pod of its own. It trains before the block begins, until its end.

    address  of the shards: the name of the headless service, and its port
    """

    report: Report

    def __init__(self, pods: Simulator, name: str, address: str = "ps:7000") -> None:
        self._pods, self._name = pods, name
        self._objects = run_once(name, ["python", "/trainer/trainer.py", address, name])

    def __enter__(self) -> Trainer:
        self._pods.apply(self._objects)
        self._pods.wait(f"{self._name} trains", lambda: bool(self._told("beat")))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            beats = len(self._told("beat"))
            self._pods.wait(f"{self._name} still trains", lambda: len(self._told("beat")) > beats)
        self._pods.control.delete(self._name)
        if kind is None:
            self._pods.wait(f"{self._name} has ended", lambda: bool(self._told("steps")), 200)
            (told,) = self._told("steps")
            stalls = [(at, took) for at, took in told["stalls"]]
            self.report = Report(told["steps"], told["errors"], stalls, told["exact"], told["off"])

    def is_waiting(self, seconds: float = 3.0) -> bool:
        """Return whether the trainer makes no step for some seconds."""
        beats = len(self._told("beat"))
        time.sleep(seconds)
        return len(self._told("beat")) == beats

    def _told(self, key: str) -> list[Object]:
        """Return the lines of the trainer's output that have a key. Raises if it failed."""
        text = self._pods.log(self._name)
        if "Traceback" in text:
            raise RuntimeError(f"the trainer failed:\n{text[-3000:]}")
        lines = [line for line in text.splitlines(keepends=True) if line.startswith("{")]
        found = [json.loads(line) for line in lines if line.endswith("}\n")]
        return [one for one in found if key in one]


def run_once(name: str, command: list[str]) -> list[Object]:
    """Return the objects of a pod that runs a command from the server's image once.

    It has the file trainer.py in the directory /trainer.
    """
    data = {SCRIPT.name: SCRIPT.read_text()}
    script = {"kind": "ConfigMap", "metadata": {"name": "trainer"}, "data": data}
    locked = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    container = {
        "name": "trainer",
        "image": image.TAG,
        "command": command,
        "securityContext": locked,
        "volumeMounts": [{"name": "trainer", "mountPath": "/trainer"}],
    }
    labels = {"app.kubernetes.io/name": "trainer", "embedding-ps/client": "true"}
    pod = {
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "ps", "uid": f"{name}-pod", "labels": labels},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 180,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
            "volumes": [{"name": "trainer", "configMap": {"name": "trainer"}}],
        },
    }
    return [script, pod]
