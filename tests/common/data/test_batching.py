"""Sub-batches: the rule of the reference, the budget, and no utterance lost."""

# SPDX-License-Identifier: Apache-2.0
import json
import time

import numpy as np
import pytest

from common.data import batching
from common.data.batching import Bucketing, length_order, plan_sub_batches, token_batches
from common.errors import ConfigError


def row_length(sizes, *, crop, max_sample_size):
    """What the rows of a sub-batch are cropped or padded to."""
    return min((min if crop else max)(sizes), max_sample_size or max(sizes))


def brute_force(lengths, max_tokens, max_sentences, multiple):
    """The rule in words: a batch, a tail that waits for the next allowed size, and what overflows them."""

    def fits(part):
        return len(part) * max(part) <= (max_tokens or 1e18) and len(part) <= (max_sentences or 1e18)

    def tokens_fit(part):
        return len(part) * max(part) <= (max_tokens or 1e18)

    batches, batch, tail = [], [], []
    for length in lengths:
        if not fits([*batch, *tail, length]):
            if batch:
                batches.append(batch)
            if tail and not tokens_fit([*tail, length]):
                batches.append(tail)
                tail = []
            batch, tail = [*tail, length], []
        elif len(batch) + len(tail) + 1 < multiple or (len(batch) + len(tail) + 1) % multiple == 0:
            batch, tail = [*batch, *tail, length], []
        else:
            tail.append(length)
    return [len(part) for part in (*batches, batch, tail) if part]


def sizes(offsets):
    return np.diff(offsets).tolist()


def test_batch_sizes_are_those_of_the_reference(shared):
    golden = json.loads(shared("golden_nvidia/batching.json").read_text())
    for case in golden["batch_by_size"].values():
        for run in case["runs"]:
            found = token_batches(
                case["lengths"], run["max_tokens"], run["max_sentences"], run["required_batch_size_multiple"]
            )
            assert sizes(found) == run["batch_sizes"]


@pytest.mark.parametrize("order", ["descending", "as drawn"])
def test_batches_follow_the_rule_for_random_lengths(order):
    rng = np.random.default_rng(1)
    for _ in range(300):
        lengths = rng.integers(1, 60, rng.integers(1, 80))
        lengths = np.sort(lengths)[::-1] if order == "descending" else lengths
        budget = int(rng.integers(60, 600))
        sentences = [None, int(rng.integers(1, 20))][int(rng.integers(2))]
        multiple = int(rng.choice([1, 2, 4, 8]))
        expected = brute_force(lengths.tolist(), budget, sentences, multiple)
        offsets = token_batches(lengths, budget, sentences, multiple)
        assert sizes(offsets) == expected
        assert (offsets[0], offsets[-1]) == (0, len(lengths))
        for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
            assert (stop - start) * lengths[start:stop].max() <= budget
            assert stop - start <= (sentences or 1000)


def test_the_short_cut_for_descending_lengths_gives_the_same_batches():
    rng = np.random.default_rng(2)
    for _ in range(500):
        lengths = np.sort(rng.integers(1, rng.choice([2, 5, 300, 100_000]), rng.integers(1, 600)))[::-1]
        tokens = int(rng.integers(lengths[0], 40 * lengths[0] + 1))
        sentences = int(rng.choice([1, 2, 7, 30, 1000]))
        multiple = int(rng.choice([1, 2, 3, 8, 50]))
        slow = batching._batches_one_by_one(lengths, tokens, sentences, multiple)
        assert token_batches(lengths, tokens, sentences, multiple).tolist() == slow.tolist()


def test_a_budget_below_the_longest_utterance_names_the_flag_and_the_length():
    with pytest.raises(ConfigError, match=r"--max_tokens 4: 1 utterances are longer, the longest has 5 samples; "):
        token_batches([5, 4], 4, None, 1)
    assert sizes(token_batches([5, 4], 5, None, 1)) == [1, 1]
    assert sizes(token_batches([], 5, None, 1)) == []


