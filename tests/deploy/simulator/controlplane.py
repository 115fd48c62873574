"""The part of a Kubernetes control plane that the manifests of this project need, in one object.

It stores objects, makes the pods of StatefulSets, allows or refuses evictions, and lists the
addresses behind the names of headless services. It starts no thread and reads no clock but its own
argument: ``step`` is one pass of all controllers. A kubelet reads ``pods`` and calls ``report`` and
``remove``; a person calls the other methods, each of which does what kubectl does:

    apply    kubectl apply            restart  kubectl rollout restart
    delete   kubectl delete pod       undo     kubectl rollout undo
    evict    kubectl drain            scale    kubectl scale
"""

from __future__ import annotations

import copy
import math
import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tests.deploy.simulator import statefulset
from tests.deploy.simulator.objects import (
    Object,
    is_ready,
    is_terminating,
    labels_of,
    name_of,
    phase_of,
    selects,
)

DOMAIN = "svc.cluster.local"


class Refused(Exception):
    """Raised for a request that a real API server answers with an error.

    code  its HTTP status; 429 for an eviction that a PodDisruptionBudget forbids now
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


@dataclass(frozen=True, slots=True)
class Event:
    """One act of the control plane or of a person: when, what and on which object."""

    at: float
    act: str
    name: str


class ControlPlane:
    """Objects of one namespace, and the controllers that act on them.

    clock  returns seconds; all times in objects are times of this clock
    """

    def __init__(self, clock: Callable[[], float], namespace: str = "ps") -> None:
        self.namespace = namespace
        self.events: list[Event] = []
        self._clock = clock
        self._lock = threading.RLock()
        self._objects: dict[tuple[str, str], Object] = {}
        self._revisions: dict[str, Object] = {}  # name -> template
        self._history: dict[str, list[str]] = {}  # name of a set -> revisions, newest last
        self._current: dict[str, str] = {}  # name of a set -> revision below the partition

    # ---- what a person does

    def apply(self, objects: Iterable[Object]) -> None:
        """Create or replace objects. Raises Refused if a field that cannot change changes."""
        with self._lock:
            for one in objects:
                key = one["kind"], name_of(one)
                self._check(one, self._objects.get(key))
                self._objects[key] = copy.deepcopy(one)
                self._note("apply", f"{one['kind']}/{name_of(one)}")

    def _check(self, new: Object, old: Object | None) -> None:
        if new["kind"] == "StatefulSet":
            labels = new["spec"]["template"]["metadata"].get("labels", {})
            if not selects(new["spec"]["selector"], labels):
                raise Refused(422, "spec.selector does not match the labels of spec.template")
        if old is None:
            return
        if new["kind"] == "StatefulSet":
            mutable = {"replicas", "template", "updateStrategy", "minReadySeconds", "ordinals"}
            mutable |= {"revisionHistoryLimit", "persistentVolumeClaimRetentionPolicy"}
            for field in {*new["spec"], *old["spec"]} - mutable:
                if new["spec"].get(field) != old["spec"].get(field):
                    raise Refused(422, f"spec.{field} of a StatefulSet cannot be changed")
        if new["kind"] == "ConfigMap" and old.get("immutable") and new["data"] != old["data"]:
            raise Refused(422, f"the ConfigMap {name_of(new)} is immutable")

    def change(self, kind: str, name: str, edit: Callable[[Object], object]) -> None:
        """Let ``edit`` change a copy of an object, and apply the copy."""
        with self._lock:
            copied = copy.deepcopy(self.get(kind, name))
            edit(copied)
            self.apply([copied])

    def scale(self, name: str, replicas: int) -> None:
        self.change("StatefulSet", name, lambda one: one["spec"].update(replicas=replicas))

    def restart(self, name: str) -> None:
        """Make a revision that differs from the last one in an annotation alone."""

        def edit(one: Object) -> None:
            metadata = one["spec"]["template"].setdefault("metadata", {})
            at = {"kubectl.kubernetes.io/restartedAt": str(self._clock())}
            metadata["annotations"] = {**(metadata.get("annotations") or {}), **at}

        self.change("StatefulSet", name, edit)

    def undo(self, name: str) -> None:
        """Give a set the template of its previous revision. Raises Refused if there is none."""
        with self._lock:
            self._sync_revision(self.get("StatefulSet", name))
            history = self._history[name]
            if len(history) < 2:
                raise Refused(422, f"the StatefulSet {name} has no previous revision")
            template = copy.deepcopy(self._revisions[history[-2]])
            self.change("StatefulSet", name, lambda one: one["spec"].update(template=template))

    def delete(self, name: str, grace: float | None = None) -> None:
        """Delete a pod.

        grace  seconds until it is killed; None: those of the pod; 0: remove it now, whatever its
               node does
        """
        with self._lock:
            pod = self.get("Pod", name)
            if grace == 0:
                self._note("remove", name)
                del self._objects["Pod", name]
            elif not is_terminating(pod):
                self._note("delete", name)
                default = pod["spec"].get("terminationGracePeriodSeconds", 30)
                pod["metadata"]["deletionTimestamp"] = self._clock()
                pod["metadata"]["deletionGracePeriodSeconds"] = default if grace is None else grace

    def evict(self, name: str) -> None:
        """Delete a pod if the PodDisruptionBudgets allow it. Raises Refused with code 429."""
        with self._lock:
            pod = self.get("Pod", name)
            budgets = [
                one
                for one in self.all("PodDisruptionBudget")
                if selects(one["spec"]["selector"], labels_of(pod))
            ]
            if len(budgets) > 1:
                raise Refused(500, f"the pod {name} has more than one PodDisruptionBudget")
            for budget in budgets:
                self._spend(budget["spec"], pod)
            self.delete(name)

    def _spend(self, budget: Object, pod: Object) -> None:
        """Raise Refused with code 429 unless a budget allows the eviction of a pod."""
        if phase_of(pod) == "Pending" or is_terminating(pod):
            return
        chosen = [one for one in self.pods() if selects(budget["selector"], labels_of(one))]
        healthy = sum(is_ready(one) and not is_terminating(one) for one in chosen)
        owners = {one["metadata"]["ownerReferences"][0]["name"] for one in chosen}
        expected = sum(self.get("StatefulSet", one)["spec"].get("replicas", 1) for one in owners)
        if "minAvailable" in budget:
            desired = _share(budget["minAvailable"], expected)
        else:
            desired = max(0, expected - _share(budget["maxUnavailable"], expected))
        always = budget.get("unhealthyPodEvictionPolicy") == "AlwaysAllow"
        if not is_ready(pod) and (always or healthy >= desired > 0):
            return
        if healthy - desired < 1:
            raise Refused(429, "the eviction would violate the PodDisruptionBudget")

    # ---- what a kubelet does

    def report(self, uid: str, status: Object) -> None:
        """Store the status of a pod, if it still exists."""
        with self._lock:
            for pod in self.pods():
                if pod["metadata"]["uid"] == uid:
                    was = is_ready(pod)
                    pod["status"] = copy.deepcopy(status)
                    if is_ready(pod) != was:
                        self._note("unready" if was else "ready", name_of(pod))

    def remove(self, uid: str) -> None:
        """Remove a terminating pod, all of whose containers have ended."""
        with self._lock:
            for pod in self.pods():
                if pod["metadata"]["uid"] == uid:
                    self.delete(name_of(pod), grace=0)

    # ---- what anybody reads

    def get(self, kind: str, name: str) -> Object:
        """Return the stored object itself. Raises Refused with code 404."""
        with self._lock:
            found = self._objects.get((kind, name))
            if found is None:
                raise Refused(404, f"there is no {kind} {name}")
            return found

    def all(self, kind: str) -> list[Object]:
        with self._lock:
            return [one for (each, _), one in self._objects.items() if each == kind]

    def pods(self) -> list[Object]:
        return self.all("Pod")

    def snapshot(self) -> list[Object]:
        """Return copies of all pods."""
        with self._lock:
            return copy.deepcopy(self.pods())

    def is_rolled_out(self, name: str) -> bool:
        """Return whether all pods of a set are updated and available."""
        with self._lock:
            one = self.get("StatefulSet", name)
            rules, update = statefulset.Rules.of(one), statefulset.revision(one)
            return statefulset.is_rolled_out(rules, self._of(one), update, self._clock())

    def names(self) -> dict[str, list[str]]:
        """Return the addresses behind each DNS name.

        A name without addresses is there too, with an empty list, if its service exists.
        """
        found: dict[str, list[str]] = {}
        with self._lock:
            for service in self.all("Service"):
                zone = f"{name_of(service)}.{self.namespace}.{DOMAIN}"
                found[zone] = []
                for pod in self._behind(service):
                    address = pod["status"]["podIP"]
                    found[zone].append(address)
                    if pod["spec"].get("subdomain") == name_of(service):
                        found[f"{pod['spec']['hostname']}.{zone}"] = [address]
        return found

    def _behind(self, service: Object) -> list[Object]:
        """Return the pods whose addresses a service publishes."""
        spec = service["spec"]
        always = spec.get("publishNotReadyAddresses", False)
        return [
            pod
            for pod in self.pods()
            if selects(spec.get("selector") or {}, labels_of(pod))
            and pod.get("status", {}).get("podIP")
            and phase_of(pod) not in ("Failed", "Succeeded")
            and (always or (is_ready(pod) and not is_terminating(pod)))
        ]

    # ---- controllers

    def step(self) -> None:
        """Let each StatefulSet do what it can do now."""
        with self._lock:
            for one in self.all("StatefulSet"):
                update = self._sync_revision(one)
                rules, pods = statefulset.Rules.of(one), self._of(one)
                current = self._current[name_of(one)]
                steps = statefulset.next_steps(rules, pods, current, update, self._clock())
                for ordinal, revision in steps.create:
                    self._create(one, ordinal, revision)
                for name in steps.delete:
                    self.delete(name)
                if rules.partition == 0 and self.is_rolled_out(name_of(one)):
                    self._current[name_of(one)] = update

    def _sync_revision(self, one: Object) -> str:
        """Record the revision of a set's template as its newest; return its name."""
        update = statefulset.revision(one)
        self._revisions.setdefault(update, copy.deepcopy(one["spec"]["template"]))
        history = self._history.setdefault(name_of(one), [])
        if not history or history[-1] != update:
            history[:] = [each for each in history if each != update] + [update]
        self._current.setdefault(name_of(one), update)
        return update

    def _of(self, one: Object) -> dict[int, Object]:
        """Return the pods of a set by ordinal."""
        found = ((statefulset.ordinal_of(one, pod), pod) for pod in self.pods())
        return {ordinal: pod for ordinal, pod in found if ordinal is not None}

    def _create(self, one: Object, ordinal: int, revision: str) -> None:
        pod = statefulset.new_pod(one, self._revisions[revision], ordinal, revision)
        pod["metadata"] |= {"uid": str(uuid.uuid4()), "namespace": self.namespace}
        for template in one["spec"].get("volumeClaimTemplates", ()):
            claim = f"{name_of(template)}-{name_of(pod)}"
            made = {"metadata": {"name": claim}, "spec": template["spec"]}
            self._objects.setdefault(("PersistentVolumeClaim", claim), made)
        self._objects["Pod", name_of(pod)] = pod
        self._note("create", name_of(pod))

    def _note(self, act: str, name: str) -> None:
        self.events.append(Event(self._clock(), act, name))


def _share(value: int | str, of: int) -> int:
    """Return a number of pods that is given as a number or as a percentage, rounded up."""
    if isinstance(value, str):
        return math.ceil(int(value.removesuffix("%")) * of / 100)
    return value
