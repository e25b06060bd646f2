"""The global plan: whole updates, other left-overs each epoch, the same content for every layout."""

# SPDX-License-Identifier: Apache-2.0
import json
from collections import Counter
from dataclasses import replace
from itertools import chain, groupby

import numpy as np
import pytest

from common.data.sampler import (
    PlannedSubBatch,
    UpdateSampler,
    plan_validation,
    sub_batches_alike,
    temperature_weights,
)
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


@pytest.mark.parametrize(
    ("world", "concat", "update_freq"), [(3, 4, 1), (3, 1, 3), (3, 2, 2), (5, 8, 1), (5, 1, 2), (7, 1, 2), (1, 3, 3)]
)
def test_where_processes_do_not_divide_an_update_it_is_dealt_as_evenly_as_possible(world, concat, update_freq):
    plan, _ = sampler()  # 8 sub-batches per update
    for epoch, position in ((1, 0), (2, 1)):
        ranks = [
            plan.micro_batches(epoch, position, rank=rank, world=world, concat=concat, update_freq=update_freq)
            for rank in range(world)
        ]
        assert [len(micros) for micros in ranks] == [update_freq] * world
        everything = list(chain.from_iterable(ranks))
        assert all(1 <= len(micro) <= concat for micro in everything)
        sizes = [sum(not planned.idle for planned in micro) for micro in everything]
        assert max(sizes) - min(sizes) <= 1
        idle = [planned for micro in everything for planned in micro if planned.idle]
        assert len(idle) == max(world * update_freq - 8, 0)  # only where there are more slots than sub-batches
        update = plan.update(epoch, position)
        counted = [planned for micro in everything for planned in micro if not planned.idle]
        assert sorted(counted, key=lambda planned: planned.index) == update
        assert {replace(planned, idle=False) for planned in idle} <= set(update)
        for micro in everything:  # neighbours in length are joined
            assert [planned.index for planned in micro] == list(range(micro[0].index, micro[0].index + len(micro)))


@pytest.mark.parametrize("layout", [(2, 2, 2), (8, 1, 1), (1, 8, 1), (3, 3, 1), (3, 1, 3)])
def test_the_largest_micro_batches_are_those_that_a_search_finds(layout):
    plan, lengths = sampler()
    world, concat, update_freq = layout
    split = {"world": world, "concat": concat, "update_freq": update_freq}
    rows = np.random.default_rng(0).integers(1, 9, len(lengths))
    found = plan.largest(2, rows, number=5, **split)
    every = [
        micro
        for position in range(plan.updates_per_epoch)
        for rank in range(world)
        for micro in plan.micro_batches(2, position, rank=rank, **split)
    ]

    def padded(micro: list[PlannedSubBatch]) -> int:
        longest = max(int(lengths[planned.sub_batch]) for planned in micro)
        return longest * sum(int(rows[planned.sub_batch]) for planned in micro)

    assert [padded(micro) for micro in found] == sorted(map(padded, every), reverse=True)[:5]
    assert all(micro in every for micro in found)


def test_a_layout_of_another_product_is_refused():
    plan, _ = sampler()
    with pytest.raises(ConfigError, match=r"--update_freq 3: .* 8 sub-batches"):
        plan.micro_batches(1, 0, rank=0, world=2, concat=1, update_freq=3)
    with pytest.raises(ConfigError, match=r"--update_freq 3: .* 8 sub-batches"):  # two passes are enough
        plan.micro_batches(1, 0, rank=0, world=3, concat=2, update_freq=3)
    with pytest.raises(DataError, match="no data"):
        UpdateSampler(lengths=np.array([]), sub_batches_per_update=8, seed=1)


# ---- Bucket after bucket --------------------------------------------------------------------------------------------

ORDERED = ("fixed_order", "synced_randomized")


def in_buckets(strategy, *, number=203, per_update=8, seed=1, buckets=4, world=1):
    """A sampler of sub-batches in buckets of unequal size, and the bucket of every sub-batch."""
    rng = np.random.default_rng(0)
    bucket_of = np.sort(rng.choice(buckets, number, p=np.arange(1, buckets + 1) / sum(range(buckets + 1))))
    plan = UpdateSampler(
        lengths=100 * bucket_of + rng.integers(1, 50, number),
        sub_batches_per_update=per_update,
        seed=seed,
        buckets=bucket_of.astype(np.uint8),
        strategy=strategy,
        world=world,
    )
    return plan, bucket_of


