"""Metrics that a server has from the start of its process: its build, its phase and its process."""

from __future__ import annotations

import platform
from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from psproto import RELEASE
from psproto import ps_pb2 as pb
from psserver.metrics.samples import gauge
from psserver.phase import Phases, name_of


class StartCollector(Collector):
    """Collects the release of the server, and what it is doing: starting, serving or stopping."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases

    def collect(self) -> Iterator[Metric]:
        """Yield ps_build_info, ps_ready, ps_phase and ps_phase_seconds."""
        build = gauge(
            "ps_build_info",
            "Always 1; the labels have the release of the server and of Python.",
            labels=("version", "python_version"),
        )
        build.add_metric((RELEASE, platform.python_version()), 1)
        yield build
        present, seconds = self._phases.now()
        yield gauge("ps_ready", "1 while the shard serves, 0 otherwise.", int(self._phases.serving))
        phases = gauge(
            "ps_phase",
            "1 for the phase that the server is in, 0 for all others.",
            labels=("phase",),
        )
        for number in pb.Phase.values():
            if number != pb.PHASE_UNSPECIFIED:
                phases.add_metric((name_of(number),), int(number == present))
        yield phases
        yield gauge("ps_phase_seconds", "Time since the present phase began.", seconds)
