"""Loss scaling, master weights, clipping, skipped updates, freezing and state, against plain formulas."""

# SPDX-License-Identifier: Apache-2.0
import json
import math

import pytest
import torch
from torch import nn

from common.errors import CheckpointError, TrainingError
from common.precision import LossScaler, MixedPrecisionOptimizer, autocast, to_half

SETTINGS = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def names(tensors, **settings):
    """An optimizer over one weight per group."""
    groups = {key: [(key, parameter)] for key, parameter in tensors.items()}
    return MixedPrecisionOptimizer(groups, **{**SETTINGS, **settings})


def make(dtype, scaler=None):
    torch.manual_seed(0)
    tensors = {key: nn.Parameter(torch.randn(6).to(dtype)) for key in ("encoder", "head")}
    return tensors, names(tensors, scaler=scaler)


def scaler_for(dtype):
    return LossScaler(init=128, window=4) if dtype == torch.float16 else None


def direction(step):
    """The gradient of update `step` with respect to both weights, exact in every precision."""
    generator = torch.Generator().manual_seed(step)
    return {key: torch.randint(-8, 9, (6,), generator=generator) / 16 for key in ("encoder", "head")}


def backward(tensors, optimizer, step, factor=1.0):
    wanted = direction(step)
    optimizer.backward(sum((tensors[key] * wanted[key] * factor).float().sum() for key in tensors))


def update(tensors, optimizer, step, lr=0.1, max_norm=0.0):
    backward(tensors, optimizer, step)
    norm = optimizer.clip_grad_norm(max_norm)
    return norm, optimizer.step(lr)


def snapshot(optimizer):
    state = optimizer.state_dict()
    flat = {f"{name}.{key}": torch.as_tensor(entry[key]).clone() for name, entry in state.items() for key in entry}
    return {**flat, **{name: tensor.clone() for name, tensor in optimizer.master_weights().items()}}


def same(first, second):
    return {name for name, tensor in first.items() if torch.equal(tensor, second[name])}


def reference(start, steps, lr, max_norm):
    """Clipping and the original's Adam in float64."""
    weights = {key: tensor.double() for key, tensor in start.items()}
    m = {key: torch.zeros_like(tensor) for key, tensor in weights.items()}
    v = {key: torch.zeros_like(tensor) for key, tensor in weights.items()}
    for t, step in enumerate(steps, start=1):
        gradients = {key: tensor.double() for key, tensor in direction(step).items()}
        norm = math.sqrt(sum(float((tensor**2).sum()) for tensor in gradients.values()))
        shrink = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
        for key, weight in weights.items():
            g = gradients[key] * shrink
            m[key] = 0.9 * m[key] + 0.1 * g
            v[key] = 0.98 * v[key] + 0.02 * g**2
            size = lr * math.sqrt(1 - 0.98**t) / (1 - 0.9**t)
            weights[key] = weight * (1 - lr * 0.01) - size * m[key] / (v[key].sqrt() + 1e-6)
    return weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_master_weights_follow_float64_in_every_precision(dtype, max_norm):
    tensors, optimizer = make(dtype, scaler_for(dtype))
    start = {key: tensor.clone() for key, tensor in optimizer.master_weights().items()}
    for step in range(9):  # the scale doubles twice on the way
        assert update(tensors, optimizer, step, lr=0.01, max_norm=max_norm)[1]
    expected = reference(start, range(9), 0.01, max_norm)
    masters = optimizer.master_weights()
    assert optimizer.loss_scale == (512 if dtype == torch.float16 else 1)
    for key, tensor in tensors.items():
        assert masters[key].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        exact = dtype == torch.float64 and not max_norm  # the factor of clipping is a float32 number
        tolerance = 1e-12 if exact else 2e-6
        torch.testing.assert_close(masters[key].double(), expected[key], rtol=tolerance, atol=tolerance)
        assert tensor.dtype == dtype
        assert torch.equal(tensor.detach(), masters[key].to(dtype))