def visited(bucket_of, updates):
    """The buckets in the order in which updates come to them; what an update has on its borders, sorted."""
    found = [sorted({int(bucket_of[planned.sub_batch]) for planned in update}) for update in updates]
    return [list(group)[0] for _, group in groupby(found)]


@pytest.mark.parametrize("strategy", ORDERED)
def test_all_are_in_one_bucket_but_where_an_update_spans_a_border(strategy):
    plan, bucket_of = in_buckets(strategy)
    for epoch in range(1, 5):
        updates = epoch_of(plan, epoch)
        assert len(updates) == 203 // 8
        assert len(set(numbers(updates))) == len(numbers(updates)) == 200
        visits = visited(bucket_of, updates)
        assert [len(visit) for visit in visits] in ([1, 2, 1, 2, 1, 2, 1], [1, 2, 1, 2, 1, 1], [1, 1, 2, 1, 2, 1])
        alone = [visit[0] for visit in visits if len(visit) == 1]
        assert sorted(alone) == [0, 1, 2, 3]
        for before, border, after in zip(visits, visits[1:], visits[2:], strict=False):
            assert len(border) == 1 or border == sorted(before + after)


def test_buckets_are_visited_in_the_order_of_the_reference_after_a_resume_too(shared):
    cases = json.loads(shared("golden_ssl/data_pipeline.json").read_text())["bucket_order"]
    for case in cases:
        for epoch, order in enumerate(case["order_per_epoch"], start=1):
            if case["buckets"] == 4:
                plan, bucket_of = in_buckets(case["strategy"], number=400, seed=epoch)  # new, as after a resume
                found = [visit[0] for visit in visited(bucket_of, epoch_of(plan, epoch)) if len(visit) == 1]
                assert found == order


@pytest.mark.parametrize("strategy", [*ORDERED, "fully_randomized"])
def test_buckets_are_shuffled_anew_and_rest_in_turn(strategy):
    plan, bucket_of = in_buckets(strategy, per_update=40, world=2)
    resting, first = [], []
    for epoch in range(1, 204):
        found = numbers(epoch_of(plan, epoch))
        assert len(set(found)) == len(found) == 200
        resting.append(set(range(203)) - set(found))
        first.append(tuple(number for number in found if bucket_of[number] == 3))
    assert Counter(chain.from_iterable(resting)) == dict.fromkeys(range(203), 3)
    assert len(set(first)) == 203


@pytest.mark.parametrize(("world", "concat", "update_freq"), [(2, 2, 2), (4, 1, 2), (8, 1, 1), (2, 1, 4), (2, 4, 1)])
def test_fully_randomized_ranks_visit_all_buckets_in_orders_of_their_own(world, concat, update_freq):
    plan, bucket_of = in_buckets("fully_randomized", number=400, world=world)
    layout = {"world": world, "concat": concat, "update_freq": update_freq}
    lengths = plan._lengths
    for epoch in (1, 2):
        seen, orders, shares = [], [], []
        for rank in range(world):
            found = [plan.micro_batches(epoch, update, rank=rank, **layout) for update in range(plan.updates_per_epoch)]
            for update in found:
                for micro, parts in enumerate(update):
                    indices = [planned.index for planned in parts]
                    assert indices == [(micro * world + rank) * concat + slot for slot in range(concat)]
                ordered = [lengths[planned.sub_batch] for planned in chain.from_iterable(update)]
                assert ordered == sorted(ordered, reverse=True)
            own = [planned.sub_batch for update in found for planned in chain.from_iterable(update)]
            orders.append(
                tuple(visit[0] for visit in visited(bucket_of, map(chain.from_iterable, found)) if len(visit) == 1)
            )
            assert len(orders[-1]) == len(set(orders[-1])), "no bucket is visited twice"
            seen += own
            shares.append(np.bincount(bucket_of[own]))
        assert sorted(seen) == list(range(400))
        assert len(set(orders)) > 1
        assert np.ptp(shares, axis=0).max() <= 1  # every rank has its part of every bucket


