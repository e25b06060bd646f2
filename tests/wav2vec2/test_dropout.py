"""Dropout: what share is dropped, independently of each other, and what becomes of the rest."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks import plain
from wav2vec2.dropout import Dropout, keep_mask

SHARES = [0.05, 0.1, 0.3, 0.5, 0.9]
MANY = 400_000


def within(share: float, p: float, draws: int) -> bool:
    """Whether a share of draws is what one expects by chance, within 5 standard deviations."""
    return abs(share - p) < 5 * math.sqrt(p * (1 - p) / draws)


@pytest.mark.parametrize("draw", [keep_mask, plain.keep_mask], ids=["ours", "plain"])
@pytest.mark.parametrize("p", SHARES)
def test_the_share_that_is_dropped_is_binomial(p, draw):
    """Everywhere: of all entries, of each of the four that share a draw, of the first and the last ones."""
    torch.manual_seed(1)
    mask, _ = draw(torch.Size((MANY,)), p)
    assert mask.dtype == torch.bool
    for part in (mask, *mask.view(-1, 4).unbind(1), mask[:5000], mask[-5000:]):
        assert within(1 - part.double().mean().item(), p, len(part))


@pytest.mark.parametrize("p", SHARES)
def test_entries_are_dropped_independently(p):
    """Both of a pair are dropped in p^2 of the cases, for entries of one draw, and of different ones."""
    torch.manual_seed(2)
    dropped = ~keep_mask(torch.Size((MANY,)), p)[0]
    for distance in (1, 2, 3, 4, 5, 8, 64, 624, 1000):
        both = (dropped[distance:] & dropped[:-distance]).double().mean().item()
        assert abs(both - p * p) < 6 * math.sqrt(p * p * (1 - p * p) / MANY) * 2, distance


@pytest.mark.parametrize("p", [*SHARES, 0.0, 1e-9, 1e-4, 0.99999, 1.0])
def test_the_expected_value_is_that_of_the_input(p):
    """The factor fits the share of 16 bits exactly, which is p up to 2^-17."""
    mask, scale = keep_mask(torch.Size((7,)), p)
    if p == 1 or p > 1 - 2**-17:
        assert scale == 0
        assert not mask.any()
    else:
        assert scale == pytest.approx(1 / (1 - p), rel=2**-17 / (1 - p))
        dropped = (1 - 1 / scale) * 2**16
        assert dropped == pytest.approx(round(dropped), abs=1e-9)
        assert abs(dropped / 2**16 - p) <= 2**-17
    if p < 2**-17:
        assert mask.all()
        assert scale == 1


def test_the_rarest_and_the_most_frequent_share_are_those_of_16_bits():
    """Thresholds at the ends of the range: 1 of 65536 is dropped, and 1 of 65536 is kept."""
    torch.manual_seed(3)
    for p in (2**-16, 1 - 2**-16):
        mask, _ = keep_mask(torch.Size((4_000_000,)), p)
        rare = mask.double().mean().item() if p > 0.5 else 1 - mask.double().mean().item()
        assert within(rare, 2**-16, mask.numel())


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (2, 3, 5), (0, 4)])
def test_any_shape_has_a_mask(shape):
    mask, _ = keep_mask(torch.Size(shape), 0.5)
    assert mask.shape == shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_is_scaled_and_has_that_gradient(dtype):
    torch.manual_seed(4)
    x = (torch.rand(50, 40) + 1).to(dtype).requires_grad_()
    y = Dropout(0.25)(x)
    assert y.dtype == dtype
    kept = y != 0
    assert within(kept.double().mean().item(), 0.75, kept.numel())
    torch.testing.assert_close(y, torch.where(kept, x * (1 / 0.75), 0))
    dy = torch.randn(50, 40).to(dtype)
    y.backward(dy)
    torch.testing.assert_close(x.grad, torch.where(kept, dy * (1 / 0.75), 0))
    assert x.detach().min() >= 1  # the input is as it was


def test_the_seed_decides_the_mask():
    module, x = Dropout(0.5), torch.ones(1000)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return module(x)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(1)
    assert not torch.equal(module(x), module(x))


def test_nothing_is_dropped_without_need():
    x = torch.randn(100)
    torch.testing.assert_close(Dropout(0.5).eval()(x), x, rtol=0, atol=0)
    torch.testing.assert_close(Dropout(0.0)(x), x, rtol=0, atol=0)
    assert not Dropout(1.0)(x).any()


def test_the_plain_form_is_torchs(monkeypatch):
    """Same draws of torch's generator as F.dropout has."""
    x = torch.randn(300)
    torch.manual_seed(5)
    expected = F.dropout(x, 0.4)
    torch.manual_seed(5)
    with plain.plain_forms(("dropout",), "cpu"):
        assert torch.equal(Dropout(0.4)(x), expected)
