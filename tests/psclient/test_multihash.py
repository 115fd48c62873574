"""Features over several tables against NumPy and torch, with the same rows."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from features import (
    ANY,
    EXTREME,
    KINDS,
    MASK,
    SIZES,
    composed,
    dense,
    every_row,
    integers,
    keys_of,
    offline,
    stream,
    summing,
)
from numpy.testing import assert_allclose, assert_array_equal

from psclient import Client, Table
from psclient.combine import COMBINATIONS
from psclient.errors import InvalidArgument
from psclient.mixed import MixedDimension
from psclient.multihash import (
    ChineseRemainder,
    KHash,
    MultiHash,
    QuotientRemainder,
    hashes,
    sizes_for,
)
from psclient.torch import COMBINE


@pytest.fixture(params=[1, 2], ids=["1 shard", "2 shards"])
def client(request: pytest.FixtureRequest, connect: Any) -> Client:
    return connect(request.getfixturevalue(f"cluster{request.param}"))


class TestHashes:
    def test_they_are_numbers_of_the_keys_splitmix64_streams(self) -> None:
        expected = [[stream(int(key), number) for key in EXTREME] for number in range(3)]
        assert hashes(EXTREME.astype(np.uint64), 3).tolist() == expected

    def test_they_never_change(self) -> None:  # of key 0: the generator's published numbers
        assert hashes(np.array([0, 1], np.uint64), 2).tolist() == [
            [0xE220A8397B1DCDAF, 0xBFEF8030DDC2D772],
            [0x6E789E6AA1B965F4, 0x5F552CE482F2AA47],
        ]

    @pytest.mark.parametrize("ids", [np.arange(20000), np.arange(20000) << 32], ids=["dense", "<<"])
    def test_two_of_them_are_independent(self, ids: np.ndarray) -> None:
        first, second = hashes(ids.astype(np.uint64), 2) % np.uint64(16)
        cells = np.bincount((first * np.uint64(16) + second).astype(np.int64), minlength=256)
        expected = len(ids) / 256
        assert ((cells - expected) ** 2 / expected).sum() < 255 + 4 * math.sqrt(2 * 255)


class TestCodes:
    @pytest.mark.parametrize("hashed", [True, False])
    @pytest.mark.parametrize("universe", [35, 31, 2])
    def test_a_quotient_and_a_remainder_are_pythons(self, hashed: bool, universe: int) -> None:
        feature = QuotientRemainder(*offline(), (5, 7), universe=universe, hashed=hashed)
        bits = [int(key) & MASK for key in EXTREME]
        numbers = [(stream(key, 0) if hashed else key) % universe for key in bits]
        expected = [[x // 7 for x in numbers], [x % 7 for x in numbers]]
        assert feature.codes(EXTREME).tolist() == expected

    def test_remainders_are_pythons(self) -> None:
        feature = ChineseRemainder(*offline(), SIZES, hashed=False)
        bits = [int(key) & MASK for key in EXTREME]
        assert feature.codes(EXTREME).tolist() == [[key % 315 % s for key in bits] for s in SIZES]

    def test_k_hashes_are_pythons(self) -> None:
        feature = KHash(*offline(), (1000, 2**40, 3))
        expected = [
            [stream(int(key), number) % size for key in EXTREME]
            for number, size in enumerate(feature.sizes)
        ]
        assert feature.codes(EXTREME).tolist() == expected

    @pytest.mark.parametrize("kind", [QuotientRemainder, ChineseRemainder])
    @pytest.mark.parametrize("sizes", [(2, 3), (5, 7), (7, 5), SIZES, (2, 3, 5, 7), (11,)])
    def test_every_number_of_the_universe_has_codes_of_its_own(
        self, kind: Any, sizes: tuple[int, ...]
    ) -> None:
        for universe in (math.prod(sizes), math.prod(sizes) - 1):
            feature = kind(*offline(), sizes, universe=universe, hashed=False)
            codes = feature.codes(np.arange(universe))
            assert len(np.unique(codes, axis=1).T) == feature.universe == universe
            assert (codes.max(axis=1) < np.array(sizes, np.uint64)).all()
            assert feature.collisions(np.arange(universe)) == 0

    @pytest.mark.parametrize("kind", [QuotientRemainder, ChineseRemainder])
    @pytest.mark.parametrize("hashed", [True, False])
    def test_sizes_with_a_product_of_2_to_64_tell_all_keys_apart(
        self, kind: Any, hashed: bool
    ) -> None:
        sizes = sizes_for(2**64, 4, coprime=True)
        feature = kind(*offline(), sizes, hashed=hashed)
        assert (feature.universe, max(sizes)) == (2**64, 65541)
        keys = np.append(ANY, EXTREME.astype(np.uint64))
        number = [0] * len(keys)
        for place, code in enumerate(feature.codes(keys).tolist()):
            if kind is QuotientRemainder:
                number = [x * sizes[place] + c for x, c in zip(number, code, strict=True)]
            else:
                rest = math.prod(sizes) // sizes[place]
                one = rest * pow(rest, -1, sizes[place])
                number = [x + one * c for x, c in zip(number, code, strict=True)]
        if kind is ChineseRemainder:
            number = [x % math.prod(sizes) for x in number]
        assert number == [stream(int(key), 0) if hashed else int(key) for key in keys]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("stride", [7, 9, 315, 2**32, 2**58])
    def test_strided_ids_use_every_row(self, kind: Any, stride: int) -> None:
        feature = kind(*offline(), SIZES)
        ids = np.arange(2000, dtype=np.uint64) * np.uint64(stride)
        for code, size in zip(feature.codes(np.unique(ids)), SIZES, strict=True):
            assert len(np.unique(code)) == min(size, len(np.unique(ids)))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
    def test_codes_have_the_shape_of_the_keys(self, kind: Any, shape: tuple[int, ...]) -> None:
        keys = np.arange(math.prod(shape)).reshape(shape)
        feature = kind(*offline(), SIZES)
        assert feature.codes(keys).shape == feature.row_keys(keys).shape == (3, *shape)

    @pytest.mark.parametrize("kind", KINDS)
    def test_parts_of_one_table_have_ranges_of_its_keys(self, kind: Any) -> None:
        apart, other = offline(2)
        codes = kind(apart, SIZES).codes(ANY)
        assert_array_equal(kind([apart, other, apart], SIZES).codes(ANY), codes)
        together = np.array([[0], [5], [12]], np.uint64)
        assert_array_equal(kind(apart, SIZES).row_keys(ANY), codes + together)
        mixed = np.array([[0], [0], [5]], np.uint64)
        assert_array_equal(kind([apart, other, apart], SIZES).row_keys(ANY), codes + mixed)


class TestCollisions:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("count", [0, 1, 2, 30, 500])
    def test_keys_that_share_all_codes_are_counted(self, kind: Any, count: int) -> None:
        feature = kind(*offline(), SIZES)
        keys = ANY[:count]
        same = Counter(map(tuple, feature.codes(keys).T.tolist()))
        shared = sum(number for number in same.values() if number > 1)
        assert feature.collisions(np.repeat(keys, 2)) == shared / max(count, 1)

    @pytest.mark.parametrize("kind", KINDS)
    def test_there_are_as_many_as_chance_makes(self, kind: Any) -> None:
        feature = kind(*offline(), (101, 103))
        expected = 1 - math.exp(-len(ANY) / (101 * 103))
        assert feature.collisions(ANY) == pytest.approx(expected, abs=0.03)
        assert feature.collisions(np.arange(len(ANY))) == pytest.approx(expected, abs=0.03)


class TestSizes:
    @pytest.mark.parametrize("coprime", [False, True])
    @pytest.mark.parametrize("parts", [2, 3, 4, 64])
    @pytest.mark.parametrize("universe", [2, 3, 10, 1000, 1001, 10**7, 2**63, 2**64 - 1, 2**64])
    def test_they_cover_the_universe(self, universe: int, parts: int, coprime: bool) -> None:
        sizes = sizes_for(universe, parts, coprime=coprime)
        assert len(sizes) == parts
        assert math.prod(sizes) >= universe
        assert min(sizes) == 2 or (min(sizes) - 1) ** parts < universe
        if coprime:
            assert all(math.gcd(a, b) == 1 for a, b in itertools.combinations(sizes, 2))
            ChineseRemainder(*offline(), sizes, universe=universe)
        else:
            QuotientRemainder(*offline(), sizes, universe=universe)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((1, 2), r"universe must be in 2\.\.2\^64, got 1"),
            ((2**64 + 1, 2), r"universe must be in 2\.\.2\^64, got 18446744073709551617"),
            ((10, 1), r"parts must be in 2\.\.64, got 1"),
        ],
    )
    def test_what_has_no_sizes_is_refused(self, arguments: Any, message: str) -> None:
        with pytest.raises(InvalidArgument, match=message):
            sizes_for(*arguments)


class TestRules:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ((5, 1), r"sizes must be in 2\.\.2\^64-1, got 1 for part 1"),
            ((0, 5), r"sizes must be in 2\.\.2\^64-1, got 0 for part 0"),
            ((5, 2**64), r"sizes must be in 2\.\.2\^64-1, got 18446744073709551616 for part 1"),
            ((5, 2.5), r"sizes must be a list of integers, got \(5, 2\.5\)"),
            (5, "sizes must be a list of integers, got 5"),
            ((), "sizes must have one size for each part, got an empty list"),
            ((2**64 - 1, 2), r"in table 't0' must be <= 2\^64, got 184.*617"),
        ],
    )
    def test_sizes(self, kind: Any, sizes: Any, message: str) -> None:
        with pytest.raises(InvalidArgument, match=message):
            kind(*offline(), sizes)

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ((4, 6), "sizes must be pairwise coprime, but 2 divides both 4 and 6"),
            ((5, 7, 35), "sizes must be pairwise coprime, but 5 divides both 5 and 35"),
            ((5, 5), "sizes must be pairwise coprime, but 5 divides both 5 and 5"),
        ],
    )
    def test_remainders_are_coprime(self, sizes: Any, message: str) -> None:
        with pytest.raises(InvalidArgument, match=message):
            ChineseRemainder(*offline(), sizes)
        QuotientRemainder(*offline(), sizes)

    @pytest.mark.parametrize("kind", [QuotientRemainder, ChineseRemainder])
    @pytest.mark.parametrize("universe", [-1, 0, 1, 36])
    def test_the_universe_is_covered(self, kind: Any, universe: int) -> None:
        message = rf"universe must be in 2\.\.35, .* sizes \[5, 7\], got {universe}"
        with pytest.raises(InvalidArgument, match=message):
            kind(*offline(), (5, 7), universe=universe)

    def test_tables(self) -> None:
        with pytest.raises(
            InvalidArgument, match=r"a list of 3 tables, one per part; got .*'t0'.*'t1'"
        ):
            KHash(offline(2), SIZES)
        with pytest.raises(InvalidArgument, match="tables must belong to one client"):
            KHash([*offline(), *offline()], (5, 7))
        with pytest.raises(InvalidArgument, match="tables must be of type Table, got 'user'"):
            KHash(["user", "item"], (5, 7))  # type: ignore[list-item]
        tables = [*offline(1, 4)]
        tables.append(Table(tables[0].client, "other", 5))
        assert KHash(tables, (5, 7), "concatenate").dim == 9
        for combine in ("add", "multiply"):
            with pytest.raises(InvalidArgument, match=r"must have equal dims .*, got \[4, 5\]"):
                KHash(tables, (5, 7), combine)  # type: ignore[arg-type]

    def test_numbers_are_whole(self) -> None:
        with pytest.raises(InvalidArgument, match=r"universe must be an integer, got 30\.5"):
            QuotientRemainder(*offline(), (5, 7), universe=30.5)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="parts must be an integer, got '2'"):
            sizes_for(100, "2")  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match=r"threshold must be an integer, got 1\.5"):
            MixedDimension(*offline(2), 1.5)  # type: ignore[arg-type]
        numpys = QuotientRemainder(*offline(), np.array([5, 7]), universe=np.int32(30))  # type: ignore[arg-type]
        assert (numpys.sizes, numpys.universe) == ((5, 7), 30)

    def test_combine(self) -> None:
        with pytest.raises(InvalidArgument, match="one of add, multiply, concatenate, got 'max'"):
            KHash(*offline(), SIZES, "max")  # type: ignore[arg-type]
        assert list(COMBINE) == list(COMBINATIONS)

    def test_features_describe_themselves(self) -> None:
        assert repr(KHash(*offline(), (5, 7), "concatenate")) == (
            "KHash('t0', sizes=[5, 7], combine='concatenate', dim=8)"
        )
        assert repr(QuotientRemainder(offline(2), (5, 7))) == (
            "QuotientRemainder('t0', 't1', sizes=[5, 7], combine='add', dim=4)"
        )


# ---- rows, on servers


class TestGradients:
    @pytest.mark.parametrize("combine", COMBINATIONS)
    @pytest.mark.parametrize("parts", [1, 2, 3, 4])
    def test_they_are_those_of_finite_differences(self, combine: str, parts: int) -> None:
        by = COMBINATIONS[combine]
        random = np.random.default_rng(parts)
        rows: list[Any] = [random.normal(size=(6, 3)) for _ in range(parts)]
        rows[0][0] = 0.0  # a product is 0 there, its gradients need not be
        gradient = random.normal(size=(6, by.dim([3] * parts)))
        given = by.gradients(gradient, rows, [3] * parts)
        for part, place in itertools.product(range(parts), np.ndindex(6, 3)):
            ends = []
            for change in (1e-3, -1e-3):
                moved = [row.copy() for row in rows]
                moved[part][place] += change
                ends.append((by.combine(moved) * gradient).sum())
            expected = (ends[0] - ends[1]) / 2e-3  # exact but for rounding: linear in each part
            assert given[part][place] == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("combine", COMBINATIONS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_push_moves_rows_by_finite_differences(
        self, make: Callable[..., MultiHash], kind: Any, combine: str
    ) -> None:
        feature = make(kind, combine)
        keys = keys_of(1, 40)
        codes = feature.codes(keys)
        before = [torch.from_numpy(rows).double() for rows in dense(feature)]

        def loss(rows: list[torch.Tensor]) -> float:
            return float(torch.sin(composed(combine, rows, codes)).sum())

        pulled = feature.pull_parts(keys)
        feature.push(pulled, np.cos(pulled.embeddings))
        after = dense(feature)
        for part, rows in enumerate(before):
            expected = np.zeros(rows.shape)
            for place in np.ndindex(*rows.shape):
                ends = []
                for change in (1e-5, -1e-5):
                    moved = [row.clone() for row in before]
                    moved[part][place] += change
                    ends.append(loss(moved))
                expected[place] = (ends[0] - ends[1]) / 2e-5
            assert_allclose(rows.numpy() - after[part], expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("combine", COMBINATIONS)
class TestPullAndPush:
    @pytest.mark.parametrize("kind", KINDS)
    def test_integers_are_exact(
        self, make: Callable[..., MultiHash], kind: Any, combine: str
    ) -> None:
        feature = make(kind, combine)
        for shape in [(), (0,), (200,), (5, 4, 3)]:
            rows = [torch.from_numpy(part).requires_grad_() for part in dense(feature)]
            keys = keys_of(2, *shape)
            gradients = integers(3, *shape, feature.dim)
            expected = composed(combine, rows, feature.codes(keys))
            assert_array_equal(feature.pull(keys), expected.detach().numpy())
            expected.backward(torch.from_numpy(gradients))
            feature.push(keys, gradients)
            for part, theirs in zip(dense(feature), rows, strict=True):
                assert theirs.grad is not None
                assert_array_equal(part, (theirs - theirs.grad).detach().numpy())

    def test_every_kind_of_request_gives_the_same(
        self, make: Callable[..., MultiHash], combine: str
    ) -> None:
        feature = make(QuotientRemainder, combine)
        first, second = keys_of(4, 50), keys_of(5, 60)
        gradients = integers(6, 50, feature.dim)
        before = dense(feature)
        states = []
        for given in ("keys", "pulled", "exchange", "exchange pulled"):
            for table, keys, old in zip(feature.tables, every_row(feature), before, strict=True):
                table.push(keys, table.pull(keys) - old)
            what: Any = feature.pull_parts(first) if "pulled" in given else first
            if "exchange" in given:
                rows = feature.exchange(second, (what, gradients), step=3).embeddings
            else:
                feature.push(what, gradients, step=3)
                rows = feature.pull(second)
            states.append((rows, *dense(feature)))
        for other in states[1:]:
            for ours, theirs in zip(other, states[0], strict=True):
                assert_array_equal(ours, theirs)

    def test_one_message_a_shard_carries_all_parts(
        self, make: Callable[..., MultiHash], messages: list[Any], combine: str
    ) -> None:
        feature = make(QuotientRemainder, combine)
        shards = len(feature.client._addresses)
        tables = len({table.name for table in feature.tables})
        keys = np.arange(300)

        def sizes() -> set[tuple[int, int]]:
            each = [(len(message.pushes), len(message.pulls)) for message in messages]
            assert len(each) == shards
            del messages[:]
            return set(each)

        del messages[:]
        pulled = feature.pull_parts(keys)
        assert sizes() == {(0, tables)}
        gradients = np.ones_like(pulled.embeddings)
        feature.push(pulled, gradients)
        assert sizes() == {(tables, 0)}
        feature.exchange(keys, (pulled, gradients))
        assert sizes() == {(tables, tables)}
        feature.push(keys, gradients)
        assert len(messages) == shards * (1 + (combine == "multiply"))

    def test_rows_count_every_occurrence(
        self, make: Callable[..., MultiHash], combine: str
    ) -> None:
        feature = make(QuotientRemainder, combine)
        keys = keys_of(7, 500)
        feature.push(keys, np.ones((500, feature.dim), np.float32), step=12)
        for part, (table, rows) in enumerate(zip(feature.tables, every_row(feature), strict=True)):
            used = np.bincount(feature.codes(keys)[part].astype(np.int64), minlength=len(rows))
            pulled = table.pull_rows(rows)
            assert_array_equal(pulled.frequencies, 1 + used)
            assert_array_equal(pulled.steps, np.where(used, 12, 0))

    BAD = (
        (lambda g: g[:, :-1], r"gradients must have shape \[4, \d+\], got \[4, \d+\]"),
        (lambda g: g[0], r"gradients must have shape \[4, \d+\], got \[\d+\]"),
        (lambda g: g.astype(bool), "gradients must be floats, got bool"),
        (lambda g: g * np.nan, r"gradients must be finite, got nan at \[0, 0\]"),
        (lambda g: g / 0 * [[0], [0], [1], [0]], "gradients must be finite"),
    )

    @pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
    def test_bad_gradients_are_applied_nowhere(
        self, make: Callable[..., MultiHash], combine: str
    ) -> None:
        feature = make(KHash, combine)
        before = dense(feature)
        for keys in (np.arange(4), feature.pull_parts(np.arange(4))):
            for change, message in self.BAD:
                with pytest.raises(InvalidArgument, match=message):
                    feature.push(keys, change(np.ones((4, feature.dim), np.float32)))
        for ours, theirs in zip(dense(feature), before, strict=True):
            assert_array_equal(ours, theirs)


class TestRequests:
    def test_a_product_is_differentiated_where_it_was_pulled(
        self, client: Client, name: str
    ) -> None:
        feature = QuotientRemainder(summing(client, name, 1), (2, 2), "multiply", hashed=False)
        feature.tables[0].push([0, 1, 2, 3], np.array([[-2], [-2], [-5], [-5]], np.float32))
        pulled = feature.pull_parts([0])
        feature.tables[0].push([0, 1, 2, 3], np.ones((4, 1), np.float32))
        feature.push(pulled, np.ones((1, 1), np.float32))  # by 2 and 5
        assert feature.tables[0].pull([0, 2]).tolist() == [[1 - 5], [4 - 2]]
        feature.push([0], np.ones((1, 1), np.float32))  # by -4 and 2, as they are now
        assert feature.tables[0].pull([0, 2]).tolist() == [[-4 - 2], [2 + 4]]

    def test_options_reach_the_client(self, client: Client, name: str) -> None:
        table = client.create_table(
            name, 1, optimizer="sgd", lr=1.0, initializer="zeros", serving_default=7.0
        )
        feature = QuotientRemainder(table, (2, 2), hashed=False)
        assert feature.pull([0], mode="serve").tolist() == [[14]]
        assert feature.pull([0]).tolist() == [[0]]
        feature.push([0], np.full((1, 1), 1.001953125, np.float32), lr=2.0, step=5)
        assert table.pull_rows([0, 2]).steps.tolist() == [5, 5]
        assert feature.pull([0]).tolist() == [[-4.0078125]]
        assert feature.pull([0], wire="bfloat16").tolist() == [[-4]]

    def test_other_tables_travel_in_the_same_message(
        self, client: Client, name: str, messages: list[Any]
    ) -> None:
        feature = QuotientRemainder(summing(client, name, 2), (50, 60))
        other = summing(client, f"{name}.other", 3)
        keys = np.arange(200)
        batches = feature.batches(keys)
        rows = client.pull({**batches, other.name: keys})
        pulled = feature.compose(batches, rows)
        ones = np.ones((200, 3), np.float32)
        del messages[:]
        client.push({**feature.gradients(pulled, ones[:, :2]), other.name: (keys, ones)})
        assert [len(message.pushes) for message in messages] == [2] * len(client._addresses)
        assert_array_equal(other.pull(keys), -ones)
        used = sum(np.bincount(each.astype(int))[each] for each in feature.row_keys(keys))
        assert_array_equal(feature.pull(keys), -np.stack([used, used], -1))

    def test_a_pull_makes_no_rows(self, client: Client, name: str) -> None:
        feature = KHash(summing(client, name, 2), (50, 60))
        feature.pull(np.arange(100))
        assert feature.tables[0].describe().rows == 0

    def test_rows_are_made_by_need(self, client: Client, name: str) -> None:
        feature = KHash(summing(client, name, 2), (2**40, 2**40))
        feature.push(np.arange(100), np.ones((100, 2), np.float32))
        assert feature.tables[0].describe().rows == 200


# ---- torch