def test_one_process_may_have_its_own_order_of_buckets():
    plan, bucket_of = in_buckets("fully_randomized", number=400)
    orders = {tuple(visit[0] for visit in visited(bucket_of, epoch_of(plan, epoch))) for epoch in range(1, 6)}
    assert len(orders) > 1


def test_buckets_that_are_mixed_do_not_change_the_order():
    plan, bucket_of = in_buckets(None)
    plain = UpdateSampler(lengths=plan._lengths, sub_batches_per_update=8, seed=1)
    assert epoch_of(plan, 2) == epoch_of(plain, 2)
    assert max(map(len, visited(bucket_of, epoch_of(plan, 2)))) > 2


def test_impossible_orders_of_buckets_are_refused():
    with pytest.raises(ConfigError, match="--bucketing_strategy fixed_order: there are no buckets"):
        UpdateSampler(lengths=np.ones(9), sub_batches_per_update=3, seed=1, strategy="fixed_order")
    with pytest.raises(ConfigError, match="--bucketing_strategy any: unknown"):
        in_buckets("any")
    with pytest.raises(ConfigError, match="cannot be shared by 3 processes"):
        in_buckets("fully_randomized", world=3)
    plan, _ = in_buckets("fully_randomized", world=2)
    with pytest.raises(ConfigError, match="--update_freq 2"):
        plan.micro_batches(1, 0, rank=0, world=2, concat=3, update_freq=2)
    with pytest.raises(ValueError, match="for 2 processes, not for 4"):
        plan.micro_batches(1, 0, rank=0, world=4, concat=1, update_freq=2)


# ---- Weights of datasets --------------------------------------------------------------------------------------------

WEIGHTS = (1.0, 0.3, 2.5, 0.01)
SIZES = (50, 40, 20, 10)


def weighted(per_update=8, weights=WEIGHTS, **options):
    datasets = np.repeat(np.arange(len(SIZES), dtype=np.uint8), SIZES)
    lengths = np.random.default_rng(0).integers(1, 90, len(datasets))
    plan = UpdateSampler(
        lengths=lengths,
        sub_batches_per_update=per_update,
        seed=1,
        datasets=datasets,
        dataset_weights=weights,
        **options,
    )
    return plan, datasets


@pytest.mark.parametrize("per_update", [8, 7, 64, 500])
def test_datasets_come_as_often_as_their_weights_say(per_update):
    plan, datasets = weighted(per_update)
    wanted = np.array([50, 12, 50, 1])  # weight times size; one where that is nearer to none
    passes = -(-per_update // wanted.sum())
    assert plan.updates_per_epoch == passes * wanted.sum() // per_update
    assert plan.left_over_share == pytest.approx(1 - plan.updates_per_epoch * per_update / (passes * wanted.sum()))
    seen, epochs = Counter(), 40
    for epoch in range(1, epochs + 1):
        updates = epoch_of(plan, epoch)
        assert {len(update) for update in updates} == {per_update}
        seen.update((planned.epoch_pass, planned.sub_batch) for planned in chain.from_iterable(updates))
        times = np.bincount([sub_batch for _, sub_batch in seen.elements()], minlength=len(datasets))
        for dataset in range(len(SIZES)):  # none of them is behind the others of its dataset
            assert np.ptp(times[datasets == dataset]) <= 1
    assert set(seen.values()) == {1}  # masks and crops are drawn anew every time
    assert min(epoch_pass for epoch_pass, _ in seen) == 1
    total = epochs * plan.updates_per_epoch * per_update
    found = [times[datasets == dataset].sum() for dataset in range(len(SIZES))]
    np.testing.assert_allclose(found, total * wanted / wanted.sum(), atol=wanted.sum() / 4)


def test_an_epoch_with_weights_is_a_function_of_its_number_and_not_sorted_by_dataset():
    plan, datasets = weighted()
    again, _ = weighted()
    epochs = [numbers(epoch_of(plan, epoch)) for epoch in (1, 2)]
    assert epoch_of(again, 2) == epoch_of(plan, 2)
    assert epochs[0] != epochs[1]
    for part in np.array_split(datasets[epochs[0]], 4):
        assert len(set(part.tolist())) >= 3


def test_weights_and_buckets_go_together():
    buckets = np.arange(120) % 3
    plan, _ = weighted(buckets=buckets, strategy="fixed_order")
    assert [visit[0] for visit in visited(buckets, epoch_of(plan, 4)) if len(visit) == 1] == [0, 1, 2]


def test_a_weight_of_the_only_list_changes_the_length_of_an_epoch():
    plan = UpdateSampler(lengths=np.ones(100), sub_batches_per_update=10, seed=1, dataset_weights=[0.5])
    halves = [set(numbers(epoch_of(plan, epoch))) for epoch in (1, 2, 3)]
    assert halves[0] | halves[1] == set(range(100))
    assert halves[0] == halves[2]


def test_a_list_without_data_takes_part_with_nothing_and_one_without_weight_is_refused():
    options = {"lengths": np.ones(9), "sub_batches_per_update": 3, "seed": 1, "datasets": np.repeat([0, 2], [4, 5])}
    plan = UpdateSampler(dataset_weights=[1, 3, 1], **options)
    assert sorted(numbers(epoch_of(plan, 1))) == list(range(9))
    with pytest.raises(ConfigError, match="--dataset_weights: 2 weights for 3 lists"):
        UpdateSampler(dataset_weights=[1, 3], **options)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0, 1e6])
