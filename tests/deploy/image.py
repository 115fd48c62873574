"""Build deploy/Containerfile with buildah, on a machine that reaches no registry of images.

    python -m tests.deploy.image       prints the image's id; needs root

Debian's packages give the base: debootstrap installs them into an empty container. pip downloads
the wheels with this machine's own configuration, and the build installs them without a network.
The base, the wheels and the layers of the image are kept in build/deploy, so that a later build
takes seconds. A build waits until another one has ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.requirements import requirements

ROOT = Path(__file__).parents[2]
STORE = ROOT / "build" / "deploy"
TAG = "localhost/embedding-ps:dev"  # the image's name in the overlay laptop
SUITE, PYTHON = "bookworm", "3.11"  # release of Debian, and its Python
BASE = f"localhost/embedding-ps-base:{SUITE}"
TOOLS = {
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "runc": "runc",
    "ip": "iproute2",
    "mkfs.ext4": "e2fsprogs",
}
CALLS = Path("/usr/share/containers/seccomp.json")  # the default profile of container runtimes


class BuildFailed(RuntimeError):
    """Raised if a command that builds the image fails, or cannot be run here."""


def missing() -> str | None:
    """Return why this machine can neither build nor run the image; None if it can do both."""
    if os.geteuid() != 0:
        return "needs root, to build the image and to run pods"
    absent = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    absent += [] if CALLS.exists() else ["golang-github-containers-common"]
    return (
        f"needs Debian's packages {', '.join(absent)}: tests/deploy/debian.sh" if absent else None
    )


@dataclass(frozen=True, slots=True)
class Image:
    """A built image: what a container runtime needs of it.

    identity    the image's id, a checksum of its contents
    entrypoint  command that runs if a pod names none
    arguments   its arguments if a pod names none
    environment "NAME=VALUE" for each variable that the image sets
    user        uid and gid under which it runs if a pod names none
    """

    identity: str
    entrypoint: list[str]
    arguments: list[str]
    environment: list[str]
    user: tuple[int, int]


def run(*words: str, environment: dict[str, str] | None = None) -> str:
    """Run a command and return its output. Raises BuildFailed if it fails."""
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise BuildFailed(f"{words[0]} failed with status {done.returncode}:\n{tail}")
    return done.stdout.strip()


def buildah(*words: str) -> str:
    """Run buildah with a store of images of its own; return its output."""
    storage, state = STORE / "storage", Path("/run") / f"embedding-ps-{os.getuid()}"
    return run("buildah", "--root", str(storage), "--runroot", str(state), *words)


@contextmanager
def container(image: str) -> Iterator[tuple[str, Path]]:
    """Yield (name, mounted root directory) of a new container during a block."""
    name = buildah("from", "--pull-never", image)
    try:
        yield name, Path(buildah("mount", name))
    finally:
        buildah("rm", name)


def build() -> Image:
    """Build the image, or only what changed since the last build."""
    if reason := missing():
        raise BuildFailed(reason)
    STORE.mkdir(parents=True, exist_ok=True)
    with (STORE / "lock").open("w") as lock, ThreadPoolExecutor() as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        steps = pool.submit(_make_base), pool.submit(_download_wheels)
        for step in steps:
            step.result()
        _build_image()
        return inspect()


def _make_base() -> None:
    """Install Debian's smallest system and its Python into the image BASE, if it is not there."""
    if buildah("images", "--quiet", "--filter", f"reference={BASE}"):
        return
    packages = "--include=python3,python3-venv"
    with container("scratch") as (name, root):
        unsafe = root / "etc/dpkg/dpkg.cfg.d/unsafe"  # dpkg then waits for no disk
        unsafe.parent.mkdir(parents=True)
        unsafe.write_text("force-unsafe-io\n")
        run("debootstrap", "--variant=minbase", packages, SUITE, str(root))
        unsafe.unlink()
        for unused in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
            shutil.rmtree(root / unused, ignore_errors=True)
        buildah("commit", "--quiet", "--disable-compression", name, BASE)


def _download_wheels() -> None:
    """Download the packages that the image needs, if pyproject.toml or the constraints changed."""
    wheels, listed = STORE / "wheels", STORE / "wheels.txt"
    wanted = [*requirements(ROOT / "pyproject.toml", ["server", "ctl"]), "setuptools>=77"]
    text = "\n".join(wanted) + (ROOT / "constraints.txt").read_text()
    if listed.exists() and listed.read_text() == text:
        return
    shutil.rmtree(wheels, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pip += ["--only-binary=:all:", "--python-version", PYTHON, "-c", "constraints.txt"]
    run(*pip, "--dest", str(wheels), *wanted)
    listed.write_text(text)


def _build_image() -> None:
    arguments = {"BASE": BASE, "PIP_FIND_LINKS": "/wheels", "PIP_NO_INDEX": "1"}
    words = [word for pair in arguments.items() for word in ("--build-arg", "=".join(pair))]
    words += ["--volume", f"{STORE / 'wheels'}:/wheels:ro", "--pull-never", "--layers"]
    words += ["--isolation", "chroot", "--disable-compression"]
    buildah("build", *words, "--file", "deploy/Containerfile", "--tag", TAG, ".")


def inspect() -> Image:
    """Return what the store knows about the image."""
    found = json.loads(buildah("inspect", "--type", "image", TAG))
    config = found["OCIv1"]["config"]
    uid, _, gid = config["User"].partition(":")
    return Image(
        identity=found["FromImageID"],
        entrypoint=config["Entrypoint"],
        arguments=config["Cmd"],
        environment=config["Env"],
        user=(int(uid), int(gid)),
    )


def main() -> None:
    start = time.monotonic()
    try:
        image = build()
    except BuildFailed as error:
        sys.exit(f"image: {error}")
    print(f"{TAG} {image.identity[:12]}, built in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