def test_updates_too_small_for_half_precision_add_up_in_the_master():
    tensors, optimizer = make(torch.bfloat16)
    start = optimizer.master_weights()["head"].clone()
    for _ in range(20):
        update(tensors, optimizer, 3, lr=1e-5)
    moved = (optimizer.master_weights()["head"] - start)[direction(3)["head"] != 0].abs()
    assert bool((moved > 1.5e-4).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_the_unscaled_gradients_and_clipping_bounds_it(dtype):
    for max_norm in (0.0, 0.25, 100.0):
        tensors, optimizer = make(dtype, scaler_for(dtype))
        backward(tensors, optimizer, 1)
        norm = optimizer.clip_grad_norm(max_norm)
        flat = torch.cat(list(direction(1).values()))
        assert norm.item() == pytest.approx(flat.norm().item(), rel=1e-6)
        optimizer.step(0.0)
        # After the first update exp_avg is 0.1 * the gradient that was used.
        used = torch.cat([entry["exp_avg"] for entry in optimizer.state_dict().values()]) / 0.1
        expected = 0.25 if max_norm == 0.25 else flat.norm().item()
        assert used.norm().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_norm_of_the_weights_is_that_of_all_masters_and_tells_one_bad_value(dtype, bad):
    tensors, optimizer = make(dtype, scaler_for(dtype))
    optimizer.freeze(["encoder"])
    flat = torch.cat([tensor.detach().float() for tensor in tensors.values()])
    assert optimizer.weight_norm().item() == pytest.approx(flat.norm().item(), rel=1e-6)
    optimizer.master_weights()["encoder"][3] = bad
    assert not math.isfinite(optimizer.weight_norm().item())


def test_micro_batches_add_up():
    one, first = make(torch.float32)
    two, second = make(torch.float32)
    backward(one, first, 5)
    backward(two, second, 5, factor=0.25)
    backward(two, second, 5, factor=0.75)
    assert first.clip_grad_norm(0.0).item() == pytest.approx(second.clip_grad_norm(0.0).item())
    first.step(0.1)
    second.step(0.1)
    torch.testing.assert_close(one["head"], two["head"])


def test_a_step_clears_the_gradients_and_needs_no_clipping_before():
    tensors, optimizer = make(torch.float16, scaler_for(torch.float16))
    twin_tensors, twin = make(torch.float16, scaler_for(torch.float16))
    backward(tensors, optimizer, 0)
    assert optimizer.step(0.1)
    update(twin_tensors, twin, 0)
    assert all(tensor.grad is None for tensor in tensors.values())
    assert torch.equal(tensors["head"], twin_tensors["head"])


@pytest.mark.parametrize("bad", [math.inf, math.nan, 1e6])  # 1e6 is finite, but not in fp16
def test_an_overflow_skips_the_update_halves_the_scale_and_touches_nothing(bad):
    tensors, optimizer = make(torch.float16, LossScaler(init=128))
    update(tensors, optimizer, 0)
    before = snapshot(optimizer)
    backward(tensors, optimizer, 1, factor=bad)
    optimizer.clip_grad_norm(1.0)
    assert not optimizer.step(0.1)
    assert (optimizer.loss_scale, optimizer.num_skipped) == (64.0, 1)
    assert same(before, snapshot(optimizer)) == set(before)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert update(tensors, optimizer, 2)[1]
    expected = make(torch.float16, LossScaler(init=128))
    for step in (0, 2):
        update(*expected, step)
    assert same(snapshot(optimizer), snapshot(expected[1])) == set(before)


def test_only_fp16_reads_anything_from_the_device(monkeypatch):
    reads = []
    original = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: reads.append(1) or original(self))
    for dtype, expected in ((torch.float32, 0), (torch.bfloat16, 0), (torch.float16, 1)):
        reads.clear()
        tensors, optimizer = make(dtype, scaler_for(dtype))
        assert update(tensors, optimizer, 0, max_norm=1.0)[1]
        assert len(reads) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_gradients", [True, False])
def test_a_frozen_group_does_not_change_and_does_not_count_in_the_norm(dtype, zero_gradients):
    tensors, optimizer = make(dtype, scaler_for(dtype))
    update(tensors, optimizer, 0)
    before = snapshot(optimizer)
    optimizer.freeze(["encoder"])
    loss = (tensors["head"] * direction(1)["head"]).float().sum()
    if zero_gradients:  # what DDP wants to see
        loss = loss + 0 * tensors["encoder"].float().sum()
    optimizer.backward(loss)
    assert optimizer.clip_grad_norm(0.0).item() == pytest.approx(direction(1)["head"].norm().item(), rel=1e-6)
    assert optimizer.step(0.1)
    kept = same(before, snapshot(optimizer))
    assert kept == {name for name in before if name.startswith("encoder")}
    optimizer.freeze([])
    assert update(tensors, optimizer, 2)[1]
    steps = {name: entry["step"] for name, entry in optimizer.state_dict().items()}
    assert steps == {"encoder": 2, "head": 3}


