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


@pytest.mark.slow
def test_the_example_for_pytorch_runs_as_it_stands(cluster2: Cluster, name: str) -> None:
    """Only the addresses, the data, the loss and the names of the tables are the test's own."""
    page = (ROOT / "docs" / "trainers.md").read_text()
    code, *_ = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    (addresses,) = re.findall(r"\[\"127.0.0.1:7000\", \"127.0.0.1:7001\"\]", code)
    before = """
import torch
from types import SimpleNamespace
loss_fn = torch.nn.functional.binary_cross_entropy_with_logits
batch = SimpleNamespace(
    user=torch.arange(4), items=torch.arange(9), offsets=torch.tensor([0, 2, 5, 7]),
    label=torch.tensor([[0.0], [1.0], [1.0], [0.0]]),
)
loader, losses = [batch] * 30, []
"""
    code = (
        code.replace(addresses, repr(list(cluster2.addresses))) + "    losses.append(loss.item())\n"
    )
    code = code.replace('create_table("', f'create_table("{name}.')
    after = "assert losses[-1] < losses[0]; print(items.describe().rows)"
    done = subprocess.run(
        [sys.executable, "-c", before + code + after],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "9\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text())
    assert [name for name in targets if not (page.parent / name).exists()] == []


def test_every_page_is_linked_from_the_readme() -> None:
    assert {page.name for page in PAGES[1:]} <= set(re.findall(r"docs/([\w-]+\.md)\)", README))