def test_temperature_changes_the_shares_and_not_the_total(temperature):
    hours = np.array([960.0, 100.0, 10.0, 1.0])
    given = temperature_weights(hours, temperature) * hours
    assert given.sum() == pytest.approx(hours.sum())
    np.testing.assert_allclose(given / given[0], (hours / hours[0]) ** (1 / temperature))
    if temperature == 1:
        assert temperature_weights(hours, 1) == pytest.approx([1, 1, 1, 1])


def test_temperatures_at_the_limits():
    assert temperature_weights([5, 0, 5], 3) == [1, 1, 1]
    assert temperature_weights([5, 4], 1e-4) == pytest.approx([9 / 5, 0])
    with pytest.raises(ConfigError, match="--dataset_temperature 0"):
        temperature_weights([1, 2], 0)


# ---- Validation, and many of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_validation_reads_every_sub_batch_once_over_all_ranks(world):
    shares = [plan_validation(5, rank=rank, world=world) for rank in range(world)]
    assert sorted(planned.sub_batch for planned in chain.from_iterable(shares)) == list(range(5))
    assert shares[0][0] == PlannedSubBatch(0, 0, 0)


def test_a_million_sub_batches_are_planned_in_arrays():
    plan = UpdateSampler(lengths=np.ones(1_000_000, np.int64), sub_batches_per_update=64, seed=1)
    assert plan.updates_per_epoch == 15_625
    assert len(plan.update(1, 15_624)) == 64


@pytest.mark.parametrize(
    ("per_update", "alike"),
    [(1, 1), (2, 1), (8, 1), (15, 1), (16, 2), (24, 3), (32, 4), (60, 6), (64, 8), (128, 8), (67, 1)],
)
def test_an_update_keeps_eight_lengths(per_update, alike):
    assert sub_batches_alike(per_update) == alike


def test_sub_batches_that_are_joined_have_like_lengths_in_every_epoch():
    """Lengths as in LibriSpeech; the Base recipe joins 8 of the 64 of an update."""
    lengths = np.random.default_rng(0).permutation(np.linspace(32_000, 250_000, 6400).astype(np.int64))
    plan = UpdateSampler(lengths=lengths, sub_batches_per_update=64, seed=3)
    for epoch in (1, 2):
        plans = epoch_of(plan, epoch)
        joined = np.array([[lengths[part.sub_batch] for part in update] for update in plans]).reshape(-1, 8)
        assert sorted(joined.ravel()) == sorted(lengths)
        padded = 1 - joined.sum() / (joined.max(1) * 8).sum()
        assert padded < 0.02
        spread = [update[0] - update[-1] for update in joined.reshape(-1, 64)]
        assert min(spread) > 40_000  # an update still has short ones and long ones
    together = []
    for epoch in (1, 2):
        joined = np.array(numbers(epoch_of(plan, epoch))).reshape(-1, 8)
        together.append({frozenset(group) for group in joined.tolist()})
    assert len(together[0] & together[1]) < 10  # and other partners in every epoch
