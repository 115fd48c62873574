"""Read a checkpoint without running servers: a server of its own reads it for as long as needed."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import secrets
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from psclient.client import Client
from psclient.errors import InvalidArgument, Unavailable
from psclient.tools.locations import is_url

START_SECONDS = 120.0  # seconds until the server must be ready; it may have to compile its kernels
STOP_SECONDS = 30.0  # seconds until it must have ended after SIGTERM
SETTINGS = "PSCONFIG_"  # variables that begin so are settings of a server
SERVER = """
import os, signal, sys, threading
def end():
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=end, daemon=True).start()
from psserver.cli import main
main()
"""  # `psserver` that ends with the process that started it, even if that is killed


@contextmanager
def opened(location: str) -> Iterator[tuple[Client, str]]:
    """Start a server that can read a checkpoint; yield (client, name of the checkpoint).

    location  directory of the checkpoint, or its URL: what the servers have as checkpoint_url, and
              the checkpoint's name after it

    The server runs on this machine, holds no tables and changes nothing. It needs a token that only
    this user can read, because every user of the machine can connect to its port. It ends with the
    block, or with this process. Raises InvalidArgument if the location cannot be a checkpoint or
    the package lacks the server, and Unavailable if the server does not start.
    """
    parent, name = _divided(location)
    if importlib.util.find_spec("psserver") is None:
        raise InvalidArgument(
            f"{location}: a checkpoint is read by the server, which is not installed: pip install"
            " 'embedding-ps[server]'"
        )
    port = _free_port()
    with (
        tempfile.TemporaryDirectory() as directory,  # for this user alone
        tempfile.TemporaryFile() as errors,
    ):
        token = Path(directory, "token")
        process = _start(parent, port, errors, _policy(token))
        try:
            _wait(process, location, errors)
            with Client([f"127.0.0.1:{port}"], tls=False, token_file=str(token)) as client:
                yield client, name
        finally:
            process.terminate()
            try:
                process.communicate(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def _divided(location: str) -> tuple[str, str]:
    """Return (URL of the directory above, name) of a checkpoint. Raises InvalidArgument."""
    if is_url(location):
        parent, _, name = location.rstrip("/").rpartition("/")
        if not name or parent.endswith(":/"):
            raise InvalidArgument(f"{location} must be the URL of a checkpoint: .../NAME")
        return parent, name
    path = Path(location).absolute()
    if not (path / "MANIFEST.json").is_file():
        raise InvalidArgument(
            f"{location} is not a complete checkpoint: it has no file MANIFEST.json; give the"
            " directory checkpoint_url/NAME"
        )
    return path.parent.as_uri(), path.name


def _policy(token: Path) -> Path:
    """Write a random token to a file, and next to it a policy that lets its owner read
    checkpoints. Returns the path of the policy.
    """
    word = secrets.token_hex(32)
    token.write_text(word)
    path = token.with_name("policy.toml")
    path.write_text(
        f"""[principals.reader]
tokens = ["{hashlib.sha256(word.encode()).hexdigest()}"]
grants = [{{ verbs = ["checkpoint"] }}, {{ verbs = ["export"], tables = ["*"] }}]
"""
    )
    return path


def _start(parent: str, port: int, errors: IO[bytes], policy: Path) -> subprocess.Popen[bytes]:
    """Start a server without tables.

    parent  its checkpoint_url, which other users cannot see: it may have a password
    port    its port
    errors  file for its messages
    policy  its policy_file
    """
    settings = {name: each for name, each in os.environ.items() if not name.startswith(SETTINGS)}
    settings[f"{SETTINGS}CHECKPOINT_URL"] = parent
    flags = ["--port", str(port), "--metrics-port", "0", "--policy-file", str(policy)]
    flags += ["--audit-file", os.devnull]
    return subprocess.Popen(
        [sys.executable, "-c", SERVER, "serve", *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=settings,
    )


def _wait(process: subprocess.Popen[bytes], location: str, errors: IO[bytes]) -> None:
    """Wait until the server is ready. Raises Unavailable if it ends, or takes too long."""
    assert process.stdout is not None
    if select.select([process.stdout], [], [], START_SECONDS)[0]:
        if process.stdout.readline() == b"ready\n":
            return
        process.wait(STOP_SECONDS)
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    reason = lines[-1] if lines else f"it was not ready within {START_SECONDS:g} s"
    raise Unavailable(f"{location}: the server that reads the checkpoint does not start: {reason}")


def _free_port() -> int:
    """Return a port of this machine that no process uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
