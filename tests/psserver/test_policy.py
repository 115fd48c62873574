"""Policies: what a file may contain, and what it then allows."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from psserver.security import policyfile
from psserver.security.policy import KEPT, MOST_BYTES, Policy, parse
from psserver.security.policyfile import PolicyFile
from psserver.security.verbs import ANY, SHARD_VERBS, TABLE_VERBS, VERBS
from psserver.unusable import ConfigError

DIGEST = hashlib.sha256(b"secret").hexdigest()


def policy(text: str) -> Policy:
    return parse(text.encode())


def rights(text: str) -> Policy:
    return policy(f"[principals.p]\n{text}")


GRANTED = """
[roles.reader]
grants = [{ verbs = ["pull"], tables = ["ads.*"] }]
[principals.trainer]
tokens = ["{digest}"]
certificates = ["uri:spiffe://prod/ns/ml", "dns:trainer.ml.svc", "cn:trainer"]
roles = ["reader"]
grants = [{ verbs = ["push"], tables = ["ads.user", "x?/*.z"] }, { verbs = ["checkpoint"] }]
[principals.ops]
grants = [{ verbs = ["*"], tables = ["*"] }]
[principals.nobody]
""".replace("{digest}", DIGEST)


class TestRights:
    @pytest.mark.parametrize(
        ("verb", "table", "held"),
        [
            ("pull", "ads.user", True),
            ("pull", "ads.", True),
            ("pull", "ads", False),
            ("pull", "adsXuser", False),
            ("pull", "Ads.user", False),
            ("pull", "my/ads.user", False),
            ("pull", "ads.user\n", True),  # of no table: its name is refused elsewhere
            ("push", "ads.user", True),
            ("push", "ads.user2", False),
            ("push", "ads.item", False),
            ("push", "x1/a/b.z", True),
            ("push", "x/a.z", False),
            ("push", "x12/a.z", False),
            ("drop", "ads.user", False),
            ("pull", "", False),
            ("pull", "*", False),  # all tables
            ("checkpoint", "", True),
            ("restore", "", False),
            (ANY, "ads.user", True),
            (ANY, "ads.item", True),
            (ANY, "other", False),
        ],
    )
    def test_a_right_is_a_verb_on_the_tables_of_a_pattern(
        self, verb: str, table: str, held: bool
    ) -> None:
        found = policy(GRANTED).principals["trainer"]
        assert [found.holds(verb, table) for _ in range(2)] == [held, held]

    def test_stars_grant_every_verb_on_every_table(self) -> None:
        ops = policy(GRANTED).principals["ops"]
        assert all(ops.holds(verb, table) for verb in TABLE_VERBS for table in ("a", "x/y", "*"))
        assert all(ops.holds(verb, "") for verb in SHARD_VERBS)

    def test_a_principal_without_grants_has_no_right(self) -> None:
        nobody = policy(GRANTED).principals["nobody"]
        assert not any(nobody.holds(verb, table) for verb in (*VERBS, ANY) for table in ("", "a"))

    def test_only_a_limited_number_of_decisions_is_kept(self) -> None:
        found = policy(GRANTED).principals["trainer"]
        for number in range(KEPT + 10):
            assert not found.holds("pull", f"t{number}")
        assert len(found._known["pull"]) <= KEPT

    def test_a_hostile_name_takes_no_time(self) -> None:
        """A pattern with many stars must not make the search take exponential time."""
        text = 'grants = [{ verbs = ["pull"], tables = ["*a*a*a*a*a*a*a*a*b"] }]'
        found = rights(text).principals["p"]
        assert not found.holds("pull", "a" * 128)
        assert not found.holds("pull", "a" * 100_000)


class TestCredentials:
    def test_a_token_has_one_principal(self) -> None:
        found = policy(GRANTED)
        assert found.of_token(bytes.fromhex(DIGEST)) is found.principals["trainer"]
        assert found.of_token(bytes.fromhex(DIGEST[:-2] + "00")) is None
        assert found.of_token(bytes.fromhex(DIGEST)[:4]) is None

    def test_a_certificate_has_the_principal_of_a_name_in_it(self) -> None:
        found = policy(GRANTED)
        trainer = found.principals["trainer"]
        for name in ("uri:spiffe://prod/ns/ml", "dns:trainer.ml.svc", "cn:trainer"):
            assert found.of_certificate(["dns:other", name]) == (name, trainer)

    @pytest.mark.parametrize(
        "name",
        [
            "cn:trainer.ml.svc",
            "dns:trainer",
            "dns:x.trainer.ml.svc",
            "cn:Trainer",
            "cn:",
            "trainer",
        ],
    )
    def test_names_match_completely_and_by_kind(self, name: str) -> None:
        assert policy(GRANTED).of_certificate([name]) is None

    def test_a_certificate_with_names_of_two_principals_has_none(self) -> None:
        found = policy(
            '[principals.a]\ncertificates=["cn:a"]\n[principals.b]\ncertificates=["dns:b"]'
        )
        assert found.of_certificate(["cn:a", "dns:b"]) is None
        assert found.of_certificate(["dns:b"]) is not None


BAD = [
    ("x = 1", "x: unknown field"),
    ("[principals.p]\nverbs = []", "principals.p.verbs: unknown field"),
    ('[principals."a b"]', "principals.a b"),
    ('[principals.p]\nroles = ["r"]', "principals.p.roles: there is no section [roles.r]"),
    ('[principals.p]\ngrants = [{ verbs = ["fly"], tables = ["*"] }]', "got 'fly'"),
    ('[principals.p]\ngrants = [{ verbs = ["pull"] }]', "pull needs at least one pattern"),
    ('[principals.p]\ngrants = [{ verbs = ["*"] }]', "needs at least one pattern"),
    ("[principals.p]\ngrants = [{ verbs = [] }]", "principals.p.grants.0.verbs"),
    ('[principals.p]\ngrants = [{ verbs = ["pull"], tables = ["a b"] }]', "got 'a b'"),
    ('[principals.p]\ngrants = [{ verbs = ["pull"], tables = ["[a]"] }]', "got '[a]'"),
    ('[principals.p]\ncertificates = ["trainer"]', "got 'trainer'"),
    ("[principals.p]\nrequests_per_second = -1", "requests_per_second"),
    ("[principals.p]\nbytes_per_second = inf", "bytes_per_second"),
    ("[principals.p", "not a TOML file"),
    ("[principals.p]\n[principals.p]", "not a TOML file"),
    (f'[principals.a]\ntokens=["{DIGEST}"]\n[principals.b]\ntokens=["{DIGEST}"]', "has the same"),
    (
        '[principals.a]\ncertificates=["cn:x"]\n[principals.b]\ncertificates=["cn:x"]',
        "principals.b.certificates[0]: principal a has the same one",
    ),
    ("x = " + "[" * 100_000, "nested too deeply"),
    ("#" * (MOST_BYTES + 1), f"may have {MOST_BYTES} bytes"),
]


@pytest.mark.parametrize(("text", "problem"), BAD, ids=[problem for _, problem in BAD])
def test_a_bad_file_is_refused_with_the_field_and_the_rule(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        policy(text)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "bad", ["hunter2", DIGEST.upper(), DIGEST[:-1], DIGEST + "0", DIGEST + "\n"]
)
def test_a_message_never_has_the_token(bad: str) -> None:
    with pytest.raises(ConfigError, match="must be the SHA-256 of a token") as caught:
        policy(f"[principals.p]\ntokens = ['''{bad}''']")
    assert bad not in str(caught.value)


class TestFile:
    def test_a_file_that_cannot_be_used_stops_the_start(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"policy_file: .*No such file"):
            PolicyFile(tmp_path / "policy.toml")
        (tmp_path / "policy.toml").write_text("x = 1")
        with pytest.raises(ConfigError, match=r"policy_file: .*policy\.toml: x: unknown field"):
            PolicyFile(tmp_path / "policy.toml")

    def test_a_changed_file_is_taken_once(self, tmp_path: Path) -> None:
        file, taken = tmp_path / "policy.toml", list[Policy]()
        file.write_text(GRANTED)
        watched = PolicyFile(file)
        watched.look(taken.append)
        assert not taken
        file.write_text("[principals.other]")
        watched.look(taken.append)
        watched.look(taken.append)
        assert [list(each.principals) for each in taken] == [["other"]]
        assert (watched.loaded, watched.failed) == (2, 0)

    def test_a_broken_file_leaves_the_last_good_policy(self, tmp_path: Path) -> None:
        file, taken = tmp_path / "policy.toml", list[Policy]()
        file.write_text(GRANTED)
        watched = PolicyFile(file)
        for bad in ("[principals.p", "[principals.p"):
            file.write_text(bad)
            watched.look(taken.append)
        file.unlink()
        watched.look(taken.append)
        assert not taken
        assert (watched.loaded, watched.failed) == (1, 2)
        file.write_text(GRANTED)
        watched.look(taken.append)
        assert not taken  # it is in force already
        file.write_text("[principals.other]")
        watched.look(taken.append)
        assert len(taken) == 1

    @pytest.mark.parametrize("error", [RuntimeError("secret"), RecursionError(), MemoryError()])
    def test_an_unexpected_error_does_not_end_the_thread(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        file, taken = tmp_path / "policy.toml", list[Policy]()
        file.write_text(GRANTED)
        watched = PolicyFile(file)

        def fail(data: bytes) -> Policy:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(policyfile, "parse", fail)
            file.write_text("[principals.bad]")
            watched.look(taken.append)
        assert (watched.valid, watched.failed, taken) == (False, 1, [])
        watched.look(taken.append)
        assert (watched.valid, [list(each.principals) for each in taken]) == (True, [["bad"]])

    def test_a_secret_is_followed_through_its_links(self, tmp_path: Path) -> None:
        """Kubernetes replaces the link ``..data``, and never the file."""
        for number, name in enumerate(("first", "second")):
            (tmp_path / f"..{number}").mkdir()
            (tmp_path / f"..{number}" / "policy.toml").write_text(f"[principals.{name}]")
        (tmp_path / "..data").symlink_to("..0")
        (tmp_path / "policy.toml").symlink_to("..data/policy.toml")
        watched, taken = PolicyFile(tmp_path / "policy.toml"), list[Policy]()
        (tmp_path / "..new").symlink_to("..1")
        (tmp_path / "..new").rename(tmp_path / "..data")
        watched.look(taken.append)
        assert [list(each.principals) for each in taken] == [["second"]]


def test_the_example_for_deployments_is_a_policy() -> None:
    path = Path(__file__).parents[2] / "deploy/components/policy/policy.toml"
    example = PolicyFile(path).first
    trainer = example.principals["trainer-ads"]
    assert trainer.holds("push", "ads.user")
    assert not trainer.holds("drop", "ads.user")
    assert not trainer.limit.unlimited
    assert example.principals["ops"].holds("drop", "ads.user")


def test_the_policy_in_the_documentation_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs/security.md").read_text()
    text = page.split("```toml\n")[1].split("```")[0]
    found = policy(text.replace("<SHA-256 of the token>", DIGEST))
    assert set(found.principals) == {"trainer-ads", "ops"}
    listed = {verb for verb in VERBS if f"`{verb}`" in page}
    assert listed == set(VERBS)
