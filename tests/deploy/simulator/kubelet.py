"""Runs the pods of a ControlPlane: volumes, init containers, probes, restarts and the end.

``Kubelet.step`` never waits: the caller repeats it. What it runs and probes is behind the protocols
Runtime and Prober, so that tests can give it containers that do not exist.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from tests.deploy.simulator.controlplane import ControlPlane
from tests.deploy.simulator.objects import Object, name_of
from tests.deploy.simulator.probing import Backoff, Probe, numbered

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


class NotYet(Exception):
    """Raised if a pod cannot start before something else happens, for example a ConfigMap exists.

    The kubelet tries again with each step.
    """


class Process(Protocol):
    """A container that was started."""

    def poll(self) -> int | None:
        """Return its exit status, 128 + the signal that killed it, or None while it runs."""

    def terminate(self) -> None:
        """Send SIGTERM to its first process."""

    def kill(self) -> None:
        """Send SIGKILL to its first process."""


class Runtime(Protocol):
    """Makes the surroundings of pods, and starts containers in them."""

    def set_up(self, pod: Object) -> str:
        """Make a pod's network and volumes. Return its address. Raises NotYet."""

    def start(self, pod: Object, container: Object, attempt: int) -> Process: ...

    def lose(self, pod: Object) -> None:
        """Cut a pod's network."""

    def tear_down(self, pod: Object) -> None:
        """Remove a pod's network and volumes, except those of claims."""


class Prober(Protocol):
    """Sends probes without waiting for their results."""

    def ask(self, key: str, address: str, probe: Object) -> None: ...

    def answer(self, key: str) -> bool | None:
        """Return the result of a probe and forget it; None if there is none yet."""


class Container:
    """One container of a pod: its process, probes and restarts.

    restart  whether it is started again after it ended
    """

    def __init__(self, pod: Pod, spec: Object, *, restart: bool) -> None:
        self.spec, self.restarts, self.exit_code = spec, 0, 0
        self.started = self.ready = self.done = False
        self.process: Process | None = None
        self._pod, self._restart = pod, restart
        self._probes: dict[str, Probe] = {}
        self._backoff = Backoff()
        self._at = 0.0  # time of the last start
        self._next = 0.0  # time of the next start
        self._kill_at: float | None = None

    def step(self, now: float) -> None:
        if self.process is None:
            if not self.done and now >= self._next:
                self._start(now)
            return
        status = self.process.poll()
        if status is not None:
            self._ended(status, now)
        elif self._kill_at is not None:
            if now >= self._kill_at:
                self._pod.say(f"container {self.spec['name']} killed after its grace period")
                self.process.kill()
                self._kill_at = now + 3600
        else:
            self._probe(now)

    def _start(self, now: float) -> None:
        self.process = self._pod.start(self.spec, self.restarts)
        self._at = now
        found = {kind: numbered(self.spec, kind) for kind in PROBES if kind in self.spec}
        self._probes = {
            kind: Probe(spec, now, passed=kind == "livenessProbe") for kind, spec in found.items()
        }
        self.started = "startupProbe" not in found
        self.ready = self.started and "readinessProbe" not in found

    def _ended(self, status: int, now: float) -> None:
        self.process, self._kill_at, self.exit_code = None, None, status
        self.started = self.ready = False
        self._pod.say(f"container {self.spec['name']} ended with status {status}")
        if not self._restart or self._pod.terminating:
            self.done = True
            return
        delay = self._backoff.delay(now - self._at)
        self._next = now + delay
        self.restarts += 1
        self._pod.say(f"restart {self.restarts} in {delay:.0f} s")

    def _probe(self, now: float) -> None:
        kinds = PROBES[1:] if self.started else PROBES[:1]
        for kind, probe in self._probes.items():
            key = f"{self._pod.uid}/{self.spec['name']}/{self.restarts}/{kind}"
            good = self._pod.prober.answer(key)
            if good is not None and kind in kinds:
                self._use(kind, probe, good, now)
            if kind in kinds and self._kill_at is None and probe.is_due(now):
                self._pod.prober.ask(key, self._pod.address, probe.spec)

    def _use(self, kind: str, probe: Probe, good: bool, now: float) -> None:
        """Act on one result of a probe."""
        failed = probe.record(good)
        if kind == "readinessProbe":
            self.ready = probe.passed
        elif failed:
            self._pod.say(f"{kind} failed")
            self.stop(now + self._pod.grace)
        elif kind == "startupProbe" and probe.passed:
            self.started = True
            self.ready = "readinessProbe" not in self._probes
            self._pod.say(f"started after {now - self._at:.1f} s")

    def again(self, at: float) -> None:
        """Start the container again at the time ``at``, although it ended."""
        self.done, self._next = False, at

    def stop(self, kill_at: float) -> None:
        """Send SIGTERM, and SIGKILL at the time ``kill_at``."""
        if self.process is None:
            self.done = self.done or self._pod.terminating
        elif self._kill_at is None or kill_at < self._kill_at:
            self._kill_at = kill_at
            self.process.terminate()

    def status(self) -> Object:
        state: Object = {"running": {}}
        if self.process is None:
            state = {"waiting": {"reason": "CrashLoopBackOff" if self.restarts else "Creating"}}
        if self.done:
            state = {"terminated": {"exitCode": self.exit_code}}
        return {
            "name": self.spec["name"],
            "ready": self.ready,
            "started": self.started,
            "restartCount": self.restarts,
            "state": state,
        }


