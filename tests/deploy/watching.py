"""A real Prometheus, a real Alertmanager and a webhook, as processes on this machine."""

from __future__ import annotations

import json
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from servers import eventually, free_ports
from tools import program

Series = dict[str, Any]  # one series of an answer of Prometheus: "metric" has its labels


class Daemon:
    """A program that serves HTTP on a local port, from its creation to ``stop``."""

    def __init__(self, name: str, directory: Path, flags: Sequence[str], port: int) -> None:
        self.name, self.port, self._output = name, port, directory / f"{name}.out"
        with self._output.open("wb") as output:
            command = [program(name, in_ci=False), *flags]
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            eventually(self._is_ready)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the program."""
        self._process.terminate()
        self._process.wait(30)

    def get(self, path: str, **query: Any) -> Any:
        """Return the answer, in JSON, to a GET request."""
        url = f"http://127.0.0.1:{self.port}{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from error

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, f"{self.name} ended: {self._output.read_text()}"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=10).close()
        except OSError:
            return False
        return True


class Prometheus(Daemon):
    """Prometheus, which scrapes and evaluates rules every second.

    directory     directory for its configuration and data
    targets       number of a shard -> "HOST:PORT" of its metrics
    groups        groups of rules
    alertmanager  port of the Alertmanager that is sent alerts; 0: none
    token         file with the token of the shards' HTTP ports; None: they need none
    """

    def __init__(
        self,
        directory: Path,
        targets: Mapping[str, str],
        groups: Sequence[Mapping[str, Any]],
        alertmanager: int = 0,
        token: Path | None = None,
    ) -> None:
        rules, config = directory / "rules.yaml", directory / "prometheus.yaml"
        rules.write_text(yaml.safe_dump({"groups": list(groups)}))
        managers = [f"127.0.0.1:{alertmanager}"] if alertmanager else []
        settings = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": managers}]}]},
            "scrape_configs": [
                {
                    "job_name": "ps",
                    **({"authorization": {"credentials_file": str(token)}} if token else {}),
                    "static_configs": [
                        {"targets": [address], "labels": {"shard": shard, "namespace": "ps"}}
                        for shard, address in targets.items()
                    ],
                }
            ],
        }
        config.write_text(yaml.safe_dump(settings))
        port = free_ports(1)
        flags = [f"--config.file={config}", f"--storage.tsdb.path={directory / 'tsdb'}"]
        flags += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
        super().__init__("prometheus", directory, flags, port)

    def query(self, expression: str, at: float) -> list[Series]:
        """Return the result of an expression at a Unix time, one series for each element."""
        data = self.get("/api/v1/query", query=expression, time=at)["data"]
        assert data["resultType"] == "vector", expression
        return list(data["result"])


class Alertmanager(Daemon):
    """Alertmanager, which sends each alert to a webhook at once, and again when it resolves."""

    def __init__(self, directory: Path, webhook: int) -> None:
        config = directory / "alertmanager.yaml"
        hook = {"url": f"http://127.0.0.1:{webhook}/", "send_resolved": True}
        settings = {
            "route": {
                "receiver": "webhook",
                "group_by": ["alertname", "shard"],
                "group_wait": "1s",
                "group_interval": "1s",
            },
            "receivers": [{"name": "webhook", "webhook_configs": [hook]}],
        }
        config.write_text(yaml.safe_dump(settings))
        port = free_ports(1)
        flags = [f"--config.file={config}", f"--storage.path={directory / 'alertmanager'}"]
        flags += [f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address="]
        super().__init__("prometheus-alertmanager", directory, flags, port)


class Webhook:
    """HTTP server that collects the alerts which an Alertmanager sends."""

    def __init__(self) -> None:
        received = self.received = list[dict[str, Any]]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.extend(json.loads(body)["alerts"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def stop(self) -> None:
        """Close the server."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def states(self, alert: str, shard: str) -> list[str]:
        """Return the states of an alert about a shard, in the order in which they arrived:
        "firing" or "resolved".
        """
        wanted = {"alertname": alert, "shard": shard}
        return [
            each["status"] for each in self.received if wanted.items() <= each["labels"].items()
        ]
