"""The averaged weights: formula, evaluation swap and state."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from common.ema import Ema
from common.errors import CheckpointError, ConfigError


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(3, 2).to(dtype)


def masters(model, shift=0.0):
    return {name: parameter.detach().float() + shift for name, parameter in model.named_parameters()}


def bits(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_the_average_is_the_geometric_sum():
    start = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    ema = Ema(0.9, start)
    for value in (3.0, 5.0):
        ema.update({"w": torch.full((2,), value, dtype=torch.float64)})
    expected = 0.81 * start["w"] + 0.09 * 3 + 0.1 * 5
    assert ema.weights()["w"].dtype == torch.float64
    torch.testing.assert_close(ema.weights()["w"], expected, rtol=1e-14, atol=0)
    assert start["w"].tolist() == [1.0, 2.0]


def test_the_average_keeps_what_half_precision_would_lose():
    ema = Ema(0.999, {"w": torch.ones(1, dtype=torch.bfloat16)})
    for _ in range(10):
        ema.update({"w": torch.full((1,), 2.0, dtype=torch.bfloat16)})
    assert ema.weights()["w"].dtype == torch.float32
    assert ema.weights()["w"].item() == pytest.approx(2 - 0.999**10, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_evaluation_sees_the_average_and_training_its_own_weights_again_bitwise(dtype):
    model = make_model(dtype)
    ema = Ema(0.5, masters(model))
    ema.update(masters(model, shift=1.0))
    before = bits(model)
    with ema.swapped_in(model):
        for name, parameter in model.named_parameters():
            assert parameter.dtype == dtype
            assert torch.equal(parameter, ema.weights()[name].to(dtype))
            assert not torch.equal(parameter, before[name])
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_weights_come_back_after_an_error_in_the_evaluation():
    model = make_model()
    ema = Ema(0.5, masters(model, shift=1.0))
    before = bits(model)
    with pytest.raises(RuntimeError, match="in the evaluation"), ema.swapped_in(model):
        raise RuntimeError("in the evaluation")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_swapping_does_not_touch_the_average():
    model = make_model()
    ema = Ema(0.5, masters(model, shift=1.0))
    before = ema.weights()["weight"].clone()
    with ema.swapped_in(model), torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(ema.weights()["weight"], before)


@pytest.mark.parametrize("decay", [None, 0, 0.0])
def test_without_decay_everything_is_a_no_op(decay):
    model = make_model()
    ema = Ema(decay, masters(model))
    before = bits(model)
    ema.update(masters(model, shift=1.0))
    with ema.swapped_in(model):
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not ema.active
    assert ema.weights() == {}
    assert ema.state_dict() is None
    ema.load_state_dict(None)


def test_continuing_from_a_state_is_bitwise_the_uninterrupted_run():
    model = make_model()
    ema = Ema(0.9, masters(model))
    ema.update(masters(model, shift=1.0))
    resumed = Ema(0.9, masters(model))
    resumed.load_state_dict({name: tensor.clone() for name, tensor in ema.state_dict().items()})
    for one in (ema, resumed):
        one.update(masters(model, shift=-2.0))
    assert all(torch.equal(tensor, resumed.weights()[name]) for name, tensor in ema.weights().items())


def test_a_state_that_does_not_fit_is_refused(caplog):
    ema = Ema(0.9, {"w": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="without --ema"):
        ema.load_state_dict(None)
    with pytest.raises(CheckpointError, match=r"missing w.*unexpected v"):
        ema.load_state_dict({"v": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"w \[3\] instead of \[2\]"):
        ema.load_state_dict({"w": torch.zeros(3)})
    Ema(0, {}).load_state_dict({"w": torch.zeros(2)})
    assert "--ema is off" in caplog.text


@pytest.mark.parametrize("decay", [1.0, -0.1, 2])
def test_an_impossible_decay_is_refused(decay):
    with pytest.raises(ConfigError, match="--ema"):
        Ema(decay, {})
