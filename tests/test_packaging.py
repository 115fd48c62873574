"""What is installed: a wheel or a checkout, beside packages that have a module ``proto``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from servers import free_ports

ROOT = Path(__file__).parent.parent
NOT_THE_CLIENTS = {  # what the extras bring
    *(
        "fsspec",
        "pyarrow",
        "lmdb",
        "prometheus_client",
        "psserver",
        "pydantic",
        "pydantic_settings",
        "rich",
        "storage",
    ),
    *("structlog", "torch", "typer", "uvloop", "xxhash"),
}
LOOK = """
import proto, psproto, psclient, storage, psserver
from psproto import ps_pb2
assert hasattr(proto, "Message"), "proto is no longer proto-plus"
print(psproto.__file__)
"""
REFUSED = """
import sys
from psserver.cli import main
from storage.gpu.nvrtc import find_library
print(find_library(), flush=True)
sys.argv = ["psserver", "serve", "--hbm-bytes=99000000", "--metrics-port=0", "--port", sys.argv[1]]
main()
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A new environment that sees what this one has installed, this project excepted."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    for each in Path(ours).iterdir():  # links, so that no .pth of an editable install is followed
        if each.suffix != ".pth" and not each.name.startswith(
            ("__editable__", "embedding_ps", "pip")
        ):
            (site / each.name).exists() or (site / each.name).symlink_to(each)
    return python


def install(python: Path, *what: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip("no package registry here: pip cannot fetch proto-plus or setuptools")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_an_install_works_beside_proto_plus(python: Path, tmp_path: Path, kind: str) -> None:
    install(python, "proto-plus")  # what google-cloud-storage brings as its module ``proto``
    install(python, *(["-e", str(ROOT)] if kind == "editable" else [str(ROOT)]))
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-c", LOOK],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=bare,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(ROOT if kind == "editable" else tmp_path))


@pytest.mark.slow
def test_the_client_imports_nothing_of_the_server_or_of_the_extras() -> None:
    code = "import sys, psclient, psclient.aio; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & NOT_THE_CLIENTS == set()


def resolves(*requirements: str) -> str:
    """Return what pip says if it cannot find versions that fit together; else nothing."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", *requirements]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["gpu12", "gpu13"])
def test_an_extra_for_gpus_is_installed_and_refused_without_a_gpu(
    extra: str, tmp_path: Path
) -> None:
    """With its NVRTC, the tests of the compiled kernels run, which are skipped elsewhere."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chosen = project["optional-dependencies"][extra]
    said = resolves(*project["dependencies"], *chosen)
    if "ERROR" in said and "ERROR" in resolves("--ignore-installed", "--no-deps", "proto-plus"):
        pytest.skip("no package registry here")
    assert "ERROR" not in said
    into = ["--target", str(tmp_path), *chosen]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *into], check=True)
    paths = [str(tmp_path), str(ROOT / "proto"), str(ROOT)]
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(free_ports(1))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith(str(tmp_path))  # where NVRTC is
    assert re.search(
        r"^psserver: hbm_bytes=99000000 needs a GPU: cudaError(InsufficientDriver|NoDevice): ",
        done.stderr,
        re.M,
    ), done.stderr
    compiled = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_nvrtc.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    assert re.search(r"^\d+ passed", compiled.stdout, re.M), compiled.stdout
    assert "skipped" not in compiled.stdout
