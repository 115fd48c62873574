"""A cluster on this machine that kubectl controls: a small API server, and real servers as pods.

The commands of the runbook run in it as they stand. What differs from Kubernetes: pods are
processes without containers, addresses are 127.0.0.1 with a port per pod, and the controller below
does only what the runbook needs of StatefulSets.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from apiserver import Api, Refusal
from rendering import Object
from servers import free_ports
from squeeze import environment
from tools import program

from psclient import Client

NAMESPACE, SET, MOST_PODS = "ps", "ps", 8
NODES = ("node-0", "node-1", "node-2")
LOST = "node.kubernetes.io/out-of-service"
INSTANCE = {"app.kubernetes.io/instance": "ps", "app.kubernetes.io/name": "embedding-ps"}
LOOP_SECONDS = 0.1
MEMORY = 200 << 20  # host_bytes of each server, because they share this machine
KUBECTL = """#!{python}
import json, os, sys
args = sys.argv[1:]
name = args[args.index("--context") + 1] if "--context" in args else "main"
if "exec" in args:
    world = json.load(open("{directory}/" + name + ".json"))
    words = args[args.index("--") + 1 :]
    assert args[args.index("--") - 1] in world["pods"], "no such pod"
    words = [world["checkpoints"] if word == "/checkpoints" else word for word in words]
    os.environ["PSCTL_SERVERS"] = world["servers"]
    if words[0] == "psctl":
        words[:1] = ["{python}", "-c", "from psclient.tools.ctl import main; main()"]
    os.execvp(words[0], words)
if "apply" in args:
    args.append("--validate=false")  # the schema is checked by other tests
