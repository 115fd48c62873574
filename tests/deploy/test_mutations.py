"""Broken manifests are caught, each by the check that is named with it."""

from __future__ import annotations

import copy

import pytest
from checks_changes import refused
from crosscheck import problems
from mutations import CHANGE, CROSS, MUTATIONS, SCHEMA
from rendering import OVERLAYS, Object, kustomized, parse
from schema import violations


def caught_by(good: list[Object], bad: list[Object]) -> dict[str, list[str]]:
    """Return what each check finds in ``bad``; only the checks that find something."""
    found = {SCHEMA: violations(bad), CROSS: problems(bad), CHANGE: refused(good, bad)}
    return {check: what for check, what in found.items() if what}


@pytest.mark.quick(12)
@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_manifest_is_caught(name: str, overlay: str) -> None:
    good = parse(kustomized(overlay))
    bad = copy.deepcopy(good)
    mutate, catcher = MUTATIONS[name]
    mutate(bad)
    assert bad != good, "the mutation changed nothing"
    found = caught_by(good, bad)
    print(*(f"{name}: caught by {check}: {what[0]}" for check, what in found.items()), sep="\n")
    assert catcher in found, f"expected {catcher} to catch it, but caught only by {found}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_manifests_themselves_are_not(overlay: str) -> None:
    good = parse(kustomized(overlay))
    assert caught_by(good, copy.deepcopy(good)) == {}


def test_the_schema_alone_would_not_do() -> None:
    """Most of these manifests satisfy the schema, so the other checks are needed."""
    good = parse(kustomized("production"))
    missed = []
    for name, (mutate, _) in MUTATIONS.items():
        bad = copy.deepcopy(good)
        mutate(bad)
        if not violations(bad):
            missed.append(name)
    assert len(missed) >= len(MUTATIONS) // 2