class Pod:
    """One pod, from the moment at which its node accepts it until nothing of it is left.

    say  receives one line per thing that happens to the pod
    """

    def __init__(
        self, thing: Object, runtime: Runtime, prober: Prober, say: Callable[[str], None]
    ) -> None:
        self.object, self.prober, self.say = thing, prober, say
        self.uid: str = thing["metadata"]["uid"]
        self.address = ""
        self.terminating = self.lost = False
        self.grace: float = thing["spec"].get("terminationGracePeriodSeconds", 30)
        spec = thing["spec"]
        again = spec.get("restartPolicy", "Always") == "Always"
        self.inits = [Container(self, one, restart=False) for one in spec.get("initContainers", ())]
        self.containers = [Container(self, one, restart=again) for one in spec["containers"]]
        self._runtime = runtime
        self._reason = ""  # why the pod cannot start yet
        self._ready_since: float | None = None
        self._stop_at = self._end_at = 0.0  # times of SIGTERM and SIGKILL, if terminating

    def start(self, container: Object, attempt: int) -> Process:
        return self._runtime.start(self.object, container, attempt)

    def step(self, now: float) -> None:
        if self.lost:
            return
        if not self.address and not self.terminating:
            try:
                self.address = self._runtime.set_up(self.object)
            except NotYet as reason:
                self._reason = str(reason)
                return
        for one in self.inits:
            one.step(now)
            if one.done and one.exit_code and not self.terminating:
                self.say(f"init container {one.spec['name']} failed: again in 10 s")
                one.again(now + 10)
            if not one.done:
                return
        for one in self.containers:
            one.step(now)
        ready = bool(self.address) and all(one.ready for one in self.containers)
        if ready != (self._ready_since is not None):
            self._ready_since = now if ready else None
            self.say("ready" if ready else "not ready")

    def terminate(self, now: float, grace: float) -> None:
        """Stop all containers, within ``grace`` seconds in all."""
        if not self.terminating:
            self.say(f"terminating, {grace:.0f} s at most")
            self.terminating = True
            self._end_at = now + grace
            for one in self.inits:
                one.stop(self._end_at)
            self._stop_at = now + min(self._pause(), grace)
        if now >= self._stop_at:
            for one in self.containers:
                one.stop(self._end_at)

    def _pause(self) -> float:
        """Return the seconds that the preStop hooks sleep. Other hooks are not simulated."""
        hooks = [one.spec.get("lifecycle", {}).get("preStop", {}) for one in self.containers]
        for hook in hooks:
            if hook.keys() - {"sleep"}:
                raise NotImplementedError(f"the simulator has no preStop hook {sorted(hook)}")
        return max((hook["sleep"]["seconds"] for hook in hooks if hook), default=0.0)

    def lose(self) -> None:
        """Let the node of this pod disappear: no packet leaves it, and nothing is reported."""
        self.lost = True
        self._runtime.lose(self.object)
        self.kill()

    def kill(self) -> None:
        """Send SIGKILL to the first process of each container."""
        for one in (*self.inits, *self.containers):
            if one.process is not None:
                one.process.kill()

    def is_over(self) -> bool:
        """Return whether no process of the pod runs any more."""
        every = (*self.inits, *self.containers)
        return all(one.process is None or one.process.poll() is not None for one in every)

    def status(self) -> Object:
        phase = "Running" if self.address and all(one.done for one in self.inits) else "Pending"
        if self.containers and all(one.done for one in self.containers):
            failed = any(one.exit_code for one in self.containers)
            phase = "Failed" if failed else "Succeeded"
        found: Object = {"phase": phase, "reason": self._reason if phase == "Pending" else ""}
        found["conditions"] = [{"type": "Ready", "status": "False"}]
        if self._ready_since is not None:
            ready = {"type": "Ready", "status": "True", "lastTransitionTime": self._ready_since}
            found["conditions"] = [ready]
        found["containerStatuses"] = [one.status() for one in self.containers]
        if self.address:
            found["podIP"] = self.address
        return found


