"""Sub-batches: the rule of the reference, the budget, and no utterance lost."""

# SPDX-License-Identifier: Apache-2.0
import json
import time

import numpy as np
import pytest

from common.data.batching import length_order, plan_sub_batches, token_batches
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


@pytest.mark.parametrize("crop", [True, False])
def test_a_plan_has_every_utterance_once_and_rows_within_the_budget(crop):
    lengths = np.random.default_rng(0).integers(400, 5000, 300)
    plan = plan_sub_batches(
        lengths,
        max_tokens=20_000,
        max_sentences=None,
        multiple=1,
        crop=crop,
        max_sample_size=4000,
        rng=np.random.default_rng(0),
    )
    assert sorted(plan.order.tolist()) == list(range(300))
    assert plan.rows.sum() == 300
    for number in range(len(plan)):
        members = lengths[plan.utterances(number)]
        assert plan.samples[number] == row_length(members, crop=crop, max_sample_size=4000)
        assert plan.samples[number] == min(4000, members.min() if crop else members.max())
        assert len(members) * plan.samples[number] <= 20_000


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
