"""The convolutions as products of matrices against torch's convolutions and norms, row by row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wav2vec2 import convolutions
from wav2vec2.convolutions import (
    PositionalConv,
    flat_windows,
    grouped_conv,
    normed_first_conv,
    normed_spectrum,
    row_pitch,
    strided_conv,
)

DOUBLE = {"dtype": torch.float64}
EPS = 1e-5


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Same values, up to a share of the largest."""
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).abs().max()
    assert error <= tolerance * expected.abs().max(), (error, expected.abs().max())


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


# ---- The first block ------------------------------------------------------------------------------------------------


class First:
    """A first block with its waveforms; everything can be had by the toolkit and by torch's own operations."""

    def __init__(self, kernel: int, stride: int, channels: int, samples: int, rows: int = 2, *, bias: bool = False):
        torch.manual_seed(0)
        self.stride = stride
        self.audio_BS = torch.randn(rows, samples, **DOUBLE) * 0.3 + 0.1
        self.weights = [
            torch.randn(channels, 1, kernel, **DOUBLE),
            torch.randn(channels, **DOUBLE) if bias else None,
            torch.rand(channels, **DOUBLE) + 0.5,
            torch.randn(channels, **DOUBLE),
        ]

    @property
    def frames(self) -> int:
        return (self.audio_BS.shape[1] - self.weights[0].shape[-1]) // self.stride + 1

    def leaves(self, dtype: torch.dtype) -> list[Any]:
        return [weight if weight is None else weight.clone().to(dtype).requires_grad_() for weight in self.weights]

    def ours(self, lengths_B: Tensor | None, rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Any]]:
        """gelu(norm(conv)) [B, rows, C], and the weights that it came from."""
        weights = self.leaves(dtype)
        options = {"stride": self.stride, "lengths_B": lengths_B, "eps": EPS, "pitch": rows}
        return normed_first_conv(self.audio_BS.to(dtype), *weights, **options), weights

    def by_torch(self, lengths_B: Tensor | None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Any]]:
        """[B, T, C]: mean and variance of the valid frames of a row, applied to all of them."""
        weights = self.leaves(dtype)
        weight, bias, gain, shift = weights
        x_BCT = F.conv1d(self.audio_BS.to(dtype)[:, None], weight, bias, self.stride)
        if lengths_B is None:
            return F.gelu(F.group_norm(x_BCT, len(gain), gain, shift, EPS)).transpose(1, 2), weights
        found = []
        for x_CT, length in zip(x_BCT, lengths_B.tolist(), strict=True):
            variance_C1, mean_C1 = torch.var_mean(x_CT[:, :length], 1, unbiased=False, keepdim=True)
            found.append((x_CT - mean_C1) / torch.sqrt(variance_C1 + EPS) * gain[:, None] + shift[:, None])
        return F.gelu(torch.stack(found)).transpose(1, 2), weights


def gradients(y: Tensor, weights: list[Any], dy: Tensor) -> list[Tensor]:
    y.backward(dy.to(y.dtype))
    return [weight.grad for weight in weights if weight is not None]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lengths", [None, (1.0, 1.0), (0.6, 1.0)], ids=["whole", "all_valid", "padded"])
@pytest.mark.parametrize(
    ("kernel", "stride", "samples"),
    [(10, 5, 403), (10, 5, 10), (7, 3, 100), (3, 5, 101), (1, 1, 20), (4, 4, 97), (8, 1, 30)],
)
@pytest.mark.parametrize("tile", [24, 2**19])
def test_first_block_is_convolution_group_norm_and_gelu(kernel, stride, samples, lengths, bias, tile, monkeypatch):
    """With tiles of 4 frames that end anywhere in a row, too."""
    monkeypatch.setitem(convolutions.TILE, "cpu", tile)
    block = First(kernel, stride, 6, samples, bias=bias)
    lengths_B = lengths and torch.tensor([max(1, int(share * block.frames)) for share in lengths])
    ours, weights = block.ours(lengths_B, block.frames + 3)
    expected, leaves = block.by_torch(lengths_B)
    close(ours[:, : block.frames], expected)
    assert not ours[:, block.frames :].any()
    dy = torch.randn_like(ours)
    found = gradients(ours, weights, dy)
    for one, other in zip(found, gradients(expected, leaves, dy[:, : block.frames]), strict=True):
        scale = max(0.1, float(other.abs().max()))  # that of a bias is 0: the norm takes it away
        assert (one - other).abs().max() <= 1e-9 * scale


