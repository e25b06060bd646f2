"""Buckets: where they end, who is in them, how many rows they give, in which order they are visited."""

# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from common.data.buckets import Bucketing, adaptive_batch_sizes, bucket_order, equal_width_ranges, percentile_ends
from common.errors import ConfigError


def golden(shared, name):
    return json.loads(shared("golden_ssl/data_pipeline.json").read_text())[name]


@pytest.fixture(params=["uniform", "few different", "all equal"])
def lengths(request):
    rng = np.random.default_rng(3)
    most = {"uniform": 10_000, "few different": 5, "all equal": 1}[request.param]
    return 16_000 + rng.integers(0, most, 403)


def test_percentile_ends_are_sorted_lengths_at_equal_steps(lengths):
    for number in (1, 3, 7, 16):
        ascending = np.sort(lengths)
        expected = [ascending[int(i / number * (len(lengths) - 1) + 1e-9)] for i in range(1, number + 1)]
        assert percentile_ends(lengths, number).tolist() == expected


def test_utterances_are_in_the_percentile_bucket_of_the_reference(shared):
    for case in golden(shared, "percentile_buckets"):
        bucketing, sizes = Bucketing(case["num_buckets"]), np.array(case["sizes"])
        ends = percentile_ends(sizes, case["num_buckets"])
        assert np.unique(ends).tolist() == case["buckets"]
        assert ends[bucketing.of(sizes)].tolist() == case["bucketed"]


def test_a_percentile_bucket_has_its_share_of_different_lengths():
    lengths = np.random.default_rng(0).permutation(np.arange(1, 701))
    assert np.abs(np.bincount(Bucketing(7).of(lengths)) - 100).max() <= 1


@pytest.mark.parametrize("kind", ["percentile", "equal_width"])
def test_every_utterance_is_in_one_bucket_and_buckets_do_not_overlap(kind, lengths):
    for number in (1, 4, 9):
        buckets = Bucketing(number, kind).of(lengths)
        assert buckets.shape == lengths.shape
        assert buckets.max() < number
        by_length = np.argsort(lengths, kind="stable")
        assert (np.diff(buckets[by_length].astype(int)) >= 0).all()
        for length in np.unique(lengths):
            assert len(set(buckets[lengths == length].tolist())) == 1
    assert Bucketing(3, kind).of(np.array([], int)).tolist() == []


def test_ranges_of_equal_width_are_those_of_the_reference(shared):
    for case in golden(shared, "duration_buckets"):
        ranges = equal_width_ranges(case["min_duration"], case["max_duration"], case["buckets"])
        np.testing.assert_allclose(ranges, case["edges"], rtol=1e-9)


def test_a_length_on_an_inner_edge_is_in_the_lower_bucket_only():
    lengths = np.array([0, 1, 4, 5, 8, 12, 16])
    assert Bucketing(4, "equal_width").of(lengths).tolist() == [0, 0, 0, 1, 1, 2, 3]


def test_batch_sizes_are_those_of_the_reference(shared):
    for case in golden(shared, "adaptive_batch_sizes"):
        found = adaptive_batch_sizes(case["bucketing_batch_size"], case["datasets"], case["bucketing_weights"] or ())
        assert found == case["sizes"]


@pytest.mark.parametrize(
    ("size", "buckets", "weights"), [([4, 4], 3, ()), ([4], 4, ()), (8, 4, (1, 2)), ([4, 2], 4, (1, 1, 2))]
)
def test_batch_sizes_that_do_not_fit_the_buckets_are_refused(size, buckets, weights):
    with pytest.raises(ConfigError, match="--bucketing_batch_size"):
        adaptive_batch_sizes(size, buckets, weights)


def test_rows_and_copies_follow_the_weights():
    plain = Bucketing(4, batch_sizes=(8,))
    assert [plain.rows(bucket) for bucket in range(4)] == [32, 24, 16, 8]
    weighted = Bucketing(4, batch_sizes=(3,), weights=(2, 1, 1, 3))
    assert [weighted.rows(bucket) for bucket in range(4)] == [21, 18, 15, 12]
    assert [list(weighted.copies(bucket)) for bucket in range(4)] == [[0, 1], [2], [3], [4, 5, 6]]
    given = Bucketing(2, batch_sizes=(9, 5), weights=(1, 2))
    assert [given.rows(bucket) for bucket in range(2)] == [9, 5]
    assert Bucketing(2).rows(1) is None


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"number": 0}, "--num_batch_buckets 0"),
        ({"number": 2, "kind": "wide"}, "--bucketing_type wide"),
        ({"number": 3, "batch_sizes": (4, 2)}, "--bucketing_batch_size 4 2: give one number, or a number"),
        ({"number": 3, "weights": (4,)}, "--bucketing_weights 4: give a number"),
        ({"number": 2, "weights": (1, 0)}, "--bucketing_weights 1 0"),
    ],
)
def test_buckets_that_cannot_be_are_refused(settings, flag):
    with pytest.raises(ConfigError, match=flag):
        Bucketing(**settings)


def test_buckets_are_visited_in_the_order_of_the_reference(shared):
    for case in golden(shared, "bucket_order"):
        for rank in (0, 3):
            found = [
                bucket_order(case["strategy"], case["buckets"], epoch + 1, seed=rank + 5, rank=rank).tolist()
                for epoch in range(len(case["order_per_epoch"]))
            ]
            assert found == case["order_per_epoch"]


def test_fully_randomized_orders_belong_to_seed_epoch_and_rank():
    def order(**key):
        return bucket_order("fully_randomized", 12, **{"epoch": 1, "seed": 1, "rank": 0} | key).tolist()

    assert sorted(order()) == list(range(12))
    assert order() == order()
    assert len({tuple(order(**{key: 2})) for key in ("epoch", "seed", "rank")} | {tuple(order())}) == 4
    with pytest.raises(ConfigError, match="--bucketing_strategy random: unknown"):
        bucket_order("random", 4, 1)
