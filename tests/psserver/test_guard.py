"""Actors: what their checks cost, and what they do when the policy changes meanwhile."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from secured import digest, exchange, section, streamed

from psproto import codec
from psserver.errors import PermissionDenied, Unauthenticated
from psserver.security.guard import Actor, Guard, Proof
from psserver.security.policy import Policy, parse
from psserver.security.policyfile import PolicyFile
from psserver.security.verbs import PATHS

PROOF = Proof(bytes.fromhex(digest("p")), "", "token:")
GRANTED = section("p", (["pull", "push"], ["t?"]))


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    file = tmp_path / "policy.toml"
    file.write_text(GRANTED)
    return Guard(PolicyFile(file))


@pytest.fixture
def actor(guard: Guard) -> Actor:
    assert guard.file is not None
    principal = guard.file.first.principals["p"]
    return Actor(guard, PATHS["Stream"], "peer", principal, PROOF)


def test_without_a_policy_a_message_is_decoded_as_before() -> None:
    decode: Any = codec.decode_stream_request
    assert Actor(Guard(), PATHS["Stream"], "peer").checking(decode) is decode


def test_a_table_that_is_known_costs_no_call(actor: Actor) -> None:
    """The check of the standard exchange is two look-ups in sets per table."""
    parts = exchange("t1", "t2")
    assert actor.refusal(parts) is None
    called: list[str] = []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name))
    actor.refusal(parts)
    sys.setprofile(None)
    assert [name for name in called if name.startswith("_") or name == "holds"] == []


def test_the_error_takes_the_place_of_the_exchange(actor: Actor) -> None:
    decode = actor.checking(codec.decode_stream_request)
    header, found = decode(streamed(7, "t1", "other"), 1000)
    assert header.id == 7
    assert isinstance(found, PermissionDenied)


def test_a_policy_that_changes_during_a_check_counts(guard: Guard, actor: Actor) -> None:
    """The old policy is asked; before its answer is remembered, a new one takes its place."""
    old = actor._principal
    assert old is not None
    holds = old.holds
    new = parse(section("p", (["pull"], ["t?"])).encode())

    def late(verb: str, table: str) -> bool:
        found = holds(verb, table)
        actor.renew(new)
        return found

    old.holds = late  # type: ignore[method-assign]
    with pytest.raises(PermissionDenied):
        actor.require_right("push", "t1")
    assert "t1" not in actor._known["push"]
    assert guard.refused["PERMISSION_DENIED"] == 1


def test_a_certificate_with_names_of_two_principals_ends_streams_too() -> None:
    """New calls with such a certificate are refused, so an open stream must not go on."""

    def policy(*names: str) -> Policy:
        grants = 'grants = [{ verbs = ["pull", "push"], tables = ["*"] }]\n'
        return parse(
            "".join(
                f'[principals.p{at}]\ncertificates = ["{name}"]\n{grants}'
                for at, name in enumerate(names)
            ).encode()
        )

    first = policy("cn:a")
    proof = Proof(b"", "cn:a", "cn:a", ("dns:b", "cn:a"))
    actor = Actor(Guard(), PATHS["Stream"], "peer", first.principals["p0"], proof)
    actor.renew(policy("cn:a", "dns:other"))
    assert actor.revoked is None
    actor.renew(policy("cn:a", "dns:b"))
    assert isinstance(actor.revoked, Unauthenticated)