def test_first_block_of_a_row_does_not_see_its_padding():
    block = First(10, 5, 4, 400, rows=1)
    audio = block.audio_BS
    alone, weights = block.ours(None, block.frames)
    found = gradients(alone, weights, torch.ones_like(alone))
    block.audio_BS = F.pad(audio, (0, 500), value=30.0)
    padded, again = block.ours(torch.tensor([alone.shape[1]]), block.frames)
    close(padded[:, : alone.shape[1]], alone)
    dy = torch.zeros_like(padded)
    dy[:, : alone.shape[1]] = 1
    for one, other in zip(gradients(padded, again, dy), found, strict=True):
        close(one, other)


@pytest.mark.parametrize("lengths", [None, (5, 2)])
def test_first_block_has_the_gradient_of_finite_differences(lengths, monkeypatch):
    monkeypatch.setitem(convolutions.TILE, "cpu", 6)
    block = First(4, 2, 3, 14, bias=True)
    lengths_B = lengths and torch.tensor(lengths)

    def function(*weights: Tensor) -> Tensor:
        return normed_first_conv(block.audio_BS, *weights, stride=2, lengths_B=lengths_B, eps=0.1, pitch=8)

    assert torch.autograd.gradcheck(function, tuple(block.leaves(torch.float64)))


def low_pass(block: First) -> First:
    """Waveforms whose neighbouring samples are almost equal, around a constant: the worst case for covariances."""
    noise = torch.randn(block.audio_BS.shape[0], block.audio_BS.shape[1] + 63, **DOUBLE)
    smooth = torch.hann_window(64, **DOUBLE)
    block.audio_BS = F.conv1d(noise[:, None], (smooth / smooth.sum())[None, None])[:, 0] * 0.3 + 0.3
    return block


@pytest.mark.parametrize("padded", [False, True])
def test_first_block_in_float32_keeps_its_accuracy_on_a_smooth_signal_with_an_offset(padded):
    block = low_pass(First(10, 5, 16, 16000))
    lengths_B = torch.tensor([block.frames, block.frames // 2]) if padded else None
    expected, leaves = block.by_torch(lengths_B)
    dy = torch.randn_like(expected)
    exact = gradients(expected, leaves, dy)
    ours, weights = block.ours(lengths_B, block.frames, torch.float32)
    assert ours.dtype == torch.float32
    theirs, others = block.by_torch(lengths_B, torch.float32)
    assert relative_error(ours, expected) < 1.5 * relative_error(theirs, expected) < 2e-6
    for one, other, true in zip(gradients(ours, weights, dy), gradients(theirs, others, dy), exact, strict=True):
        assert relative_error(other, true) < 1e-5
        assert relative_error(one, true) < 4e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda block: block, low_pass], ids=["noise", "smooth"])
def test_first_block_in_half_precision_is_nearer_than_torchs_operations(make, dtype):
    block = make(First(10, 5, 16, 8000))
    block.audio_BS = block.audio_BS.to(dtype).double()
    block.weights = [weight if weight is None else weight.to(dtype).double() for weight in block.weights]
    expected, leaves = block.by_torch(None)
    dy = torch.randn_like(expected).to(dtype).double()
    exact = gradients(expected, leaves, dy)
    ours, weights = block.ours(None, block.frames, dtype)
    theirs, others = block.by_torch(None, dtype)
    assert ours.dtype == dtype
    assert relative_error(ours, expected) < relative_error(theirs, expected)
    for one, other, true in zip(gradients(ours, weights, dy), gradients(theirs, others, dy), exact, strict=True):
        assert relative_error(one, true) < relative_error(other, true)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_first_block_in_half_precision_does_not_overflow(dtype):
    """Sums of squares over seconds of loud audio are beyond float16."""
    block = First(10, 5, 4, 200000, rows=1)
    block.audio_BS = (block.audio_BS * 300 + 20).to(dtype).double()
    block.weights = [weight if weight is None else weight.to(dtype).double() for weight in block.weights]
    for lengths_B in (None, torch.tensor([block.frames])):
        ours, weights = block.ours(lengths_B, block.frames, dtype)
        assert (ours.double() - block.by_torch(lengths_B)[0]).abs().max() < 0.05
        assert all(value.isfinite().all() for value in gradients(ours, weights, torch.full_like(ours, 1e-3)))


def test_first_block_under_autocast_gives_its_type_and_the_accuracy_of_float32():
    block = First(10, 5, 16, 8000)
    exact, leaves = block.by_torch(None)
    dy = torch.randn_like(exact).to(torch.bfloat16).double()
    with torch.autocast("cpu", torch.bfloat16):
        ours, weights = block.ours(None, block.frames, torch.float32)
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) < 2**-9
    for one, true in zip(gradients(ours, weights, dy), gradients(exact, leaves, dy), strict=True):
        assert one.dtype == torch.float32
        assert relative_error(one, true) < 1e-5


# ---- The other blocks -----------------------------------------------------------------------------------------------

