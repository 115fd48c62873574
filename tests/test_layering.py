"""The laws that a file can break without a test noticing, read from the source itself."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = {
    "psproto": ROOT / "proto" / "psproto",
    "storage": ROOT / "storage",
    "psserver": ROOT / "psserver",
    "psclient": ROOT / "psclient",
}
MAY_IMPORT = {
    "psproto": set(),
    "storage": set(),
    "psserver": {"storage", "psproto"},
    "psclient": {"psproto"},
}
OURS = {*PLACES, "tests", "benchmarks", "examples", "conftest", "servers"}
NOT_IN_STORAGE = {"grpc", "google", "prometheus_client", "grpc_health", "grpc_reflection"}
NAMELESS = {"utils", "util", "common", "helpers", "helper", "manager", "types", "misc"}
GENERATED = {"ps_pb2.py", "ps_pb2_grpc.py"}

PACKAGES = sorted(path.parent for place in PLACES.values() for path in place.rglob("__init__.py"))
FILES = sorted(path for place in PLACES.values() for path in place.rglob("*.py"))
WRITTEN = [path for path in FILES if path.name not in GENERATED]


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def package_of(path: Path) -> str:
    """The top package that a file is in."""
    return next(name for name, place in PLACES.items() if place in path.parents)


def dotted(path: Path) -> str:
    """The name under which a file is imported."""
    place = PLACES[package_of(path)]
    parts = path.relative_to(place.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> set[str]:
    """Names of the modules that a file imports, anywhere in it."""
    found = set[str]()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{shown(path)}:{node.lineno} imports relatively"
            assert node.module is not None
            inner = {f"{node.module}.{name.name}": node.module for name in node.names}
            found |= {name if name in MODULES else module for name, module in inner.items()}
    return found


MODULES = {dotted(path) for path in FILES}


def listed(package: Path) -> list[str]:
    """The files that a package's docstring lists, in the order in which to read them."""
    text = ast.get_docstring(parsed(package / "__init__.py")) or ""
    return re.findall(r"^ *([\w/]+\.(?:py|proto))\s{2,}\S", text, re.M)


# ---- law 1


def test_imports_point_one_way() -> None:
    for path in WRITTEN:
        package = package_of(path)
        ours = {name.split(".")[0] for name in imports(path)} & OURS
        assert ours <= {package} | MAY_IMPORT[package], shown(path)


def test_storage_knows_no_network() -> None:
    for path in WRITTEN:
        if package_of(path) == "storage":
            tops = {name.split(".")[0] for name in imports(path)}
            assert not tops & NOT_IN_STORAGE, shown(path)


def test_the_rules_see_what_is_imported() -> None:
    seen = {package: set[str]() for package in PLACES}
    for path in WRITTEN:
        seen[package_of(path)] |= {name.split(".")[0] for name in imports(path)} & OURS
    for package, others in MAY_IMPORT.items():
        assert seen[package] - {package} == others


def test_no_file_imports_pickle() -> None:
    unsafe = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"}
    for path in WRITTEN:
        assert not {name.split(".")[0] for name in imports(path)} & unsafe, shown(path)


# ---- law 2


@pytest.mark.parametrize("package", PACKAGES, ids=shown)
def test_a_package_lists_its_files_in_reading_order(package: Path) -> None:
    """Files of a subpackage stand in the list of the package too."""
    below = [path for path in package.rglob("*.py") if path.name != "__init__.py"]
    there = {
        str(path.relative_to(package))
        for path in (*below, *package.glob("*.proto"))
        if path.name not in GENERATED
    }
    names = listed(package)
    assert sorted(names) == sorted(there)
    assert len(names) == len(set(names))


def test_a_file_imports_only_files_listed_above_it() -> None:
    for path in WRITTEN:
        if path.name == "__init__.py":
            continue
        place = PLACES[package_of(path)]
        order = listed(place)
        name = str(path.relative_to(place))
        above = {dotted(place / other) for other in order[: order.index(name)]}
        above |= {dotted(place / generated) for generated in GENERATED}
        mine = {one for one in imports(path) if one.split(".")[0] == place.name}
        assert mine <= above, shown(path)


# ---- names


def test_a_file_is_named_for_what_is_in_it() -> None:
    for path in FILES:
        parts = {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
        assert not parts & NAMELESS, shown(path)


def test_files_of_tests_have_different_names() -> None:
    """pytest imports them by name alone, and refuses a second one of the same name."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]


def test_a_file_begins_with_what_it_is_for() -> None:
    assert not [shown(path) for path in WRITTEN if not ast.get_docstring(parsed(path))]


def test_proto_is_a_source_root_and_no_package() -> None:
    assert not (ROOT / "proto" / "__init__.py").exists()


# ---- shape


def test_a_file_has_one_purpose_and_at_most_500_lines() -> None:
    lengths = {shown(path): len(path.read_text().splitlines()) for path in WRITTEN}
    assert not {name: length for name, length in lengths.items() if length > 500}


def test_a_file_with_a_main_runs_it() -> None:
    """So `python -m MODULE` never does nothing, and reports success."""
    mains = [
        path
        for path in (*WRITTEN, *(ROOT / "benchmarks").rglob("*.py"))
        if "main" in {each.name for each in parsed(path).body if isinstance(each, ast.FunctionDef)}
    ]
    assert {"ctl.py", "cli.py"} <= {path.name for path in mains}
    asking = "__name__ == '__main__'"
    for path in mains:
        asked = [ast.unparse(each.test) for each in parsed(path).body if isinstance(each, ast.If)]
        assert asking in asked, shown(path)
