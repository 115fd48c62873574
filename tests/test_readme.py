"""The README: its example runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from servers import Cluster

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_example_runs_as_it_stands(cluster2: Cluster) -> None:
    """Only the addresses are those of the test's own cluster."""
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    (addresses,) = re.findall(r"\[\"127.0.0.1:7000\", \"127.0.0.1:7001\"\]", code)
    code = code.replace(addresses, repr(list(cluster2.addresses)))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    printed = re.fullmatch(r"(\d+) rows, mean ([\d.]+)\n", done.stdout)
    assert printed is not None, done.stdout
    assert 900 < int(printed[1]) <= 1000
    assert 0.7 < float(printed[2]) < 1.1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text())
    assert [name for name in targets if not (page.parent / name).exists()] == []


def test_every_page_is_linked_from_the_readme() -> None:
    assert {page.name for page in PAGES[1:]} <= set(re.findall(r"docs/([\w-]+\.md)\)", README))
