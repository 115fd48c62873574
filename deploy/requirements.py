"""Print the packages that this project depends on, one per line.

    python deploy/requirements.py pyproject.toml EXTRA...

EXTRA  name of an optional group of dependencies, to be printed too
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """Return the project's dependencies and those of some of its extras, without duplicates."""
    project = tomllib.loads(pyproject.read_text())["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][one] for one in extras)]
    return list(dict.fromkeys(one for group in groups for one in group))


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]), sys.argv[2:])))