os.environ["KUBECONFIG"] = "{directory}/kubeconfig"
os.execv("{kubectl}", ["kubectl", *args])
"""


class Pod:
    """One pod, and the server that runs in it. Its data are in the directory of its claim."""

    def __init__(self, world: World, number: int, revision: str, node: str) -> None:
        self.number, self.revision, self.node = number, revision, node
        self.output = world.directory / f"{world.name}-pod-{number}.out"
        self.errors = world.directory / f"{world.name}-pod-{number}.err"
        for path in (self.output, self.errors):
            path.unlink(missing_ok=True)
        self.frozen = False  # its node is lost: nothing starts or reports it
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def ready(self) -> bool:
        """Whether the server runs and has reported that it serves."""
        running = self.process is not None and self.process.poll() is None
        return running and not self.frozen and self.output.read_text().startswith("ready")

    def start(self, flags: list[str]) -> None:
        """Start the server."""
        with self.output.open("wb") as out, self.errors.open("wb") as err:
            command = [sys.executable, "-m", "psserver", "serve", *flags]
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=environment())

    def kill(self) -> None:
        """Kill the server, as a lost node does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """Stop the server with SIGTERM, as Kubernetes does when it deletes a pod."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        self.kill()


class World:
    """A cluster and its kubectl; ``tick`` is one turn of its controller.

    directory  for all files; ``disks`` maps the number of a pod to a directory for its data, if
               they must be on a certain file system
    images     tags that the registry has; a pod with a different tag does not start
    """

    def __init__(self, name: str, directory: Path, disks: dict[int, Path] | None = None) -> None:
        self.name, self.directory, self.disks = name, directory, disks or {}
        self.images = {"0.3.0", "0.3.1"}
        self.flags: dict[str, object] = {}  # further flags of servers that start from now on
        self.pods: dict[int, Pod] = {}
        self.port = free_ports(MOST_PODS)
        self.checkpoints = directory / f"{name}-checkpoints"
        self.checkpoints.mkdir()
        self.api = Api(lambda: None, self._removed)
        for node in NODES:
            self._put("Node", "v1", {"name": node}, {"spec": {}, "status": {}})
        self._put("StorageClass", "storage.k8s.io/v1", {"name": "fast"}, {"provisioner": "local"})
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """Stop the controller, the servers and the API server."""
        self._stop.set()
        self._thread.join()
        self.api.close()
        for pod in self.pods.values():
            pod.stop()

    def client(self, **options: Any) -> Client:
        """Return a client of all shards."""
        return Client(self.servers(), **{"timeout": 60.0, **options})

    def servers(self) -> list[str]:
        """Return the addresses of all shards, in order."""
        target = self.api.store.objects.get(("StatefulSet", NAMESPACE, SET))
        count = self._shards(target) if target else 0
        return [f"127.0.0.1:{self.port + number}" for number in range(count)]

    def template(self) -> Object:
        """Return the pod template of the StatefulSet."""
        found: Object = self.api.store.get(("StatefulSet", NAMESPACE, SET))["spec"]["template"]
        return found

    def lose(self, node: str) -> None:
        """Let a node fail: its pods die, and nothing on it starts again."""
        with self.api.store.lock:
            for pod in self.pods.values():
                if pod.node == node:
                    pod.frozen = True
                    pod.kill()

    def _run(self) -> None:
        while not self._stop.wait(LOOP_SECONDS):
            with self.api.store.lock:
                self.tick()

    def tick(self) -> None:
        """Bring claims, pods and status closer to what the StatefulSet asks for."""
        target = self.api.store.objects.get(("StatefulSet", NAMESPACE, SET))
        if target is not None:
            revision = self._revision(target)
            self._free_lost_nodes()
            self._scale(target, revision)
            self._roll(target, revision)
            self._report(target, revision)
        servers = ",".join(self.servers())
        pods = [f"{SET}-{number}" for number in self.pods]
        facts = {"servers": servers, "pods": pods, "checkpoints": str(self.checkpoints)}
        temporary = self.directory / f"{self.name}.json.new"
        temporary.write_text(json.dumps(facts))
        temporary.rename(self.directory / f"{self.name}.json")

    def _revision(self, target: Object) -> str:
        """Return the name of the revision of the pod template; store it if it is new or undone."""
        template = {**target["spec"]["template"], "$patch": "replace"}
        digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:8]
        found = self.api.store.of("ControllerRevision")
        last = max((each["revision"] for each in found), default=0)
        name = f"{SET}-{digest}"
        if any(e["metadata"]["name"] == name and e["revision"] == last for e in found):
            return name
        owner = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": SET, "controller": True}
        owner["uid"] = target["metadata"]["uid"]
        metadata = {"name": name, "namespace": NAMESPACE, "labels": INSTANCE}
        content = {"revision": last + 1, "data": {"spec": {"template": template}}}
        metadata["ownerReferences"] = [owner]
        self._put("ControllerRevision", "apps/v1", metadata, content)
        return name

    def _scale(self, target: Object, revision: str) -> None:
        """Create claims and pods that are missing, and remove pods with too large numbers."""
        wanted = target["spec"]["replicas"]
        for number in [number for number in self.pods if number >= wanted]:
            self._remove(number)
        for number in range(wanted):
            self._claim(target, number)
            if number not in self.pods:
                self._create(target, number, revision)
        for number, pod in self.pods.items():  # a server that has ended starts again
            ended = pod.process is not None and pod.process.poll() is not None
            if ended and not pod.frozen:
                pod.start(self._flags(target, number))

    def _claim(self, target: Object, number: int) -> Object:
        """Return the claim of a pod; create it if it is missing."""
        key = ("PersistentVolumeClaim", NAMESPACE, f"data-{SET}-{number}")
        if key not in self.api.store.objects:
            (template,) = target["spec"]["volumeClaimTemplates"]
            metadata = {"name": key[2], "namespace": NAMESPACE, "labels": INSTANCE}
            self._put("PersistentVolumeClaim", "v1", metadata, {"spec": template["spec"]})
        return self.api.store.objects[key]

    def _create(self, target: Object, number: int, revision: str) -> None:
        """Create a pod on a node that accepts pods, and start its server if the image exists."""
        nodes = [n for n in self.api.store.of("Node") if not n["spec"].get("unschedulable")]
        nodes = [n for n in nodes if not n["spec"].get("taints")]
        node = nodes[number % len(nodes)]["metadata"]["name"]
        pod = self.pods[number] = Pod(self, number, revision, node)
        tag = target["spec"]["template"]["spec"]["containers"][0]["image"].rpartition(":")[2]
        if tag in self.images:
            pod.start(self._flags(target, number))
        self._show(pod)

    def _flags(self, target: Object, number: int) -> list[str]:
        """Return the arguments of the server of a pod: the manifest's file, and local paths."""
        config = self.directory / f"{self.name}-{number}.toml"
        config.write_text(self._settings(target))
        claim = self._claim(target, number)["metadata"]["uid"]
        data = self.disks.get(number, self.directory / f"{self.name}-volumes") / claim
        data.mkdir(parents=True, exist_ok=True)
        flags = {
            "config": config,
            "shard": number,
            "host": "127.0.0.1",
            "port": self.port + number,
            "metrics-port": 0,
            "data-dir": data,
            "checkpoint-url": f"file://{self.checkpoints}",
            "host-bytes": MEMORY,
            "segment-bytes": 2 << 20,
            "log-keep-bytes": 1 << 30,
            **self.flags,
        }
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]

    def _settings(self, target: Object) -> str:
        """Return the psserver.toml that the pods mount."""
        volumes = target["spec"]["template"]["spec"]["volumes"]
        (name,) = (v["configMap"]["name"] for v in volumes if "configMap" in v)
        config = self.api.store.get(("ConfigMap", NAMESPACE, name))
        return str(config["data"]["psserver.toml"])

    def _shards(self, target: Object) -> int:
        lines = self._settings(target).splitlines()
        (line,) = (line for line in lines if line.startswith("shards = "))
        return int(line.split()[2])

    def _roll(self, target: Object, revision: str) -> None:
        """Replace the pod with the largest number that has an old revision, if all others serve."""
        for number in sorted(self.pods, reverse=True):
            if self.pods[number].revision != revision:
                self._remove(number)
                self._create(target, number, revision)
                return
            if not self.pods[number].ready:
                return

    def _remove(self, number: int) -> None:
        """Stop a pod, and delete it from the store."""
        self.pods.pop(number).stop()
        self.api.store.objects.pop(("Pod", NAMESPACE, f"{SET}-{number}"), None)

    def _removed(self, gone: Object, policy: str) -> None:
        """Do what follows from the deletion of an object."""
        name = gone["metadata"]["name"]
        if gone["kind"] == "StatefulSet" and policy != "Orphan":
            for number in list(self.pods):
                self._remove(number)
        if gone["kind"] == "Pod":  # deleted or evicted
            number = int(name.rpartition("-")[2])
            away = sum(not pod.ready for pod in self.pods.values() if pod.number != number)
            if away:
                self.api.store.objects["Pod", NAMESPACE, name] = gone
                raise Refusal(429, "TooManyRequests", "the disruption budget allows one pod away")
            self.pods.pop(number).stop()
        if gone["kind"] == "PersistentVolumeClaim":
            for directory in self.volumes(gone["metadata"]["uid"]):
                shutil.rmtree(directory, ignore_errors=True)

    def volumes(self, claim: str) -> Iterator[Path]:
        """Yield the places where the directory of a claim may be. claim: its uid."""
        for place in (self.directory / f"{self.name}-volumes", *self.disks.values()):
            yield place / claim

    def _free_lost_nodes(self) -> None:
        """Remove the pods of nodes that are declared to be out of service."""
        for node in self.api.store.of("Node"):
            if any(taint["key"] == LOST for taint in node["spec"].get("taints", [])):
                name = node["metadata"]["name"]
                for number in [n for n, pod in self.pods.items() if pod.node == name]:
                    self._remove(number)

    def _report(self, target: Object, revision: str) -> None:
        """Write the status of the pods and of the StatefulSet, where it has changed."""
        for pod in self.pods.values():
            self._show(pod)
        ready = sum(pod.ready for pod in self.pods.values())
        updated = sum(pod.revision == revision for pod in self.pods.values())
        done = updated == len(self.pods) == ready
        status = {
            "observedGeneration": target["metadata"]["generation"],
            "replicas": len(self.pods),
            "readyReplicas": ready,
            "availableReplicas": ready,
            "updatedReplicas": updated,
            "updateRevision": revision,
            "currentRevision": revision if done else "older",
        }
        if target.get("status") != status:
            self.api.store.put({**target, "status": status})

    def _show(self, pod: Pod) -> None:
        """Store a pod as kubectl shows it, if that has changed."""
        metadata = {"name": f"{SET}-{pod.number}", "namespace": NAMESPACE, "labels": INSTANCE}
        log = pod.errors.read_text() if pod.errors.exists() else "ImagePullBackOff"
        metadata |= {"annotations": {"log": log}}
        conditions = [{"type": "Ready", "status": str(pod.ready)}]
        content = {
            "spec": {"nodeName": pod.node, "containers": [{"name": "psserver"}]},
            "status": {"phase": "Running", "conditions": conditions},
        }
        owner = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": SET, "controller": True}
        metadata["ownerReferences"] = [{**owner, "uid": "uid"}]
        old = self.api.store.objects.get(("Pod", NAMESPACE, metadata["name"]), {})
        if old.get("status") != content["status"] or old["metadata"]["annotations"]["log"] != log:
            self._put("Pod", "v1", metadata, content)

    def _put(self, kind: str, version: str, metadata: Object, content: Object) -> None:
        each = {"kind": kind, "apiVersion": version, "metadata": metadata, **content}
        self.api.store.put(json.loads(json.dumps(each)))


def kubectl_for(worlds: list[World], directory: Path) -> dict[str, str]:
    """Write a program ``kubectl`` for these clusters. Returns the environment that uses it.

    worlds  the first is the current context of kubectl, and must have the name "main"
    """
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": worlds[0].name,
        "clusters": [{"name": w.name, "cluster": {"server": w.api.url}} for w in worlds],
        "contexts": [{"name": w.name, "context": {"cluster": w.name, "user": ""}} for w in worlds],
    }
    (directory / "kubeconfig").write_text(json.dumps(config))
    (directory / "bin").mkdir()
    script = directory / "bin" / "kubectl"
    real = program("kubectl")
    script.write_text(KUBECTL.format(python=sys.executable, directory=directory, kubectl=real))
    script.chmod(0o755)
    path = f"{directory / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**environment(), "PATH": path, "HOME": str(directory)}
