"""Tests of tests/frameworks are skipped, by name, where their framework is not installed."""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

FRAMEWORKS = Path(__file__).parent / "frameworks"
NEEDED = {  # directory of tests -> the packages that they import
    "ddp": ("torch",),
    "deeprec": ("tensorflow",),
    "jax": ("jax", "flax", "optax"),
    "keras": ("keras", "torch", "jax", "tensorflow"),
    "lightning": ("lightning",),
    "torchrec": ("torchrec", "fbgemm_gpu"),
}
IMPORTED = {"lightning", "torchrec"}  # directories whose packages warn when they are imported


def absent(directory: str) -> list[str]:
    """Return the packages that tests in a directory need, and that are not installed."""
    specs = {name: find_spec(name) for name in NEEDED[directory]}
    # A directory without __init__.py can be imported too, but has no origin.
    return [name for name, spec in specs.items() if spec is None or spec.origin is None]


class Skipped(pytest.Module):
    """A file of tests whose framework is missing. It is not imported."""

    def collect(self) -> list[pytest.Item]:
        packages = " and ".join(absent(self.path.relative_to(FRAMEWORKS).parts[0]))
        text = f"{self.path.name} needs {packages}: run `make frameworks`"
        if os.environ.get("FRAMEWORKS") == "required":
            pytest.fail(f"{text} (FRAMEWORKS=required)", pytrace=False)
        pytest.skip(text, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> Skipped | None:
    if FRAMEWORKS not in module_path.parents:
        return None
    directory = module_path.relative_to(FRAMEWORKS).parts[0]
    if absent(directory):
        return Skipped.from_parent(parent, path=module_path)
    if directory in IMPORTED:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in NEEDED[directory]:
                import_module(name)
    return None
