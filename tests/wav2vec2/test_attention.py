"""Attention with dropout on the CPU against its formula, and what it drops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from wav2vec2 import attention
from wav2vec2.attention import SelfAttention, _DropoutAttention, keys_of

DOUBLE = {"dtype": torch.float64}


def formula(q: Tensor, k: Tensor, v: Tensor, keys_B11T: Tensor | None, factor_BHTT: Tensor | float = 1.0) -> Tensor:
    """softmax(q k' / sqrt(d)) v, with the attention weights multiplied by a factor."""
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(q.shape[-1])
    if keys_B11T is not None:
        scores = torch.where(keys_B11T, scores, -math.inf)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("bhts,bhsd->bhtd", weights * factor_BHTT, v)


class Case:
    """Queries, keys and values laid out as one projection gives them; a mask of what is kept, and lengths of rows."""

    def __init__(self, shape: tuple[int, int, int, int], lengths: tuple[int, ...] | None, p: float = 0.3) -> None:
        torch.manual_seed(0)
        B, H, T, d = shape
        self.qkv_BTD = torch.randn(B, T, 3 * H * d, **DOUBLE)
        self.shape = shape
        self.kept_BHTT = torch.rand(B, H, T, T) >= p
        self.scale = 1 / (1 - p)
        self.p = p
        self.keys_B11T = None
        if lengths is not None:
            self.keys_B11T = (torch.arange(T) < torch.tensor(lengths)[:, None])[:, None, None]

    def split(self, qkv_BTD: Tensor) -> Tensor:
        B, H, T, d = self.shape
        return qkv_BTD.view(B, T, 3, H, d).permute(2, 0, 3, 1, 4)

    def with_its_mask(self, monkeypatch) -> Case:
        monkeypatch.setattr(attention, "keep_mask", lambda shape, p: (self.kept_BHTT, self.scale))
        return self


SHAPES = [
    ((2, 3, 7, 4), None),
    ((2, 3, 7, 4), (7, 4)),
    ((3, 4, 1, 2), None),
    ((1, 5, 12, 3), (9,)),
    ((3, 2, 5, 1), (5, 1, 3)),
]


@pytest.mark.parametrize("tile", [1, 3 * 7 * 7, 2**20])
@pytest.mark.parametrize(("shape", "lengths"), SHAPES)
def test_dropout_attention_is_its_formula_with_the_same_mask(shape, lengths, tile, monkeypatch):
    """Values and gradients; with tiles of one head, of some, of all."""
    monkeypatch.setattr(attention, "SIMILARITIES_AT_HAND", tile)
    case = Case(shape, lengths).with_its_mask(monkeypatch)
    found, expected = case.qkv_BTD.clone().requires_grad_(), case.qkv_BTD.clone().requires_grad_()
    y = _DropoutAttention.apply(*case.split(found), case.keys_B11T, case.p)
    y_by_formula = formula(*case.split(expected), case.keys_B11T, case.kept_BHTT.double() * case.scale)
    torch.testing.assert_close(y, y_by_formula, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    y.backward(dy)
    y_by_formula.backward(dy)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("shape", "lengths"), [((2, 2, 4, 3), None), ((2, 2, 4, 3), (4, 2))])
def test_dropout_attention_has_the_gradient_of_finite_differences(shape, lengths, monkeypatch):
    case = Case(shape, lengths).with_its_mask(monkeypatch)
    qkv = tuple(part.contiguous().requires_grad_() for part in case.split(case.qkv_BTD))
    assert torch.autograd.gradcheck(lambda q, k, v: _DropoutAttention.apply(q, k, v, case.keys_B11T, case.p), qkv)


def test_dropout_attention_drops_weights_by_chance_and_keeps_their_mean():
    """With the unit vectors as values the output is the attention weights: dropped, or scaled up."""
    B, H, T, p = 2, 4, 64, 0.1
    torch.manual_seed(0)
    q, k = torch.randn(2, B, H, T, T, **DOUBLE)
    v = torch.eye(T, **DOUBLE).expand(B, H, T, T)
    expected = formula(q, k, v, None)
    ratio = _DropoutAttention.apply(q, k, v, None, p) / expected
    dropped = ratio == 0
    torch.testing.assert_close(ratio[~dropped], torch.full_like(ratio[~dropped], 1 / (1 - p)), rtol=1e-4, atol=0)
    draws = dropped.numel()
    for part in (dropped, *dropped.flatten(0, 1)):
        assert abs(part.double().mean() - p) < 5 * math.sqrt(p * (1 - p) / part.numel())
    assert abs(ratio.mean() - 1) < 5 * math.sqrt(p / (1 - p) / draws)
    rows = dropped.flatten(0, 2).double()
    assert len({tuple(row) for row in rows[:200].tolist()}) == 200  # no row has the mask of another


@pytest.mark.parametrize("dropout", [0.0, 1e-12])
@pytest.mark.parametrize("lengths", [None, (9, 5)])
def test_self_attention_is_its_formula_in_both_forms(dropout, lengths):
    """With dropout so rare that none happens it goes through the form with dropout."""
    torch.manual_seed(0)
    module = SelfAttention(12, 3, dropout=dropout).double()
    x_BTD = torch.randn(2, 9, 12, **DOUBLE)
    keys = None if lengths is None else (torch.arange(9) < torch.tensor(lengths)[:, None])[:, None, None]
    q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in module.qkv_proj(x_BTD).chunk(3, -1))
    expected = module.out_proj(formula(q, k, v, keys).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x_BTD, keys), expected, rtol=1e-10, atol=1e-12)
    wanted_R = torch.tensor([0, 17, 4, 9])
    torch.testing.assert_close(module(x_BTD, keys, wanted_R), expected.flatten(0, 1)[wanted_R], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("fp32_softmax", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dropout_attention_in_half_precision_is_as_exact_as_without_dropout(dtype, fp32_softmax, amp):
    """The mean error over the same module in float64; torch's own attention makes that of evaluation."""
    torch.manual_seed(0)
    module = SelfAttention(32, 4, dropout=1e-12, fp32_softmax=fp32_softmax).to(dtype)
    with torch.no_grad():
        module.qkv_proj.weight.mul_(4)  # sharp attention, where rounded similarities would show
    exact = SelfAttention(32, 4).double()
    exact.load_state_dict(module.state_dict())
    x_BTD = torch.randn(2, 40, 32).to(dtype)
    dy = torch.randn(2, 40, 32).to(dtype)

    def run(one: SelfAttention, dtype: torch.dtype) -> list[Tensor]:
        x = x_BTD.to(dtype).requires_grad_()
        one.zero_grad()
        with torch.autocast("cpu", dtype if amp else torch.bfloat16, enabled=amp and dtype != torch.float64):
            y = one(x)
        y.backward(dy.to(dtype))
        return [value.detach().double() for value in (y, x.grad, *(weight.grad for weight in one.parameters()))]

    expected, found, without = run(exact, torch.float64), run(module.train(), dtype), run(module.eval(), dtype)
    for one, other, true in zip(found, without, expected, strict=True):
        assert (one - true).norm() <= 1.3 * (other - true).norm()


def test_evaluation_drops_nothing():
    torch.manual_seed(0)
    module = SelfAttention(8, 2, dropout=0.5)
    x_BTD = torch.randn(1, 30, 8)
    module.eval()
    torch.testing.assert_close(module(x_BTD), module(x_BTD), rtol=0, atol=0)
    module.train()
    assert not torch.equal(module(x_BTD), module(x_BTD))


LENGTHS = [(9, 9, 9), (9, 9, 5, 5, 5, 1), (4, 9, 4, 9), (6, 6)]  # the last: padding behind every row


@pytest.mark.parametrize("dropout", [0.0, 1e-12])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_runs_give_valid_frames_what_a_mask_gives_them(lengths, dropout):
    """Values of the valid frames, and all gradients of a loss of them; `dropout` so rare that none happens."""
    torch.manual_seed(0)
    B, T = len(lengths), 9
    module = SelfAttention(12, 3, dropout=dropout).double()
    valid_BT = torch.arange(T) < torch.tensor(lengths)[:, None]
    dy_BTD = torch.randn(B, T, 12, **DOUBLE) * valid_BT[..., None]
    found = []
    for keys in (keys_of(valid_BT, lengths), valid_BT[:, None, None]):
        x_BTD = torch.randn(B, T, 12, generator=torch.Generator().manual_seed(1), **DOUBLE).requires_grad_()
        module.zero_grad()
        y_BTD = module(x_BTD, keys)
        y_BTD.backward(dy_BTD)
        found.append([y_BTD[valid_BT], x_BTD.grad, *(weight.grad for weight in module.parameters())])
    assert isinstance(keys_of(valid_BT, lengths), tuple)
    for run, mask in zip(*found, strict=True):
        torch.testing.assert_close(run, mask, rtol=1e-9, atol=1e-11)


def test_without_a_mask_of_keys_no_kernel_sees_one(monkeypatch):
    """What lets a GPU take its kernel for whole sequences: joined sub-batches of two lengths, each in one call."""
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recorded(q, k, v, attn_mask, dropout_p):
        calls.append((tuple(q.shape), attn_mask))
        return original(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", recorded)
    valid_BT = torch.arange(9) < torch.tensor([9, 9, 5, 5, 5])[:, None]
    SelfAttention(12, 3)(torch.randn(5, 9, 12), keys_of(valid_BT, (9, 9, 5, 5, 5)))
    assert calls == [((2, 3, 9, 4), None), ((3, 3, 5, 4), None)]


def test_a_mask_serves_where_runs_do_not_pay(monkeypatch):
    valid_BT = torch.arange(4) < torch.tensor([4, 4, 4, 2])[:, None]
    assert keys_of(None, (4, 4)) is None
    assert keys_of(valid_BT, None).equal(valid_BT[:, None, None])
    assert keys_of(valid_BT, (4, 4, 4, 2)) == ((3, 4), (1, 2))
    monkeypatch.setitem(attention.ROWS_OF_A_RUN, "cpu", 3)
    assert keys_of(valid_BT, (4, 4, 4, 2)).equal(valid_BT[:, None, None])
