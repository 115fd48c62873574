"""Fuzz the decoders with atheris, each in a process of its own, and keep what reaches new code.

    python -m tests.fuzz [--seconds 600] [--jobs 2] [TARGET ...]

A target fails if an input raises an error, takes longer than 10 seconds, or if the process takes
more than 1 GiB. At the end, all inputs found run three times more: the memory must not grow.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HANG_SECONDS = 10
MEMORY_MIB = 1024
GROWTH_MIB = 8  # most that a second and third run of the same inputs may add
KEPT = 100  # seeds of a target, drawn evenly from all inputs found, by length
# modules with kernels, which Numba could not compile if atheris changed them
KERNELS = [
    *("psproto.dtypes", "psproto.routing"),
    *("psclient.hashtable", "psclient.parts", "psclient.pooling", "psclient.strings"),
]


def fuzz(name: str, corpus: str, flags: list[str]) -> None:
    """Run one target in this process; does not return."""
    import atheris

    packages = ["psproto", "psserver", "psclient"]
    with atheris.instrument_imports(include=packages, exclude=KERNELS):
        from tests.fuzz import targets
    with targets.opened(name) as run:
        atheris.Setup([sys.argv[0], corpus, *flags], run)
        atheris.Fuzz()


def grown(name: str, corpus: str) -> float:
    """Run all inputs three times; return the MiB that the second and third run added."""
    from tests.fuzz import targets

    inputs, peaks = [file.read_bytes() for file in sorted(Path(corpus).iterdir())], []
    with targets.opened(name) as run:
        for _ in range(3):
            for data in inputs:
                run(data)
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return peaks[-1] - peaks[0]


def child(name: str, corpus: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz", "--child", name, corpus, *flags]
    return subprocess.run(command, text=True, capture_output=True, check=False)


def examine(name: str, seconds: int) -> dict[str, Any]:
    """Fuzz a target for some seconds, save its seeds, and return what was seen."""
    from tests.fuzz import targets

    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch, "corpus")
        corpus.mkdir()
        for number, data in enumerate(targets.inputs(name)):
            (corpus / str(number)).write_bytes(data)
        limits = (
            f"-timeout={HANG_SECONDS}",
            f"-rss_limit_mb={MEMORY_MIB}",
            f"-max_len={targets.MOST_BYTES}",
            f"-artifact_prefix={scratch}/found-",
        )
        done = child(
            name, str(corpus), f"-max_total_time={seconds}", "-print_final_stats=1", *limits
        )
        failures = [file.read_bytes().hex() for file in Path(scratch).glob("found-*")]
        growth = child(name, str(corpus), "--grown")
        found = sorted((file.read_bytes() for file in corpus.iterdir()), key=lambda d: (len(d), d))
    if not failures:
        targets.save(name, found[:: -(-len(found) // KEPT)])
    stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", done.stderr))
    mib = float((growth.stdout.split() or ["nan"])[-1])
    ok = not (done.returncode or failures) and mib <= GROWTH_MIB
    return {
        "target": name,
        "runs": int(stats.get("number_of_executed_units", 0)),
        "peak MiB": int(stats.get("peak_rss_mb", 0)),
        "grown MiB": mib,
        "inputs": len(found),
        "ok": ok,
        "failures": failures,
        "output": "" if ok else (done.stderr + growth.stderr)[-4000:],
    }


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        name, corpus, *flags = sys.argv[2:]
        if flags == ["--grown"]:
            print(grown(name, corpus))
            return 0
        fuzz(name, corpus, flags)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", help="Targets; all of them without this.")
    parser.add_argument("--seconds", type=int, default=600, help="Seconds per target.")
    parser.add_argument("--jobs", type=int, default=2, help="Targets at once.")
    parser.add_argument("--json", type=Path, help="File for the results.")
    options = parser.parse_args()
    from tests.fuzz import targets

    names = options.targets or list(targets.NAMES)
    results = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for result in pool.map(lambda name: examine(name, options.seconds), names):
            results.append(result)
            shown = {
                key: value for key, value in result.items() if key not in ("failures", "output")
            }
            print(json.dumps(shown), *result["failures"], result["output"], sep="\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all(result["ok"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