def test_samples_are_ordered_by_clipped_length_and_ties_by_the_seed():
    lengths = np.random.default_rng(0).integers(1, 50, 500)
    orders = [length_order(lengths, 30, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(500))
        assert (np.diff(np.minimum(lengths, 30)[order]) <= 0).all()
    assert (orders[0] == orders[1]).all()
    assert (orders[0] != orders[2]).any()


@pytest.mark.parametrize("semi_sorted", [0.0, 0.3])
@pytest.mark.parametrize("crop", [True, False])
def test_a_plan_has_every_utterance_once_and_rows_within_the_budget(crop, semi_sorted):
    lengths = np.random.default_rng(0).integers(400, 5000, 300)
    plan = plan_sub_batches(
        lengths,
        max_tokens=20_000,
        max_sentences=None,
        multiple=1,
        crop=crop,
        max_sample_size=4000,
        rng=np.random.default_rng(0),
        semi_sorted=semi_sorted,
    )
    assert plan.order.dtype == np.int32
    assert (plan.buckets, plan.datasets) == (None, None)
    assert sorted(plan.order.tolist()) == list(range(300))
    assert plan.rows.sum() == 300
    for number in range(len(plan)):
        members = lengths[plan.utterances(number)]
        assert plan.samples[number] == row_length(members, crop=crop, max_sample_size=4000)
        assert plan.samples[number] == min(4000, members.min() if crop else members.max())
        assert len(members) * plan.samples[number] <= 20_000


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_noise_exchanges_only_what_is_close_in_length(share):
    lengths = np.random.default_rng(0).integers(1000, 9000, 2000)
    ordered = lengths[length_order(lengths, None, np.random.default_rng(1), share)]
    assert sorted(ordered.tolist()) == sorted(lengths.tolist())
    most = (lengths.max() - lengths.min()) * share  # the noises of two differ by twice b at most
    gaps = ordered - np.minimum.accumulate(ordered)  # how much longer than one that stands before
    assert gaps.max() <= most
    assert gaps.max() >= 0.7 * most
    assert length_order([7] * 30, None, np.random.default_rng(1), share).tolist() != list(range(30))


def bucketed(lengths, bucketing, *, crop=False, datasets=None, max_tokens=60_000, multiple=1):
    return plan_sub_batches(
        lengths,
        max_tokens=max_tokens,
        max_sentences=None,
        multiple=multiple,
        crop=crop,
        max_sample_size=8000,
        rng=np.random.default_rng(0),
        bucketing=bucketing,
        datasets=datasets,
    )


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("kind", ["percentile", "equal_width"])
def test_a_sub_batch_has_one_bucket_and_all_rows_its_length(kind, crop):
    sizes = np.random.default_rng(0).integers(1000, 9000, 600)
    lengths, bucketing = np.minimum(sizes, 8000), Bucketing(5, kind)
    bucket_of = bucketing.of(lengths)
    longest = [lengths[bucket_of == bucket].max() for bucket in range(5)]
    plan = bucketed(sizes, bucketing, crop=crop, multiple=4)
    assert sorted(plan.order.tolist()) == list(range(600))
    for number in range(len(plan)):
        members = plan.utterances(number)
        assert set(bucket_of[members]) == {plan.buckets[number]}
        expected = lengths[members].min() if crop else longest[plan.buckets[number]]
        assert plan.samples[number] == expected
        assert len(members) * (lengths[members].max() if crop else expected) <= 60_000
        assert len(members) < 4 or len(members) % 4 == 0
    if not crop:
        assert set(plan.samples.tolist()) == set(longest)


@pytest.mark.parametrize(("short", "padded"), [(5, {4000}), (50, {3000, 4000})])
def test_lengths_that_fill_several_percentiles_make_fewer_buckets(short, padded):
    plan = bucketed(np.repeat([3000, 4000], [short, 100 - short]), Bucketing(10), max_tokens=20_000)
    assert sorted(plan.order.tolist()) == list(range(100))
    assert set(plan.samples.tolist()) == padded
    assert len(set(plan.buckets.tolist())) == len(padded)


@pytest.mark.parametrize("batch_sizes", [(3,), (12, 5, 2)])
def test_batch_sizes_of_the_buckets_replace_the_budget(batch_sizes):
    lengths = np.random.default_rng(0).integers(1000, 8000, 200)
    plan = bucketed(lengths, Bucketing(3, batch_sizes=batch_sizes), max_tokens=10, multiple=8)
    expected = batch_sizes if len(batch_sizes) == 3 else (9, 6, 3)
    for bucket, rows in enumerate(expected):
        found = plan.rows[plan.buckets == bucket]
        assert (found[:-1] == rows).all()
        assert 0 < found[-1] <= rows
    assert sorted(plan.order.tolist()) == list(range(200))


def test_a_weight_repeats_the_sub_batches_of_its_bucket_under_own_numbers():
    lengths = np.random.default_rng(0).integers(1000, 8000, 100)
    weights = (1, 3, 2)
    plan = bucketed(lengths, Bucketing(3, weights=weights), max_tokens=30_000)
    once = bucketed(lengths, Bucketing(3), max_tokens=30_000)
    times = np.bincount(plan.order, minlength=100)
    assert times.tolist() == np.array(weights)[Bucketing(3).of(lengths)].tolist()
    visits = [0, 1, 1, 1, 2, 2]  # the bucket behind every number
    assert sorted(set(plan.buckets.tolist())) == list(range(6))
    for visit, bucket in enumerate(visits):
        found = [plan.utterances(number).tolist() for number in np.flatnonzero(plan.buckets == visit)]
        assert found == [once.utterances(number).tolist() for number in np.flatnonzero(once.buckets == bucket)]


@pytest.mark.parametrize("bucketing", [None, Bucketing(3), Bucketing(3, "equal_width", weights=(1, 2, 1))])
def test_a_sub_batch_has_one_dataset(bucketing):
    rng = np.random.default_rng(0)
    lengths, datasets = rng.integers(1000, 8000, 400), rng.choice([0, 2, 3], 400).astype(np.uint8)
    plan = bucketed(lengths, bucketing, datasets=datasets)
    assert set(plan.order.tolist()) == set(range(400))
    for number in range(len(plan)):
        assert set(datasets[plan.utterances(number)].tolist()) == {plan.datasets[number]}
    if bucketing:  # the lengths do not depend on the dataset
        assert len(set(plan.samples.tolist())) == 3
    else:
        for dataset in (0, 2, 3):  # as if it were alone
            alone = np.flatnonzero(datasets == dataset)
            batches = token_batches(np.sort(lengths[alone])[::-1], 60_000)
            assert plan.rows[plan.datasets == dataset].tolist() == np.diff(batches).tolist()


def test_the_message_about_the_budget_counts_all_buckets_and_datasets():
    with pytest.raises(ConfigError, match=r"--max_tokens 4: 3 utterances are longer, the longest has 9 samples; "):
        bucketed(np.array([9, 4, 8, 7]), None, datasets=np.array([0, 0, 1, 2]), max_tokens=4)


@pytest.mark.parametrize("bucketing", [None, Bucketing(2)])
def test_no_utterance_makes_an_empty_plan(bucketing):
    plan = bucketed(np.array([], int), bucketing, datasets=np.array([], int))
    assert (len(plan), len(plan.order), plan.offsets.tolist()) == (0, 0, [0])


def test_rows_of_the_reference_have_the_same_length(shared):
    for epoch in json.loads(shared("golden_nvidia/batching.json").read_text())["epochs"]:
        if epoch["num_concat_batches"] > 1 and not epoch["pad"]:
            continue  # the reference crops to the shortest of the joined batch; here, of the sub-batch
        for batch in epoch["collated"]:
            lengths = np.array(epoch["sizes"])[batch["ids"]]
            row = row_length(lengths, crop=not epoch["pad"], max_sample_size=epoch["max_sample_size"])
            assert row == batch["samples_per_row"]


def test_librispeech_is_planned_in_a_moment():
    lengths = np.random.default_rng(0).integers(32_000, 400_000, 280_000)
    start = time.perf_counter()
    plan = plan_sub_batches(
        lengths,
        max_tokens=1_400_000,
        max_sentences=None,
        multiple=8,
        crop=True,
        max_sample_size=250_000,
        rng=np.random.default_rng(0),
    )
    assert time.perf_counter() - start < 3
    assert len(plan) > 30_000
