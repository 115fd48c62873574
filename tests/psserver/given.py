"""Where settings come from: flags, variables and a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from psserver.config import PREFIX


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting comes from the environment of the tests."""
    for name in list(os.environ):
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)


def flag(field: str, value: Any) -> list[str]:
    if field == "plaintext":
        return ["--plaintext" if value else "--no-plaintext"]
    return [f"--{field.replace('_', '-')}", str(value)]


def environment(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    for field, value in values.items():
        monkeypatch.setenv(PREFIX + field.upper(), str(value))


def file(directory: Path, **values: Any) -> Path:
    path = directory / "ps.toml"
    text = (
        f'{field} = "{value}"\n' if isinstance(value, str | Path) else f"{field} = {value}\n"
        for field, value in values.items()
    )
    path.write_text("".join(text))
    return path
