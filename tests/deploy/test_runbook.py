"""Every command of docs/runbook.md runs, in its order, with kubectl and real servers.

Each section has a function here that prepares what the section is about, lets its commands run, and
checks the result. See world.py for what stands in for Kubernetes.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rendering import DEPLOY, ROOT
from servers import eventually
from world import World, kubectl_for

from psclient import Table
from psclient.errors import DataLoss, ResourceExhausted
from tests.fault import disks
from tests.fault.rowflips import flip

RUNBOOK = ROOT / "docs" / "runbook.md"
KEYS = np.arange(1000)
DIM = 4
LOOKS = (  # sections whose commands change nothing
    *("Little memory", "Slow disk", "Overdue flush", "Failed checkpoint", "Overload"),
    *("Late subscriber", "Late changes", "Expiring certificate", "Invalid policy", "Audit log"),
    "Paused GPU",
)
SECONDS = 300.0  # maximum time of a command, on a machine that does other things too


def sections() -> dict[str, list[str]]:
    """Return heading -> commands of the runbook, for the headings that have commands."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^## ", RUNBOOK.read_text(), flags=re.M)[1:]:
        heading, _, body = part.partition("\n")
        blocks = re.findall(r"^```sh\n(.*?)^```", body, re.M | re.S)
        found[heading] = [line for block in blocks for line in block.splitlines() if line]
    return {heading: commands for heading, commands in found.items() if commands}


class Desk:
    """The place where an operator works: a copy of deploy/, kubectl, and one or two clusters."""

    def __init__(self, directory: Path, worlds: list[World]) -> None:
        self.world, self.worlds = worlds[0], worlds
        self.directory = directory / "deploy"
        shutil.copytree(DEPLOY, self.directory, symlinks=True)
        overlay = self.directory / "overlays" / "production" / "kustomization.yaml"
        text = overlay.read_text()  # there is no Secret with certificates here
        overlay.write_text(text.replace("components/tls", "components/plaintext"))
        self._environment = kubectl_for(worlds, directory)

    def run(self, command: str, *, fails: bool = False) -> str:
        """Run a command in bash. Return its output, with its errors."""
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=self.directory,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert (done.returncode != 0) == fails, f"{command}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def follow(self, heading: str) -> dict[str, str]:
        """Run all commands of a section. Return command -> output."""
        return {command: self.run(command) for command in sections()[heading]}

    def start(self) -> None:
        """Start the cluster, and store rows whose values tell how often they were pushed."""
        self.follow("Start")
        with self.world.client() as client:
            client.create_table("user", dim=DIM, optimizer="sgd", lr=1.0, initializer="zeros")
        self.push()

    def push(self) -> None:
        """Add 1 to each row."""
        with self.world.client() as client:
            client.table("user").push(KEYS, np.full((len(KEYS), DIM), -1.0, np.float32))

    def pushes(self, world: World | None = None) -> int:
        """Return how often each row was pushed; it must be the same for all."""
        with (world or self.world).client() as client:
            rows = client.table("user").pull(KEYS)
        (count,) = set(rows.ravel().tolist())
        return int(count)


