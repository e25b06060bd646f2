"""Adam against its plain formula in float64, freezing, groups and state."""

# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import nn

from common.errors import CheckpointError
from common.optim import Adam, parameter_groups

BETAS, EPS, DECAY = (0.9, 0.98), 1e-3, 0.01  # an eps that matters


def gradient(step, shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def formula(weight, steps, rates):
    """The update as the original states it, one scalar operation after another."""
    weight = weight.clone()
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, (step, lr) in enumerate(zip(steps, rates, strict=True), start=1):
        g = gradient(step, weight.shape).to(weight.dtype)
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g**2
        weight = weight - lr * DECAY * weight
        size = lr * math.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t)
        weight = weight - size * m / (v.sqrt() + EPS)
    return weight


def make(dtype=torch.float64):
    torch.manual_seed(0)
    return {
        "encoder": [("w", torch.randn(4, 3).to(dtype)), ("b", torch.randn(4).to(dtype))],
        "head": [("h", torch.randn(5).to(dtype))],
    }


def make_adam(groups):
    return Adam(groups, betas=BETAS, eps=EPS, weight_decay=DECAY)


def apply(adam, groups, step, lr, frozen=()):
    trained = {key: group for key, group in groups.items() if key not in frozen}
    adam.step(lr, {key: [gradient(step, w.shape).to(w.dtype) for _, w in group] for key, group in trained.items()})


def copies(groups):
    return {name: weight.clone() for group in groups.values() for name, weight in group}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_the_fused_update_is_the_formula_of_the_original(dtype, tolerance):
    groups = make(dtype)
    start = copies(make())
    adam = make_adam(groups)
    rates = [0.0, 0.1, 0.05, 0.2, 0.01]
    for step, lr in enumerate(rates):
        apply(adam, groups, step, lr)
    for name, weight in copies(groups).items():
        expected = formula(start[name].to(dtype).double(), range(5), rates)
        torch.testing.assert_close(weight.double(), expected, rtol=tolerance, atol=tolerance)


def test_eps_is_not_bias_corrected():
    """In update 1 the step is lr * g / (|g| + eps / sqrt(1 - beta2)), which torch's own AdamW does not make."""
    ours, theirs = torch.ones(1, dtype=torch.float64), nn.Parameter(torch.ones(1, dtype=torch.float64))
    theirs.grad = torch.full((1,), 0.01, dtype=torch.float64)
    Adam({"all": [("w", ours)]}, betas=BETAS, eps=EPS, weight_decay=0.0).step(0.1, {"all": [theirs.grad.clone()]})
    torch.optim.AdamW([theirs], lr=0.1, betas=BETAS, eps=EPS, weight_decay=0.0).step()
    assert ours.item() == pytest.approx(1 - 0.1 * 0.01 / (0.01 + EPS / math.sqrt(0.02)), rel=1e-12)
    assert abs(ours.item() - theirs.item()) > 1e-2


def test_a_frozen_group_keeps_weights_moments_and_step_count():
    groups = make()
    adam = make_adam(groups)
    apply(adam, groups, 0, 0.1)
    before = copies(groups)
    moments = {name: entry["exp_avg"].clone() for name, entry in adam.state_dict().items()}
    apply(adam, groups, 1, 0.1, frozen={"encoder"})
    after, state = copies(groups), adam.state_dict()
    for name in ("w", "b"):
        assert torch.equal(after[name], before[name])
        assert torch.equal(state[name]["exp_avg"], moments[name])
        assert state[name]["step"] == 1
    assert state["h"]["step"] == 2
    apply(adam, groups, 2, 0.1)
    start = copies(make())
    torch.testing.assert_close(copies(groups)["w"], formula(start["w"], [0, 2], [0.1, 0.1]), rtol=0, atol=1e-13)
    torch.testing.assert_close(copies(groups)["h"], formula(start["h"], [0, 1, 2], [0.1] * 3), rtol=0, atol=1e-13)


def test_a_group_frozen_from_the_start_begins_with_update_one():
    groups = make()
    adam = make_adam(groups)
    apply(adam, groups, 0, 0.1, frozen=["encoder"])
    apply(adam, groups, 1, 0.1)
    torch.testing.assert_close(copies(groups)["w"], formula(copies(make())["w"], [1], [0.1]), rtol=0, atol=1e-13)


def test_continuing_from_a_state_is_bitwise_the_uninterrupted_run():
    groups = make(torch.float32)
    adam = make_adam(groups)
    for step in range(3):
        apply(adam, groups, step, 0.1, frozen=["head"] if step == 1 else ())
    again = {key: [(name, weight.clone()) for name, weight in group] for key, group in groups.items()}
    resumed = make_adam(again)
    resumed.load_state_dict(
        {
            name: {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in entry.items()}
            for name, entry in adam.state_dict().items()
        }
    )
    for step in range(3, 6):
        apply(adam, groups, step, 0.1)
        apply(resumed, again, step, 0.1)
    for name, weight in copies(groups).items():
        assert torch.equal(weight, copies(again)[name])


def test_a_state_exists_before_the_first_update():
    state = make_adam(make()).state_dict()
    assert {name: (entry["step"], float(entry["exp_avg"].sum())) for name, entry in state.items()} == {
        "w": (0, 0.0),
        "b": (0, 0.0),
        "h": (0, 0.0),
    }


def test_the_state_of_other_parameters_is_refused_by_name():
    adam = make_adam(make())
    state = adam.state_dict()
    with pytest.raises(CheckpointError, match=r"missing h.*unexpected extra"):
        adam.load_state_dict({"extra": state["h"], "w": state["w"], "b": state["b"]})
    with pytest.raises(CheckpointError, match=r"h \[2\] instead of \[5\]"):
        adam.load_state_dict({**state, "h": {**state["h"], "exp_avg": torch.zeros(2)}})
    with pytest.raises(CheckpointError, match=r"group encoder have step counts \[0, 4\]"):
        adam.load_state_dict({**state, "b": {**state["b"], "step": 4}})


def test_parameters_are_grouped_by_name_without_those_that_are_never_trained():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    module[0].bias.requires_grad = False
    groups = parameter_groups(module, lambda name: "head" if name.startswith("1.") else "encoder")
    assert {key: [name for name, _ in group] for key, group in groups.items()} == {
        "encoder": ["0.weight"],
        "head": ["1.weight", "1.bias"],
    }
    assert groups["head"][0][1] is module[1].weight