SHAPES = [(3, 2), (2, 2), (1, 1), (5, 3), (2, 3), (1, 4), (4, 2), (7, 2), (3, 1), (6, 3)]  # kernel and stride


@pytest.mark.parametrize("frames", [[1, 2], [60, 60, 60], [2, 1, 1]])
@pytest.mark.parametrize("strides", [[2, 2, 2], [3, 2], [1], []])
def test_pitch_holds_all_frames_and_can_be_divided_by_every_stride(frames, strides):
    for count in range(1, 100):
        pitch = row_pitch(count, strides)
        assert count <= pitch < count + math.prod(strides)
        assert pitch % math.prod(strides) == 0
    assert row_pitch(1600, [2] * 6) == 1600


def test_windows_of_all_waveforms_lie_one_after_the_other():
    audio_BS = torch.randn(2, 23)
    windows = flat_windows(audio_BS, 4, 3, 9).view(2, 9, 4)
    for row in range(2):
        for frame in range(7):
            assert windows[row, frame].tolist() == audio_BS[row, 3 * frame : 3 * frame + 4].tolist()
    assert not windows[:, 7:].any()


class Strided:
    """A buffer of utterances with anything behind their frames, and a convolution over it."""

    def __init__(self, kernel: int, stride: int, frames: int, *, bias: bool, gelu: bool) -> None:
        torch.manual_seed(0)
        self.stride, self.frames, self.gelu = stride, frames, gelu
        self.pitch = row_pitch(frames, [stride])
        self.buffer_RI = torch.randn(3 * self.pitch, 5, **DOUBLE)
        self.weight_OIk = torch.randn(4, 5, kernel, **DOUBLE)
        self.bias_O = torch.randn(4, **DOUBLE) if bias else None
        self.outputs = max(0, (frames - kernel) // stride + 1)
        self.dy_BTO = torch.randn(3, self.outputs, 4, **DOUBLE)

    def run(self, dtype: torch.dtype, *, by_torch: bool) -> list[Tensor]:
        """Valid outputs [B, T, O], and the gradients of buffer, weight and bias."""
        x_RI, weight, bias = (
            value if value is None else value.clone().to(dtype).requires_grad_()
            for value in (self.buffer_RI, self.weight_OIk, self.bias_O)
        )
        if by_torch:
            x_BIT = x_RI.unflatten(0, (3, -1))[:, : self.frames].transpose(1, 2)
            y_BTO = F.conv1d(F.gelu(x_BIT) if self.gelu else x_BIT, weight, bias, self.stride).transpose(1, 2)
        else:
            y_RO = strided_conv(x_RI, weight, bias, stride=self.stride, gelu=self.gelu)
            assert y_RO.shape == (3 * self.pitch // self.stride, 4)
            y_BTO = y_RO.unflatten(0, (3, -1))[:, : self.outputs]
        y_BTO.backward(self.dy_BTO.to(dtype))
        return [y_BTO, x_RI.grad, weight.grad, *([] if bias is None else [bias.grad])]


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frames", [7, 8, 12, 31])
@pytest.mark.parametrize(("kernel", "stride"), SHAPES)
def test_strided_conv_is_torchs_for_every_utterance_of_the_buffer(kernel, stride, frames, bias, gelu):
    """What lies behind an utterance has no gradient."""
    case = Strided(kernel, stride, frames, bias=bias, gelu=gelu)
    for found, expected in zip(
        case.run(torch.float64, by_torch=False), case.run(torch.float64, by_torch=True), strict=True
    ):
        close(found, expected)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("kernel", "stride"), SHAPES)
def test_strided_conv_has_the_gradient_of_finite_differences(kernel, stride, gelu):
    case = Strided(kernel, stride, 8, bias=True, gelu=gelu)
    inputs = tuple(value.requires_grad_() for value in (case.buffer_RI, case.weight_OIk, case.bias_O))
    assert torch.autograd.gradcheck(lambda x, w, b: strided_conv(x, w, b, stride=stride, gelu=gelu), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (5, 2)])
def test_strided_conv_rounds_about_as_torchs_does(kernel, stride, dtype):
    """Its products are added up in the type of the result."""
    case = Strided(kernel, stride, 301, bias=True, gelu=True)
    for name in ("buffer_RI", "weight_OIk", "bias_O", "dy_BTO"):
        setattr(case, name, getattr(case, name).to(dtype).double())
    exact = case.run(torch.float64, by_torch=True)
    for found, other, true in zip(case.run(dtype, by_torch=False), case.run(dtype, by_torch=True), exact, strict=True):
        assert found.dtype == dtype
        assert relative_error(found, true) < 1.5 * relative_error(other, true) + 2e-7


# ---- The positional convolution -------------------------------------------------------------------------------------