def test_freezing_an_unknown_group_is_an_error():
    with pytest.raises(ValueError, match=r"\['decoder'\]; there are \['encoder', 'head'\]"):
        make(torch.float32)[1].freeze(["decoder"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_without_a_gradient_is_an_error_and_not_a_zero(dtype):
    tensors, optimizer = make(dtype)
    optimizer.backward(tensors["head"].float().sum())
    with pytest.raises(RuntimeError, match="encoder: no gradient"):
        optimizer.clip_grad_norm(0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(dtype):
    tensors, optimizer = make(dtype, scaler_for(dtype))
    for step in range(5):
        update(tensors, optimizer, step, max_norm=1.0)
    saved = json.loads(json.dumps(optimizer.scaler.state_dict())) if optimizer.scaler else None
    state = {
        name: {key: value.clone() if key != "step" else value for key, value in entry.items()}
        for name, entry in optimizer.state_dict().items()
    }
    masters = {name: tensor.clone() for name, tensor in optimizer.master_weights().items()}
    again, resumed = make(dtype, scaler_for(dtype))
    resumed.load_master({**masters, "a buffer": torch.zeros(3)})
    resumed.load_state_dict(state)
    if saved:
        resumed.scaler.load_state_dict(saved)
    for step in range(5, 12):
        update(tensors, optimizer, step, max_norm=1.0)
        update(again, resumed, step, max_norm=1.0)
    assert same(snapshot(optimizer), snapshot(resumed)) == set(snapshot(optimizer))
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)
    assert resumed.loss_scale == optimizer.loss_scale


@pytest.mark.parametrize("dtype", DTYPES)
def test_loaded_weights_reach_the_model_rounded_and_the_master_exactly(dtype):
    tensors, optimizer = make(dtype)
    weights = {key: torch.linspace(0.1, 0.7, 6) for key in tensors}
    optimizer.load_master(weights)
    for key, tensor in tensors.items():
        assert torch.equal(optimizer.master_weights()[key].float(), weights[key])
        assert torch.equal(tensor.detach(), weights[key].to(dtype))


def test_weights_or_state_of_another_model_are_refused():
    _, optimizer = make(torch.bfloat16)
    with pytest.raises(CheckpointError, match="missing head"):
        optimizer.load_master({"encoder": torch.zeros(6)})
    with pytest.raises(CheckpointError, match=r"encoder \[2\] instead of \[6\]"):
        optimizer.load_master({"encoder": torch.zeros(2), "head": torch.zeros(6)})
    with pytest.raises(CheckpointError, match=r"missing encoder, head"):
        optimizer.load_state_dict({})


def test_one_model_may_hold_several_precisions():
    tensors = {"encoder": nn.Parameter(torch.ones(6).half()), "head": nn.Parameter(torch.ones(6))}
    optimizer = names(tensors, scaler=LossScaler(init=8))
    norm, updated = update(tensors, optimizer, 1, max_norm=0.25)
    assert updated
    assert norm.item() == pytest.approx(torch.cat(list(direction(1).values())).norm().item(), rel=1e-6)
    assert optimizer.master_weights()["head"].data_ptr() == tensors["head"].data_ptr()
    expected = reference({key: torch.ones(6) for key in tensors}, [1], 0.1, 0.25)
    for key, master in optimizer.master_weights().items():
        torch.testing.assert_close(master.double(), expected[key], rtol=2e-6, atol=2e-6)


def test_to_half_converts_all_floating_tensors_but_those_of_the_kept_modules():
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2), nn.BatchNorm1d(2)))
    weight = module[0].weight
    to_half(module, torch.bfloat16, keep_fp32=[module[1][0]])
    found = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    half = {"0.weight", "0.bias", "1.1.weight", "1.1.bias", "1.1.running_mean", "1.1.running_var"}
    assert {name for name, dtype in found.items() if dtype == torch.bfloat16} == half
    assert found["1.0.weight"] == torch.float32
    assert found["1.1.num_batches_tracked"] == torch.int64
    assert module[0].weight is weight