def _desk(directory: Path) -> Iterator[Desk]:
    world = World("main", directory)
    try:
        desk = Desk(directory, [world])
        desk.start()
        yield desk
    finally:
        world.close()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    yield from _desk(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A cluster for the sections that leave it as it was: three shards with the same rows."""
    yield from _desk(tmp_path_factory.mktemp("desk"))


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_start(shared: Desk) -> None:
    assert shared.pushes() >= 1
    assert sorted(shared.world.pods) == [0, 1, 2]


def test_scale(desk: Desk) -> None:
    output = desk.follow("Scale")
    assert len(desk.world.servers()) == 6
    assert "user" in output["kubectl exec -n ps ps-0 -- psctl tables"]
    assert desk.pushes() == 1
    desk.push()
    assert desk.pushes() == 2


def test_rolling_upgrade(desk: Desk) -> None:
    before = {number: pod.revision for number, pod in desk.world.pods.items()}
    desk.follow("Rolling upgrade")
    after = {number: pod.revision for number, pod in desk.world.pods.items()}
    assert len(set(after.values())) == 1
    assert set(after.values()).isdisjoint(before.values())
    assert desk.pushes() == 1


def test_broken_revision(desk: Desk) -> None:
    desk.world.images = {"0.3.0"}
    kustomization = "overlays/production/kustomization.yaml"
    desk.run(f"sed -i 's/newTag: 0.3.0/newTag: 0.3.1/' {kustomization}")
    desk.run("kubectl apply --server-side -k overlays/production")
    eventually(lambda: not desk.world.pods[2].ready)
    first, pods, log, *undo = sections()["Broken revision"]
    assert "timed out" in desk.run(first.replace("60s", "2s"), fails=True)
    assert desk.world.pods[0].ready
    assert desk.world.pods[1].ready
    assert "ps-2" in desk.run(pods)
    assert "ImagePullBackOff" in desk.run(log)
    for command in undo:
        desk.run(command)
    assert all(pod.ready for pod in desk.world.pods.values())
    assert desk.pushes() == 1
    desk.world.images = {"0.3.0", "0.3.1"}
    plain = "kubectl apply --server-side -k overlays/production"
    assert "conflict" in desk.run(plain, fails=True)  # why the runbook has --force-conflicts
    desk.follow("Start")
    image = "registry.example.com/embedding-ps:0.3.1"
    (container,) = desk.world.template()["spec"]["containers"]
    assert container["image"] == image
    assert desk.pushes() == 1


def test_lost_node(shared: Desk) -> None:
    before = shared.pushes()
    shared.world.lose("node-1")
    pods, nodes, taint, *rest = sections()["Lost node"]
    assert "ps-1" in shared.run(pods)
    assert "node-1" in shared.run(nodes)
    assert not shared.world.pods[1].ready  # Kubernetes does not start it by itself
    shared.run(taint)
    eventually(lambda: 1 in shared.world.pods and shared.world.pods[1].node != "node-1")
    for command in rest:
        shared.run(command)
    assert shared.pushes() == before


def test_full_disk(tmp_path: Path) -> None:
    with disks.small(64) as disk:
        world = World("main", tmp_path, {1: disk})
        try:
            desk = Desk(tmp_path, [world])
            desk.start()
            desk.run("kubectl exec -n ps ps-0 -- psctl checkpoint monday")
            _fill(disk)
            with world.client(timeout=2.0) as client:
                with pytest.raises(ResourceExhausted) as caught:
                    _push_nothing(client.table("user"))
                assert caught.value.reason == "DISK_FULL"
            desk.run("kubectl delete pod ps-1 -n ps")
            desk.run("kubectl rollout status statefulset/ps -n ps --timeout=1m")
            assert desk.pushes() == 1  # a start on a full disk serves pulls
            status, tables, evict, prune = sections()["Full disk"]
            assert "user" in desk.run(tables)
            desk.run(status)
            (disk / "ballast").unlink()  # stands for a larger claim
            desk.push()
            assert desk.pushes() == 2
            desk.run("kubectl exec -n ps ps-0 -- psctl alter user eviction=step_ttl:steps=10")
            desk.run(evict)
            desk.run(prune)
        finally:
            world.close()


def test_growing_a_claim(shared: Desk) -> None:
    pids = {number: pod.process.pid for number, pod in shared.world.pods.items() if pod.process}
    change, _, apply, _ = sections()["Growing a claim"][-4:]
    shared.run(change)
    refusal = shared.run(apply, fails=True)  # why the StatefulSet is replaced
    assert "spec.volumeClaimTemplates cannot be changed" in refusal
    output = shared.follow("Growing a claim")
    assert "fast" in output["kubectl get storageclass"]
    claims = shared.world.api.store.of("PersistentVolumeClaim")
    sizes = {c["metadata"]["name"]: c["spec"]["resources"]["requests"]["storage"] for c in claims}
    assert {sizes[f"data-ps-{number}"] for number in range(3)} == {"100Gi"}
    after = {number: pod.process.pid for number, pod in shared.world.pods.items() if pod.process}
    assert after == pids  # no shard was restarted
    assert shared.pushes() >= 1


def test_slow_shard(shared: Desk) -> None:
    shared.run("kubectl delete pod ps-1 -n ps")  # wherever it is, it comes back on node-1
    shared.run("kubectl rollout status statefulset/ps -n ps --timeout=2m")
    assert shared.world.pods[1].node == "node-1"
    process = shared.world.pods[1].process
    *look, drain, status, uncordon = sections()["Slow shard"]
    for command in look:
        shared.run(command)
    assert "evicting pod ps/ps-1" in shared.run(drain)
    shared.run(status)
    assert shared.world.pods[1].node != "node-1"
    assert shared.world.pods[1].process is not process
    shared.run(uncordon)
    assert shared.pushes() >= 1


@pytest.mark.parametrize("heading", LOOKS)
def test_sections_that_only_look(heading: str, shared: Desk) -> None:
    before = shared.pushes()
    output = shared.follow(heading)
    assert all(output.values())
    assert shared.pushes() == before


def test_wrong_scale(shared: Desk) -> None:
    before = shared.pushes()
    shared.run("kubectl scale statefulset ps -n ps --replicas=5")
    eventually(lambda: len(shared.world.pods) == 5)
    shared.push()  # the additional pods disturb nobody
    pods, log, *rest = sections()["Wrong scale"]
    assert "ps-4" in shared.run(pods)
    eventually(lambda: "checkpoint" in shared.run(log), 30)  # says what to do
    assert not shared.world.pods[3].ready
    for command in rest:
        shared.run(command)
    assert sorted(shared.world.pods) == [0, 1, 2]
    assert shared.pushes() == before + 1


def test_backup_and_restore_to_another_cluster(tmp_path: Path) -> None:
    worlds = [World("main", tmp_path), World("backup", tmp_path)]
    try:
        desk = Desk(tmp_path, worlds)
        desk.start()
        desk.run("sed -i 's/^shards = 3/shards = 2/' base/psserver.toml")
        desk.run("sed -i 's/^  replicas: 3/  replicas: 2/' base/statefulset.yaml")
        desk.run("kubectl --context backup apply --server-side -k overlays/production")
        status = "rollout status statefulset/ps -n ps --timeout=1m"
        desk.run(f"kubectl --context backup {status}")
        desk.follow("Backup and restore to another cluster")
        assert desk.pushes(worlds[1]) == 1
        assert desk.pushes() == 1
    finally:
        for world in worlds:
            world.close()


def test_damaged_block(tmp_path: Path) -> None:
    world = World("main", tmp_path)
    world.flags = {"flush-seconds": 0.2}
    try:
        desk = Desk(tmp_path, [world])
        desk.start()
        desk.run("kubectl exec -n ps ps-0 -- psctl checkpoint monday")
        with world.client() as client:
            eventually(lambda: client.describe_table("user").cache.flushed_rows >= len(KEYS))
        with world.api.store.lock:  # until then, the controller does not start it again
            world.pods[1].kill()
            flip(_data_of(world, "data-ps-1"), random.Random(7), 1)
        desk.run("kubectl rollout status statefulset/ps -n ps --timeout=2m")
        verify, repair, again, checkpoint = sections()["Damaged block"]
        desk.run(verify, fails=True)
        with world.client() as client, pytest.raises(DataLoss):
            client.table("user").pull(KEYS)
        assert "0 left" in desk.run(repair)
        assert desk.pushes() == 1
        with world.client() as client:
            eventually(lambda: not client.describe_table("user").damaged_blocks)
        assert "undamaged" in desk.run(again)
        desk.run(checkpoint)
    finally:
        world.close()


def _data_of(world: World, claim: str) -> Path:
    """Return the directory of a claim."""
    uid = world.api.store.get(("PersistentVolumeClaim", "ps", claim))["metadata"]["uid"]
    (data,) = (path for path in world.volumes(uid) if path.exists())
    return data


def test_the_list_of_procedures_has_every_section() -> None:
    text = (ROOT / "docs" / "operating.md").read_text()
    (listed,) = re.findall(r"^## Procedures$(.*?)^## ", text, re.M | re.S)
    links = set(re.findall(r"runbook\.md#([\w-]+)", listed))
    assert links == {heading.lower().replace(" ", "-") for heading in sections()}


def test_every_section_with_commands_has_a_test() -> None:
    tested = {name.removeprefix("test_").replace("_", " ") for name in globals()}
    assert {heading.lower() for heading in set(sections()) - set(LOOKS)} <= tested
    assert set(LOOKS) <= set(sections())


def _push_nothing(table: Table) -> None:
    """Push zeros, which change no row, many times: more than the log has room for."""
    for _ in range(10_000):
        table.push(KEYS, np.zeros((len(KEYS), DIM), np.float32))


def _fill(disk: Path) -> None:
    """Write a file that takes all space of a disk."""
    with (disk / "ballast").open("wb") as ballast:
        try:
            while True:
                ballast.write(b"\0" * 65536)
                ballast.flush()
        except OSError:
            pass