class Kubelet:
    """Runs every pod of a control plane, as if on a node of its own.

    cordoned  True: pods that are not here yet stay pending
    """

    def __init__(
        self,
        control: ControlPlane,
        runtime: Runtime,
        prober: Prober,
        clock: Callable[[], float],
        say: Callable[[str], None],
    ) -> None:
        self.cordoned = False
        self._control, self._runtime, self._prober = control, runtime, prober
        self._clock, self._say = clock, say
        self._pods: dict[str, Pod] = {}  # uid -> pod

    def step(self) -> None:
        now, there = (
            self._clock(),
            {one["metadata"]["uid"]: one for one in self._control.snapshot()},
        )
        for uid, thing in there.items():
            if uid not in self._pods:
                self._accept(uid, thing)
        for uid, pod in list(self._pods.items()):
            self._advance(pod, there.get(uid), now)

    def _accept(self, uid: str, thing: Object) -> None:
        if "deletionTimestamp" in thing["metadata"]:
            self._control.remove(uid)  # it was deleted before a node had it
        elif not self.cordoned:
            name = name_of(thing)
            self._pods[uid] = Pod(
                thing, self._runtime, self._prober, lambda text: self._say(f"{name}: {text}")
            )

    def _advance(self, pod: Pod, thing: Object | None, now: float) -> None:
        """Let a pod do what it can do now. thing: its object; None if somebody removed it."""
        if thing is None:
            pod.terminating = True
            pod.kill()
        elif "deletionTimestamp" in thing["metadata"] and not pod.lost:
            pod.terminate(now, thing["metadata"]["deletionGracePeriodSeconds"])
        pod.step(now)
        if pod.terminating and pod.is_over():
            self._runtime.tear_down(pod.object)
            del self._pods[pod.uid]
            self._control.remove(pod.uid)
        elif not pod.lost:
            self._control.report(pod.uid, pod.status())

    def find(self, name: str) -> Pod:
        """Return the pod of this name that is not terminating. Raises LookupError."""
        for pod in self._pods.values():
            if name_of(pod.object) == name and not pod.terminating:
                return pod
        raise LookupError(f"no pod {name} runs here")

    def close(self) -> None:
        """Kill all containers and remove everything of the pods."""
        for pod in self._pods.values():
            pod.kill()
        for pod in self._pods.values():
            while not pod.is_over():
                time.sleep(0.01)
            self._runtime.tear_down(pod.object)
        self._pods.clear()
