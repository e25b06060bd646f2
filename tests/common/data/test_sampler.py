"""The global plan: whole updates, other left-overs each epoch, the same content for every layout."""

# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from common.data.sampler import PlannedSubBatch, UpdateSampler, plan_validation
from common.errors import ConfigError, DataError


def sampler(number=27, per_update=8, seed=1):
    lengths = np.random.default_rng(0).integers(1, 9, number)
    return UpdateSampler(lengths=lengths, sub_batches_per_update=per_update, seed=seed), lengths


def epoch_of(plan, epoch):
    return [plan.update(epoch, position) for position in range(plan.updates_per_epoch)]


def numbers(updates):
    return [planned.sub_batch for planned in chain.from_iterable(updates)]


def test_an_epoch_has_whole_updates_of_different_sub_batches():
    plan, _ = sampler()
    assert (plan.updates_per_epoch, len(plan)) == (3, 27)
    assert plan.left_over_share == pytest.approx(3 / 27)
    updates = epoch_of(plan, 1)
    assert [len(update) for update in updates] == [8, 8, 8]
    assert len(set(numbers(updates))) == 24
    assert {planned.epoch_pass for update in updates for planned in update} == {1}


def test_another_part_is_left_over_each_epoch_and_all_take_turns():
    plan, _ = sampler()
    resting = [frozenset(range(27)) - set(numbers(epoch_of(plan, epoch))) for epoch in range(1, 10)]
    assert all(len(part) == 3 for part in resting)
    assert all(not first & second for first, second in zip(resting, resting[1:], strict=False))
    assert Counter(chain.from_iterable(resting)) == Counter(range(27))


def test_every_epoch_has_another_order_and_the_seed_decides_it():
    plan, _ = sampler()
    again, _ = sampler()
    other, _ = sampler(seed=2)
    assert epoch_of(plan, 1) == epoch_of(again, 1)
    assert numbers(epoch_of(plan, 1)) != numbers(epoch_of(plan, 2))
    assert numbers(epoch_of(plan, 1)) != numbers(epoch_of(other, 1))
    assert epoch_of(plan, 1) == epoch_of(again, 1)  # after epoch 2 was made


def test_an_update_is_sorted_by_length_with_its_places_as_indices():
    plan, lengths = sampler()
    for update in epoch_of(plan, 3):
        sizes = [lengths[planned.sub_batch] for planned in update]
        assert sizes == sorted(sizes, reverse=True)
        assert [planned.index for planned in update] == list(range(8))


@pytest.mark.parametrize(("number", "per_update"), [(5, 8), (1, 64), (3, 64), (7, 8), (8, 8)])
def test_few_data_are_repeated_until_an_update_is_full(number, per_update):
    plan, _ = sampler(number, per_update)
    passes = -(-per_update // number)
    assert plan.updates_per_epoch == passes * number // per_update
    seen = []
    for epoch in range(1, 5):
        for update in epoch_of(plan, epoch):
            used = Counter(planned.epoch_pass for planned in update)
            seen.append(frozenset(used))
            assert sum(used.values()) == per_update
            assert max(Counter((planned.epoch_pass, planned.sub_batch) for planned in update).values()) == 1
            assert max(used.values()) <= number
    assert len(set(seen)) == len(seen)  # no pass serves two epochs: crops and masks are drawn anew


def test_few_data_leave_out_another_part_each_epoch():
    plan, _ = sampler(5, 8)
    missing = [
        frozenset(range(5))
        - {planned.sub_batch for planned in plan.update(epoch, 0) if planned.epoch_pass == 2 * epoch}
        for epoch in range(1, 7)
    ]
    assert all(len(part) == 2 for part in missing)
    assert all(first != second for first, second in zip(missing, missing[1:], strict=False))


@pytest.mark.parametrize(("world", "concat", "update_freq"), [(1, 1, 8), (2, 2, 2), (8, 1, 1), (1, 8, 1), (2, 1, 4)])
def test_every_layout_has_the_same_sub_batches_with_the_same_indices(world, concat, update_freq):
    plan, lengths = sampler()
    for epoch, position in ((1, 0), (1, 2), (2, 1)):
        expected = plan.update(epoch, position)
        ranks = [
            plan.micro_batches(epoch, position, rank=rank, world=world, concat=concat, update_freq=update_freq)
            for rank in range(world)
        ]
        assert all([len(micro) for micro in rank] == [concat] * update_freq for rank in ranks)
        in_order = [ranks[rank][micro] for micro in range(update_freq) for rank in range(world)]
        assert list(chain.from_iterable(in_order)) == expected
        for micro in chain.from_iterable(ranks):  # neighbours in length are joined
            places = [planned.index for planned in micro]
            assert places == list(range(places[0], places[0] + concat))


def test_a_layout_of_another_product_is_refused():
    plan, _ = sampler()
    with pytest.raises(ConfigError, match=r"--update_freq 3: .* 8 sub-batches"):
        plan.micro_batches(1, 0, rank=0, world=2, concat=1, update_freq=3)
    with pytest.raises(DataError, match="no data"):
        UpdateSampler(lengths=np.array([]), sub_batches_per_update=8, seed=1)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_validation_reads_every_sub_batch_once_over_all_ranks(world):
    shares = [plan_validation(5, rank=rank, world=world) for rank in range(world)]
    assert sorted(planned.sub_batch for planned in chain.from_iterable(shares)) == list(range(5))
    assert shares[0][0] == PlannedSubBatch(0, 0, 0)


def test_a_million_sub_batches_are_planned_in_arrays():
    plan = UpdateSampler(lengths=np.ones(1_000_000, np.int64), sub_batches_per_update=64, seed=1)
    assert plan.updates_per_epoch == 15_625
    assert len(plan.update(1, 15_624)) == 64
