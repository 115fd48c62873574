"""The TOML file with all settings: complete, valid, and equal to the classes that read it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from servers import environment

from psserver.config import ServerConfig, load
from psserver.settings import WIDTH, document, given
from psserver.tablesettings import TableSettings

ROOT = Path(__file__).parents[2]
DEPLOYED = ROOT / "deploy" / "psserver.toml"
SECTIONS = "[tables.a]\nhost_bytes = 2097152\n[tables.'b/c']\ncache = \"lfu\"\n"


def uncommented(text: str) -> str:
    """Return the file with all its settings, and without its prose."""
    return "\n".join(re.findall(r"^(?:# )?([a-z_]+ = .*|\[.*\])$", text, re.M))


def test_the_deployed_file_has_the_comments_of_the_classes() -> None:
    text = DEPLOYED.read_text()
    update = "run: psserver settings --config deploy/psserver.toml, and save its output there"
    assert document(tomllib.loads(text)) == text, update


def test_the_command_writes_this_file() -> None:
    command = [sys.executable, "-m", "psserver", "settings", "--config", str(DEPLOYED)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    assert done.stdout == DEPLOYED.read_text()


def test_the_command_explains_what_is_wrong() -> None:
    command = [sys.executable, "-m", "psserver", "settings", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 2
    assert done.stderr.startswith("psserver: port: ")


def test_every_setting_is_listed_and_every_line_is_valid(tmp_path: Path) -> None:
    text = document({})
    assert tomllib.loads(text) == {}
    values = tomllib.loads(uncommented(text))
    assert set(values) == set(ServerConfig.model_fields)
    assert list(values["tables"]["user"]) == list(TableSettings.model_fields)
    (tmp_path / "all.toml").write_text(uncommented(text))
    config = load(["--config", str(tmp_path / "all.toml")])
    for name, field in ServerConfig.model_fields.items():
        if field.default_factory is None and field.default is not None and name != "tables":
            assert getattr(config, name) == field.default


def test_given_settings_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "some.toml"
    path.write_text("shards = 2\nfsync_seconds = 1.5\n" + SECTIONS)
    config = load(["--config", str(path), "--data-dir", "/x y"])
    text = document(given(config))
    values = tomllib.loads(text)
    assert values == {"data_dir": "/x y", **tomllib.loads(path.read_text())}
    assert document(values) == text


@pytest.mark.parametrize("text", [document({}), DEPLOYED.read_text()], ids=["empty", "deployed"])
def test_lines_are_short_and_have_no_space_at_the_end(text: str) -> None:
    assert max(map(len, text.splitlines())) <= WIDTH
    assert not [line for line in text.splitlines() if line != line.rstrip()]