def test_a_weight_shared_with_a_kept_module_is_kept():
    module = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2)})
    module["one"].weight = module["two"].weight
    to_half(module, torch.float16, keep_fp32=[module["two"]])
    assert module["one"].weight.dtype == torch.float32
    assert module["one"].bias.dtype == torch.float16


def test_autocast_changes_the_precision_of_a_product_only_when_asked():
    layer = nn.Linear(2, 2)
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert layer(torch.ones(1, 2)).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), None):
        assert layer(torch.ones(1, 2)).dtype == torch.float32


def trace(scaler, finite):
    """(scale used, result, scale after) per update, up to the one that gives up."""
    rows = []
    for one in finite:
        used = scaler.scale
        try:
            rows.append((used, scaler.update(one), scaler.scale))
        except TrainingError:
            rows.append((used, "raised", scaler.scale))
            break
    return rows


def test_twenty_halvings_from_128_are_the_last_ones():
    scaler = LossScaler()
    rows = trace(scaler, [False] * 30)
    assert [row[1] for row in rows] == ["skipped"] * 20 + ["raised"]
    assert [row[2] for row in rows] == [2.0 ** (6 - halving) for halving in range(20)] + [2.0**-13]
    assert scaler.scale == 2.0**-13


def test_giving_up_says_what_to_do():
    with pytest.raises(TrainingError, match=r"(?s)fp16 loss scale.*--lr.*--bf16"):
        LossScaler(init=1, minimum=0.5).update(False)


def test_the_scale_doubles_after_a_window_without_overflow():
    scaler = LossScaler(init=8, window=3)
    rows = trace(scaler, [True, True, False, True, True, True, True, True, True, True])
    assert [row[2] for row in rows] == [8, 8, 4, 4, 4, 8, 8, 8, 16, 16]


def test_tolerance_forgives_rare_overflows_and_threshold_bounds_the_scale():
    forgiving = LossScaler(init=8, window=100, tolerance=0.5)
    rows = trace(forgiving, [True, True, True, False, False, False])
    assert [row[1:] for row in rows[3:]] == [("skipped", 8), ("skipped", 8), ("skipped", 4)]
    bounded = LossScaler(init=8, threshold=4)
    assert [row[2] for row in trace(bounded, [False] * 5)] == [4, 4, 4, 4, 4]
    assert bounded.num_skipped == 5


def test_the_default_window_counts_backward_passes():
    assert LossScaler.default_window(1, 1) == 16384
    assert LossScaler.default_window(3, 5) == 1092
    assert LossScaler.default_window(64, 1024) == 1


def test_the_scaler_reproduces_the_stored_traces(shared):
    golden = json.loads((shared("golden_nvidia") / "loss_scaler.json").read_text())
    raising = ("FloatingPointError", "ZeroDivisionError")
    for case in golden["cases"]:
        config = dict(case["config"])
        scaler = LossScaler(
            init=config["init_scale"],
            window=config["scale_window"],
            tolerance=config["tolerance"],
            threshold=config["threshold"],
            minimum=config["min_loss_scale"],
        )
        if "rows" in case:
            rows = trace(scaler, [row[0] == "ok" for row in case["rows"]])
            wanted = [(row[1], "raised" if row[2] in raising else row[2], row[3]) for row in case["rows"]]
            assert rows == wanted[: len(rows)]
            assert len(rows) == len(wanted) or rows[-1][1] == "raised"
            continue
        finite = [event == "ok" for event, count in case["events_run_length"] for _ in range(count)]
        rows = trace(scaler, finite)
        changed = [
            (number, result, after)
            for number, (used, result, after) in enumerate(rows, start=1)
            if result != "applied" or after != used
        ]
        assert changed == [(row["update"], row["result"], row["scale_after"]) for row in case["changes"]]
        assert scaler.scale == case["final_scale"]
    for window in golden["defaults"]["windows"]:
        assert LossScaler.default_window(window["world_size"], window["update_freq"]) == window["scale_window"]
