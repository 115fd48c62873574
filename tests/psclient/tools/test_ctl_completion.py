"""Completion of psctl in a shell: bash itself, and what zsh and fish call."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import fake_server
from servers import free_ports

from psproto import ps_pb2 as pb

MAIN = "from psclient.tools.ctl import main; main()"
TABLES = ["item", "user", "user.old"]
CHECKPOINTS = ["monday", "tuesday"]
COMPLETE = """
eval "$(psctl --show-completion)"
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_psctl_completion psctl
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Return the address of a shard with tables and checkpoints."""
    schemas = [pb.TableSchema(name=name, dim=1, durability=pb.DURABILITY_LOG) for name in TABLES]
    tables = pb.ListTablesResponse(
        tables=[pb.DescribeTableResponse(schema=each) for each in schemas]
    )
    listed = pb.ListCheckpointsResponse(
        checkpoints=[pb.CheckpointInfo(name=name) for name in CHECKPOINTS]
    )
    answers = {
        "CheckpointService/Restore": pb.RestoreStatus(),
        "TableService/ListTables": tables,
        "CheckpointService/ListCheckpoints": listed,
    }
    methods = {name: lambda _, __, a=each: a.SerializeToString() for name, each in answers.items()}
    with fake_server(methods) as address:
        yield address


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home directory whose bin/ has the command psctl."""
    home = tmp_path_factory.mktemp("home")
    (home / "bin").mkdir()
    command = home / "bin" / "psctl"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c {shlex.quote(MAIN)} "$@"\n')
    command.chmod(0o755)
    return home


def bash(home: Path, address: str, script: str, *flags: str) -> str:
    variables = {"HOME": str(home), "PATH": f"{home}/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", *flags, "-c", script],
        env={**os.environ, **variables, "PSCTL_SERVERS": address},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" or flags
    return done.stdout


def completed(home: Path, address: str, *words: str) -> list[str]:
    """Return what bash offers for the last word."""
    return bash(home, address, COMPLETE.format(words=shlex.join(words))).split()


def test_bash_completes_commands_and_options(home: Path, address: str) -> None:
    assert sorted(completed(home, address, "psctl", "tab")) == ["table", "tables"]
    assert "--output" in completed(home, address, "psctl", "table", "--")
    words = ("psctl", "status", "--output", "")
    assert sorted(completed(home, address, *words)) == ["json", "text"]


@pytest.mark.slow
def test_bash_completes_names_from_the_cluster(home: Path, address: str) -> None:
    assert completed(home, address, "psctl", "table", "") == TABLES
    assert completed(home, address, "psctl", "drop", "us") == ["user", "user.old"]
    assert completed(home, address, "psctl", "restore", "m") == ["monday"]
    assert completed(home, address, "psctl", "export", "mo") == ["monday"]
    assert completed(home, address, "psctl", "tail", "--table", "i") == ["item"]
    gone = f"127.0.0.1:{free_ports(1)}"
    words = ("psctl", "table", "--servers", address, "us")
    assert completed(home, gone, *words) == ["user", "user.old"]


def test_a_cluster_that_is_gone_has_no_names_and_no_error(home: Path) -> None:
    assert completed(home, f"127.0.0.1:{free_ports(1)}", "psctl", "table", "") == []
    assert completed(home, "nonsense", "psctl", "table", "") == []


@pytest.mark.parametrize(
    ("shell", "variables"),
    [
        ("zsh", {}),
        ("fish", {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)
def test_zsh_and_fish_get_commands_with_their_help(
    home: Path, shell: str, variables: dict[str, str]
) -> None:
    typed = {"_PSCTL_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": "psctl checkp"}
    done = subprocess.run(
        [home / "bin" / "psctl"],
        env={**os.environ, **typed, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "checkpoints" in done.stdout
    assert "List all checkpoints." in done.stdout


@pytest.mark.slow
def test_completion_is_installed_for_the_shell_that_asks(home: Path, address: str) -> None:
    assert "bash completion installed" in bash(home, address, "psctl --install-completion; true")
    shown = bash(home, address, "complete -p psctl", "--rcfile", f"{home}/.bashrc", "-i")
    assert shown.strip().endswith("-F _psctl_completion psctl")