POSITIONS = [  # kernel, groups, frames
    *[(8, 4, frames) for frames in (1, 3, 4, 8, 9, 10, 18, 50)],
    *[(7, 2, frames) for frames in (2, 6, 16, 33)],
    *[(1, 1, 5), (2, 8, 5), (3, 1, 12), (128, 4, 1), (128, 4, 129), (128, 4, 300)],
]


class Positions:
    """A positional convolution with weights and input; by the toolkit, and by torch's convolution."""

    def __init__(self, kernel: int, groups: int, frames: int, dim: int = 8) -> None:
        torch.manual_seed(0)
        self.module = PositionalConv(dim, kernel, groups).double()
        torch.nn.init.uniform_(self.module.weight_g, 0.5, 2)
        torch.nn.init.normal_(self.module.bias)
        self.x_BTD, self.dy_BTD = torch.randn(2, 2, frames, dim, **DOUBLE)

    def run(self, dtype: torch.dtype, *, by_torch: bool) -> list[Tensor]:
        """The output, and the gradients of input and weights."""
        module, x = self.module.to(dtype), self.x_BTD.clone().to(dtype).requires_grad_()
        module.zero_grad()
        if by_torch:
            kernel, groups = module.kernel, module.groups
            direction = module.weight_v / module.weight_v.norm(dim=(0, 1), keepdim=True)
            y = F.conv1d(
                x.transpose(1, 2), module.weight_g * direction, module.bias, padding=kernel // 2, groups=groups
            )
            y = F.gelu(y[..., : x.shape[1]]).transpose(1, 2)
        else:
            y = module(x)
        y.backward(self.dy_BTD.to(dtype))
        return [y, x.grad, *(parameter.grad.clone() for parameter in module.parameters())]


@pytest.mark.parametrize(("kernel", "groups", "frames"), POSITIONS)
def test_positional_conv_is_torchs_grouped_convolution_with_weight_norm(kernel, groups, frames):
    case = Positions(kernel, groups, frames)
    for found, expected in zip(
        case.run(torch.float64, by_torch=False), case.run(torch.float64, by_torch=True), strict=True
    ):
        close(found, expected)


def test_positional_conv_equals_torchs_weight_norm():
    ours = PositionalConv(8, 6, 2)
    conv = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(8, 8, 6, padding=3, groups=2), dim=2)
    torch.nn.init.uniform_(ours.weight_g, 0.5, 2)
    torch.nn.init.normal_(ours.bias)
    conv.parametrizations.weight.original0.data = ours.weight_g.data
    conv.parametrizations.weight.original1.data = ours.weight_v.data
    conv.bias.data = ours.bias.data
    x = torch.randn(2, 11, 8)
    torch.testing.assert_close(ours(x), F.gelu(conv(x.transpose(1, 2))[..., :-1]).transpose(1, 2))


def test_grouped_conv_shifts_by_the_tap_and_stays_within_the_group():
    """A single tap of 1 from one channel to another moves that channel, with zeros where the sequence ends."""
    kernel, T = 6, 15
    for tap in range(kernel):
        direction = torch.full((4, 2, kernel), 0.0, **DOUBLE)
        direction[3, 0, :] = 1.0  # within the second group from its first channel to its second
        gain = torch.zeros(1, 1, kernel, **DOUBLE)
        gain[0, 0, tap] = 1.0
        x = torch.randn(1, T, 4, **DOUBLE)
        y = grouped_conv(x, normed_spectrum(direction, gain, 2), kernel)
        expected = torch.zeros_like(x)
        for t in range(T):
            if 0 <= t + tap - kernel // 2 < T:
                expected[0, t, 3] = x[0, t + tap - kernel // 2, 2]
        torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 3 * 2**-8)])
def test_positional_conv_rounds_a_few_times_in_its_own_type(dtype, bound):
    """Not compared with torch's own in bfloat16: its grouped convolution gives wrong numbers on some CPUs."""
    case = Positions(128, 4, 400, dim=32)
    case.x_BTD, case.dy_BTD = case.x_BTD.to(dtype).double(), case.dy_BTD.to(dtype).double()
    case.module.to(dtype).double()
    exact = case.run(torch.float64, by_torch=True)
    for found, true in zip(case.run(dtype, by_torch=False), exact, strict=True):
        assert found.dtype == dtype
        assert relative_error(found, true) < bound


def test_a_folded_positional_conv_gives_the_same():
    case = Positions(8, 4, 20)
    expected = case.module(case.x_BTD)
    case.module.fold()
    torch.testing.assert_close(case.module(case.x_BTD), expected)


def test_what_inference_has_computed_serves_training():
    """The tables of the transform are kept from call to call."""
    kernel = 22  # of no other test
    case = Positions(kernel, 2, 9)
    with torch.inference_mode():
        case.module(case.x_BTD)
    case.run(torch.float64, by_torch=False)
