"""The commands of docs/security.md for openssl run as they are on the page."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from servers import free_ports
from squeeze import environment

from psclient import Client, Tls
from psclient.errors import TlsError

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
PROGRAMS = {"psserver": "psserver.cli", "psctl": "psclient.tools.ctl"}
REASONS = re.compile(r"^ *\* (TLS_[A-Z_]+) ", re.M)


def commands() -> list[str]:
    """Return the commands of the section "With openssl"."""
    _, _, rest = PAGE.read_text().partition("### With openssl\n")
    found = re.search(r"```sh\n(.*?)```", rest, re.S)
    assert found is not None
    return found[1].splitlines()


@pytest.mark.slow
def test_five_commands_set_up_tls(tmp_path: Path) -> None:
    first, server, client, serve, status = commands()
    for name, module in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        code = shlex.quote(f"from {module} import main; main()")
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -c {code} "$@"\n')
        program.chmod(0o755)
    port = free_ports(1)
    variables = {
        **environment(),
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PSCONFIG_PORT": str(port),
        "PSCONFIG_METRICS_PORT": "0",
        "PSCTL_SERVERS": f"127.0.0.1:{port}",
    }

    def run(command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for command in (first, server, client):
        run(command)
    process = subprocess.Popen(
        ["bash", "-c", f"exec {serve.removesuffix(' &')}"],
        cwd=tmp_path,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert "ready" in run(status)
        tls = Tls(ca=str(tmp_path / "ca.crt"))
        with Client([f"localhost:{port}"], tls=tls) as other, pytest.raises(TlsError) as caught:
            other.list_tables()
        assert caught.value.reason == "TLS_CLIENT_MISSING"  # so the name localhost was accepted
    finally:
        process.terminate()
        process.communicate()


def test_the_page_explains_every_reason() -> None:
    reasons = REASONS.findall(TlsError.__doc__ or "")
    assert len(reasons) == 10
    assert re.findall(r"^\| `(TLS_[A-Z_]+)` \|", PAGE.read_text(), re.M) == reasons
