"""A small Kubernetes API server, so that the commands of the runbook run with the real kubectl.

It stores objects, merges patches, streams watches, and refuses changes that Kubernetes refuses. It
runs nothing: a controller is called after each change.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import yaml
from checks_changes import refused
from helmsecrets import MARK, decode_secret
from rendering import Object

# kind -> (API group, name in URLs, whether it is in a namespace); all have the version v1
RESOURCES = {
    "Namespace": ("", "namespaces", False),
    "Node": ("", "nodes", False),
    "Pod": ("", "pods", True),
    "Service": ("", "services", True),
    "ServiceAccount": ("", "serviceaccounts", True),
    "ConfigMap": ("", "configmaps", True),
    "Secret": ("", "secrets", True),
    "PersistentVolumeClaim": ("", "persistentvolumeclaims", True),
    "StatefulSet": ("apps", "statefulsets", True),
    "ControllerRevision": ("apps", "controllerrevisions", True),
    "DaemonSet": ("apps", "daemonsets", True),
    "PodDisruptionBudget": ("policy", "poddisruptionbudgets", True),
    "NetworkPolicy": ("networking.k8s.io", "networkpolicies", True),
    "StorageClass": ("storage.k8s.io", "storageclasses", False),
    "PodMonitor": ("monitoring.coreos.com", "podmonitors", True),
    "PrometheusRule": ("monitoring.coreos.com", "prometheusrules", True),
}
SHORT = {"persistentvolumeclaims": ["pvc"], "statefulsets": ["sts"]}
PATH = re.compile(
    r"/(?:api/v1|apis/(?P<group>[\w.]+)/v1)(?:/namespaces/(?P<namespace>[\w-]+)(?=/\w))?"
    r"/(?P<plural>\w+)(?:/(?P<name>[\w.-]+))?(?:/(?P<sub>\w+))?"
)
Key = tuple[str, str, str]  # kind, namespace ("" if in none), name


class Refusal(Exception):
    """A request that is answered with an error: HTTP status, reason and message."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class Store:
    """The objects, by kind, namespace and name. Use it while holding ``lock``."""

    def __init__(self) -> None:
        self.objects: dict[Key, Object] = {}
        self.changed_by_others: set[Key] = set()  # by other commands than apply
        self.lock = threading.RLock()
        self._numbers = itertools.count(1)

    def put(self, new: Object) -> Object:
        """Create or replace an object. Raises Refusal for a change of a fixed field."""
        key = key_of(new)
        old = self.objects.get(key)
        metadata = new["metadata"]
        metadata["resourceVersion"] = str(next(self._numbers))
        if old is None:
            metadata["uid"] = f"uid-{next(self._numbers)}"
            metadata["generation"] = 1
            metadata["creationTimestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        else:
            for what in refused([old], [new]):
                raise Refusal(422, "Invalid", what)
            changed = old.get("spec") != new.get("spec")
            metadata["generation"] = old["metadata"].get("generation", 1) + changed
            for field in ("uid", "creationTimestamp"):
                metadata[field] = old["metadata"][field]
        self.objects[key] = new
        return new

    def get(self, key: Key) -> Object:
        """Return an object. Raises Refusal if there is none."""
        if key not in self.objects:
            raise Refusal(404, "NotFound", f"{key[0]} {key[2]!r} not found")
        return self.objects[key]

    def of(self, kind: str) -> list[Object]:
        """Return all objects of a kind, by name."""
        return [self.objects[key] for key in sorted(self.objects) if key[0] == kind]

    def version(self) -> str:
        """Return a number that is larger than that of each change so far."""
        return str(next(self._numbers))


def key_of(each: Object) -> Key:
    """Return the key under which an object is stored."""
    inside = RESOURCES[each["kind"]][2]
    namespace = each["metadata"].get("namespace", "default") if inside else ""
    return each["kind"], namespace, each["metadata"]["name"]


def merge(old: Any, patch: Any) -> Any:
    """Return ``old`` with a strategic merge patch applied; lists of named items merge by name."""
    if isinstance(patch, list) and isinstance(old, list) and all("name" in p for p in patch):
        items = {item["name"]: item for item in old}
        for item in patch:
            items[item["name"]] = merge(items.get(item["name"]), item)
        return list(items.values())
    if not isinstance(patch, dict):
        return patch
    plain = {name: value for name, value in patch.items() if not name.startswith("$")}
    if not isinstance(old, dict) or patch.get("$patch") == "replace":
        return plain
    merged = dict(old)
    for name, value in plain.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge(old.get(name), value)
    return merged


class Api:
    """The server: ``url`` is its address, ``store`` has its objects.

    changed  called after each request that changes something, while ``store.lock`` is held
    removed  called for each object that was deleted, also while the lock is held
    """

    def __init__(
        self, changed: Callable[[], object], removed: Callable[[Object, str], object]
    ) -> None:
        self.store = Store()
        self.changed, self.removed = changed, removed
        self.closed = threading.Event()
        handler = type("Handler", (_Handler,), {"api": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the server; end all watches."""
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    def delete(self, key: Key, policy: str = "") -> Object:
        """Delete an object. policy "Orphan": the caller keeps what belongs to it."""
        gone = self.store.get(key)
        del self.store.objects[key]
        self.store.changed_by_others.discard(key)
        self.removed(gone, policy)
        return gone


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of kubectl."""

    protocol_version = "HTTP/1.1"
    api: Api

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        found = urlsplit(self.path)
        query = dict(parse_qsl(found.query))
        if (page := _discovery(found.path)) is not None:
            self._answer(200, page)
        elif query.get("watch") in ("1", "true"):
            self._watch(query)
        else:
            self._try(lambda key, sub: self._read(key, sub, query))

    def do_POST(self) -> None:
        body = self._body()

        def post(key: Key, sub: str) -> Object:
            if sub == "eviction":
                self.api.delete(key)
                self.api.changed()
                return {"kind": "Status", "apiVersion": "v1", "status": "Success"}
            return self._write(body)

        self._try(post, named=False)

    def do_PUT(self) -> None:
        body = self._body()

        def replace(key: Key, sub: str) -> Object:
            self.api.store.changed_by_others.add(key)
            return self._write(body)

        self._try(replace)

    def do_PATCH(self) -> None:
        body, apply = self._body(), "apply" in self.headers["Content-Type"]
        force = ("force", "true") in parse_qsl(urlsplit(self.path).query)

        def patch(key: Key, sub: str) -> Object:
            if apply:
                return self._apply(key, body, force)
            old = self.api.store.get(key)
            self.api.store.changed_by_others.add(key)
            return self._write(merge(_scale(old) if sub == "scale" else old, body))

        self._try(patch)

    def do_DELETE(self) -> None:
        body = self._body()

        def delete(key: Key, sub: str) -> Object:
            gone = self.api.delete(key, body.get("propagationPolicy", ""))
            self.api.changed()
            return gone

        self._try(delete)

    def _apply(self, key: Key, body: Object, force: bool) -> Object:
        """Store an applied object. Only ``force`` overwrites what another command has changed."""
        store = self.api.store
        old = store.objects.get(key, {})
        if force:
            store.changed_by_others.discard(key)
        elif key in store.changed_by_others and old.get("spec") != body.get("spec"):
            raise Refusal(409, "Conflict", f"conflict: another command has changed {key[2]!r}")
        return self._write({**({"status": old["status"]} if "status" in old else {}), **body})

    def _read(self, key: Key, sub: str, query: dict[str, str]) -> Object | str:
        """Return an object, a list of objects, a scale or a log."""
        store = self.api.store
        if not key[2]:
            items = [each for each in store.of(key[0]) if _matches(each, key[1], query)]
            group = RESOURCES[key[0]][0]
            version = f"{group}/v1".lstrip("/")
            metadata = {"resourceVersion": store.version()}
            return {"kind": f"{key[0]}List", "apiVersion": version} | {
                "metadata": metadata,
                "items": items,
            }
        found = store.get(key)
        if sub == "log":
            return str(found["metadata"]["annotations"].get("log", ""))
        return _scale(found) if sub == "scale" else found

    def _write(self, new: Object) -> Object:
        """Store an object, or the number of replicas from a scale; let the controller run."""
        new = json.loads(json.dumps(new))
        if new["kind"] == "Scale":
            key = ("StatefulSet", new["metadata"]["namespace"], new["metadata"]["name"])
            target = json.loads(json.dumps(self.api.store.get(key)))
            target["spec"]["replicas"] = new["spec"]["replicas"]
            self.api.store.put(target)
            self.api.changed()
            return new
        stored = self.api.store.put(new)
        self.api.changed()
        return stored

    def _try(self, action: Callable[[Key, str], Object | str], *, named: bool = True) -> None:
        """Run an action for the object in the URL, and answer with its result or its refusal."""
        try:
            kind, namespace, name, sub = _target(urlsplit(self.path).path)
            with self.api.store.lock:
                result = action((kind, namespace, name), sub)
                body = result if isinstance(result, str) else json.dumps(result)
            self._send(200, body, "text/plain" if isinstance(result, str) else "application/json")
        except Refusal as refusal:
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
            status |= {"reason": refusal.reason, "message": str(refusal), "code": refusal.status}
            self._answer(refusal.status, status)

    def _watch(self, query: dict[str, str]) -> None:
        """Stream the changes of the objects that the query selects, as lines of JSON."""
        if "sendInitialEvents" in query:
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
            status |= {"reason": "Invalid", "message": "no sendInitialEvents", "code": 422}
            return self._answer(422, status)
        kind, namespace, _, _ = _target(urlsplit(self.path).path)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        seen: dict[str, str] = {}
        deadline = time.monotonic() + float(query.get("timeoutSeconds", "60"))
        while not self.api.closed.is_set() and time.monotonic() < deadline:
            for event in self._events(kind, namespace, query, seen):
                try:
                    self.wfile.write(json.dumps(event).encode() + b"\n")
                    self.wfile.flush()
                except OSError:
                    return None
            time.sleep(0.05)
        return None

    def _events(
        self, kind: str, namespace: str, query: dict[str, str], seen: dict[str, str]
    ) -> list[Object]:
        """Return the changes since the last call. seen: uid -> version, updated here."""
        with self.api.store.lock:
            all_of = self.api.store.of(kind)
            found = [json.loads(json.dumps(o)) for o in all_of if _matches(o, namespace, query)]
        events = []
        for each in found:
            uid, version = each["metadata"]["uid"], each["metadata"]["resourceVersion"]
            if seen.get(uid) != version:
                events.append({"type": "MODIFIED" if uid in seen else "ADDED", "object": each})
            seen[uid] = version
        for uid in seen.keys() - {each["metadata"]["uid"] for each in found}:
            del seen[uid]
            gone = {"kind": kind, "apiVersion": "v1", "metadata": {"uid": uid, "name": "gone"}}
            events.append({"type": "DELETED", "object": gone})
        return events

    def _body(self) -> Any:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if content.startswith(MARK):
            return decode_secret(content, _target(urlsplit(self.path).path)[1])
        return yaml.safe_load(content) or {}

    def _answer(self, status: int, page: Object) -> None:
        self._send(status, json.dumps(page), "application/json")

    def _send(self, status: int, body: str, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())


def _target(path: str) -> tuple[str, str, str, str]:
    """Return (kind, namespace, name, subresource) of a URL; "" for what it does not have."""
    match = PATH.fullmatch(path)
    for kind, (group, plural, inside) in RESOURCES.items():
        if match and plural == match["plural"] and group == (match["group"] or ""):
            namespace = (match["namespace"] or "") if inside else ""
            return kind, namespace, match["name"] or "", match["sub"] or ""
    raise Refusal(404, "NotFound", f"the server could not find {path}")


def _matches(each: Object, namespace: str, query: dict[str, str]) -> bool:
    """Return whether an object is in the namespace, and satisfies the selectors of a query."""
    metadata = each["metadata"]
    if namespace and metadata.get("namespace", "") != namespace:
        return False
    fields = {
        "metadata.name": metadata["name"],
        "spec.nodeName": each.get("spec", {}).get("nodeName", ""),
    }
    for selector, values in (
        (query.get("fieldSelector", ""), fields),
        (query.get("labelSelector", ""), metadata.get("labels", {})),
    ):
        for part in filter(None, selector.split(",")):
            name, _, value = part.partition("=")
            if values.get(name) != value.lstrip("="):
                return False
    return True


def _scale(target: Object) -> Object:
    """Return the subresource that `kubectl scale` reads and writes."""
    metadata = {name: target["metadata"][name] for name in ("name", "namespace", "resourceVersion")}
    replicas = target["spec"]["replicas"]
    status = {"replicas": target.get("status", {}).get("replicas", 0)}
    return {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata} | {
        "spec": {"replicas": replicas},
        "status": status,
    }


def _discovery(path: str) -> Object | None:
    """Return the page that tells kubectl which kinds there are; None if the path is not one."""
    groups = sorted({group for group, _, _ in RESOURCES.values()} - {""})
    if path == "/version":
        return {"major": "1", "minor": "37", "gitVersion": "v1.37.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = [{"groupVersion": f"{group}/v1", "version": "v1"} for group in groups]
        found = [
            {"name": group, "versions": [version], "preferredVersion": version}
            for group, version in zip(groups, versions, strict=True)
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": found}
    for group in ["", *groups]:
        if path == (f"/apis/{group}/v1" if group else "/api/v1"):
            version = f"{group}/v1".lstrip("/")
            page = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version}
            return page | {"resources": list(_resources(group))}
    return None


def _resources(group: str) -> Iterator[Object]:
    """Yield the description of each kind of a group, and of its subresources."""
    verbs = ["get", "list", "watch", "create", "update", "patch", "delete"]
    for kind, (of, plural, inside) in RESOURCES.items():
        if of != group:
            continue
        found = {"name": plural, "kind": kind, "namespaced": inside, "verbs": verbs}
        yield found | {"singularName": kind.lower(), "shortNames": SHORT.get(plural, [])}
    if not group:
        eviction = {"group": "policy", "version": "v1", "kind": "Eviction", "verbs": ["create"]}
        yield {"name": "pods/eviction", "namespaced": True, "singularName": ""} | eviction
    if group == "apps":
        scale = {"group": "autoscaling", "version": "v1", "kind": "Scale", "verbs": verbs}
        yield {"name": "statefulsets/scale", "namespaced": True, "singularName": ""} | scale
