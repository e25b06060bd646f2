"""The convolutions of the model as products of matrices: what `model.py` computes, in the form that is fast.

The extractor's convolutions work on one flat buffer of frames, the utterances of a batch one after the other, `pitch`
places for each; the first block makes it from the waveform. Every function says why it is exact.

Shapes, besides the usual ones: R places of the flat buffer, k taps of a kernel, I and O channels of a convolution that
go in and come out, e = D / G channels of a group, n segments or frames at hand, Q frequencies, W frames of a segment
and f of them that are kept, m weights of a tap.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wav2vec2.norms import valid_positions, working_dtype

# Numbers that the first block has at hand: on a CPU they stay in the cache, on a GPU they fill the device.
TILE = {"cpu": 2**19, "cuda": 2**25}


# ---- The first block ------------------------------------------------------------------------------------------------


def normed_first_conv(
    audio_BS: Tensor,
    weight_C1k: Tensor,
    conv_bias_C: Tensor | None,
    gain_C: Tensor,
    shift_C: Tensor,
    *,
    stride: int,
    lengths_B: Tensor | None,
    eps: float,
    pitch: int,
) -> Tensor:
    """gelu(group norm(convolution)) of a waveform, one group per channel, without the convolution's output.

    [B, S] -> [B, pitch, C], of which those behind the last frame are 0. `lengths_B` are the frames over which a row is
    normalised, None for all of them. Raises ValueError for a waveform that wants a gradient: only weights get one.

    A channel's output is w . x(t) for the window x(t) of k samples, so over the frames of a row its mean is w . m and
    its variance w' S w, with mean m and covariance S of the row's windows: 10 + 100 numbers. The norm is then a
    filter and a shift per row and channel, and the convolution's output, the largest activation of the model, need not
    exist. Statistics are in float64, because the samples of a window are almost equal and w' S w cancels; and a row is
    brought to mean 0, which the norm does not see and which spares the products of float32 digits.
    """
    if audio_BS.requires_grad:
        raise ValueError("the folded first block gives no gradient of the waveform; detach it")
    dtype, result = torch.promote_types(weight_C1k.dtype, torch.float32), working_dtype(weight_C1k)
    with torch.autocast(audio_BS.device.type, enabled=False):
        audio_BS = audio_BS.double()
        audio_BS = audio_BS - audio_BS.mean(1, keepdim=True)
        mean_Bk, covariance_Bkk = _window_statistics(audio_BS, weight_C1k.shape[-1], stride, lengths_B)
        weight_kC = weight_C1k[:, 0].double().t()
        bias_C = conv_bias_C.double() if conv_bias_C is not None else 0.0
        variance_BC = (weight_kC * (covariance_Bkk @ weight_kC)).sum(1)
        scale_BC = gain_C.double() * torch.rsqrt(variance_BC + eps)
        offset_BC = mean_Bk @ weight_kC + bias_C
        shift_BC = shift_C.double() + scale_BC * (bias_C - offset_BC)
        filters_BkC = (weight_kC * scale_BC[:, None]).to(dtype)
        return _GeluOfWindows.apply(audio_BS.to(dtype), filters_BkC, shift_BC.to(dtype), stride, pitch, result)


def _window_statistics(audio_BS: Tensor, kernel: int, stride: int, lengths_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean [B, k] and covariance [B, k, k] of the windows of every row."""
    windows_BTk = audio_BS.unfold(1, kernel, stride)
    count_B11 = torch.full((1, 1, 1), windows_BTk.shape[1], device=audio_BS.device)
    if lengths_B is not None:
        windows_BTk = windows_BTk * valid_positions(lengths_B, windows_BTk.shape[1])[..., None]
        count_B11 = lengths_B[:, None, None]
    mean_B1k = windows_BTk.sum(1, keepdim=True) / count_B11
    squares_Bkk = windows_BTk.transpose(1, 2) @ windows_BTk / count_B11
    return mean_B1k[:, 0], squares_Bkk - mean_B1k.transpose(1, 2) @ mean_B1k


class _GeluOfWindows(torch.autograd.Function):
    """gelu(windows @ filters + shift) of every row, tile by tile, so that only the result goes through memory.

    The waveform is kept for backward, and what is inside the GELU is computed again: that is 10 products a number.
    """

    @staticmethod
    def forward(
        ctx: Any, audio_BS: Tensor, filters_BkC: Tensor, shift_BC: Tensor, stride: int, pitch: int, dtype: torch.dtype
    ) -> Tensor:
        """[B, S] -> [B, pitch, C] in `dtype`."""
        ctx.save_for_backward(audio_BS, filters_BkC, shift_BC)
        ctx.stride = stride
        windows_BTk = audio_BS.unfold(1, filters_BkC.shape[1], stride)
        B, T, _ = windows_BTk.shape
        out_BRC = torch.empty(B, pitch, filters_BkC.shape[-1], dtype=dtype, device=audio_BS.device)
        out_BRC[:, T:] = 0
        for row, tile in _tiles(out_BRC, T):
            inside_nC = torch.addmm(shift_BC[row], windows_BTk[row, tile], filters_BkC[row])
            if dtype == inside_nC.dtype:
                torch.ops.aten.gelu.out(inside_nC, out=out_BRC[row, tile])
            else:
                out_BRC[row, tile] = F.gelu(inside_nC)
        return out_BRC

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of filters and shift; the waveform needs none."""
        audio_BS, filters_BkC, shift_BC = ctx.saved_tensors
        windows_BTk = audio_BS.unfold(1, filters_BkC.shape[1], ctx.stride)
        d_filters, d_shift = torch.zeros_like(filters_BkC), torch.zeros_like(shift_BC)
        for row, tile in _tiles(gradients[0], windows_BTk.shape[1]):
            window_nk = windows_BTk[row, tile].contiguous()
            inside_nC = torch.addmm(shift_BC[row], window_nk, filters_BkC[row])
            d_inside_nC = torch.ops.aten.gelu_backward(gradients[0][row, tile].to(inside_nC.dtype), inside_nC)
            d_filters[row].addmm_(window_nk.t(), d_inside_nC)
            d_shift[row] += d_inside_nC.sum(0)
        return None, d_filters, d_shift, None, None, None


def _tiles(buffer_BRC: Tensor, frames: int) -> Iterator[tuple[int, slice]]:
    """A row and some of its frames, in turn."""
    size = max(1, TILE[buffer_BRC.device.type] // buffer_BRC.shape[-1])
    for row in range(buffer_BRC.shape[0]):
        for first in range(0, frames, size):
            yield row, slice(first, min(first + size, frames))


# ---- The other blocks -----------------------------------------------------------------------------------------------


def row_pitch(frames: int, strides: list[int]) -> int:
    """Places of the flat buffer for an utterance: frames of the first block, rounded up to what all strides divide."""
    multiple = math.prod(strides)
    return -(-frames // multiple) * multiple


def flat_windows(audio_BS: Tensor, kernel: int, stride: int, pitch: int) -> Tensor:
    """Windows of k samples of all waveforms in one buffer [B x pitch, k], zeros behind the last of each."""
    windows_BTk = audio_BS.unfold(1, kernel, stride)
    return F.pad(windows_BTk, (0, 0, 0, pitch - windows_BTk.shape[1])).flatten(0, 1)


def strided_conv(x_RI: Tensor, weight_OIk: Tensor, bias_O: Tensor | None, *, stride: int, gelu: bool) -> Tensor:
    """A strided convolution of gelu(x) (or of x) over one flat buffer: [R, I] -> [R / stride, O].

    `stride` frames side by side are one row of a matrix that needs no copy: [R / stride, stride x I]. Its product with
    the first `stride` taps, plus that of the rows one further down with the next ones, and so on, is the convolution.
    At the end of an utterance it runs into the next one. These frames are behind the last valid one, no valid frame of
    a later block reads them, and their gradient is 0. In half precision every product is rounded before the next one is
    added, where a convolution would round the sum.
    """
    dtype = working_dtype(weight_OIk)
    bias = None if bias_O is None else bias_O.to(dtype)
    return _StridedConv.apply(x_RI.to(dtype), weight_OIk.to(dtype), bias, stride, gelu)


class _StridedConv(torch.autograd.Function):
    """Keeps x, and computes its GELU again in backward."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_OIk: Tensor, bias_O: Tensor | None, stride: int, gelu: bool) -> Tensor:
        """The products of `strided_conv`, each added to the result in place."""
        ctx.save_for_backward(x_RI, weight_OIk)
        ctx.stride, ctx.gelu, ctx.has_bias = stride, gelu, bias_O is not None
        taps_kIO = weight_OIk.permute(2, 1, 0).contiguous()
        h_RI = F.gelu(x_RI) if gelu else x_RI
        (rows, taps), *further = _products(h_RI, taps_kIO, stride)
        y_RO = rows @ taps if bias_O is None else torch.addmm(bias_O, rows, taps)
        for rows, taps in further:
            y_RO[: len(rows)].addmm_(rows, taps)
        return y_RO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x_RI, weight_OIk = ctx.saved_tensors
        taps_kIO = weight_OIk.permute(2, 1, 0).contiguous()
        h_RI = F.gelu(x_RI) if ctx.gelu else x_RI
        dy_RO = gradients[0]
        d_taps_kIO = torch.empty_like(taps_kIO)
        for (rows, _), (_, d_taps) in zip(
            _products(h_RI, taps_kIO, ctx.stride), _products(h_RI, d_taps_kIO, ctx.stride), strict=True
        ):
            d_taps.addmm_(rows.t(), dy_RO[: len(rows)], beta=0)
        d_weight, d_bias = d_taps_kIO.permute(2, 1, 0), dy_RO.sum(0) if ctx.has_bias else None
        if not ctx.needs_input_grad[0]:
            return None, d_weight, d_bias, None, None
        del h_RI
        dh_RI = torch.zeros_like(x_RI) if len(taps_kIO) < ctx.stride else torch.empty_like(x_RI)
        for index, (d_rows, taps) in enumerate(_products(dh_RI, taps_kIO, ctx.stride)):
            d_rows.addmm_(dy_RO[: len(d_rows)], taps.t(), beta=min(index, 1))  # the first one finds nothing there
        dx_RI = torch.ops.aten.gelu_backward.grad_input(dh_RI, x_RI, grad_input=dh_RI) if ctx.gelu else dh_RI
        return dx_RI, d_weight, d_bias, None, None


def _products(h_RI: Tensor, taps_kIO: Tensor, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the factors of every product: rows [n, j x I] of j frames side by side, and taps [j x I, O] for them."""
    grouped = h_RI.view(len(h_RI) // stride, -1)
    for first in range(0, len(taps_kIO), stride):
        taps = taps_kIO[first : first + stride].flatten(0, 1)
        yield grouped[first // stride :, : len(taps)], taps


# ---- The positional convolution -------------------------------------------------------------------------------------


class PositionalConv(nn.Module):
    """Relative positions by a grouped convolution over time, weight-normed per kernel tap, then GELU."""

    def __init__(self, dim: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.groups = groups
        self.weight_v = nn.Parameter(torch.randn(dim, dim // groups, kernel) * math.sqrt(4 / (kernel * dim)))
        self.weight_g = nn.Parameter(self.weight_v.detach().norm(dim=(0, 1), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.folded: Spectrum | None = None

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D], in the precision of the weights: half would cost the transforms digits."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            x = grouped_conv(x_BTD.to(self.bias.dtype), self.folded or self.spectrum(), self.kernel)
            return F.gelu(x + self.bias).to(x_BTD.dtype)

    def train(self, mode: bool = True) -> PositionalConv:
        """The usual; in training the weights change."""
        if mode:
            self.folded = None
        return super().train(mode)

    def spectrum(self) -> Spectrum:
        """What the convolution multiplies with."""
        return normed_spectrum(self.weight_v, self.weight_g, self.groups)

    def fold(self) -> None:
        """Compute the spectrum once and for all; from now on the weights must not change or move."""
        self.folded = self.spectrum()


class Spectrum(NamedTuple):
    """The weight [D, D / G, k] of a grouped convolution at Q = k + 1 frequencies: real and imaginary part.

    Both are [Q x G, D / G, D / G]: from the channels of a group to those that come out.
    """

    real: Tensor
    imaginary: Tensor


def normed_spectrum(direction_Dek: Tensor, gain_11k: Tensor, groups: int) -> Spectrum:
    """The spectrum of a weight given by its weight norm: every tap is its gain times its direction, made unit length.

    The factors of the taps go into the small matrix of the transform rather than into the weight.
    """
    D, width, kernel = direction_Dek.shape
    forward_2QW, _ = _fourier(kernel, direction_Dek.dtype, direction_Dek.device)
    taps_km = direction_Dek.view(groups, width, width, kernel).permute(3, 0, 2, 1).reshape(kernel, D * width)
    factor_k = gain_11k.flatten() / taps_km.norm(dim=1)
    real, imaginary = ((forward_2QW[:, :kernel] * factor_k) @ taps_km).view(2, -1, width, width)
    return Spectrum(real, imaginary)


def grouped_conv(x_BTD: Tensor, spectrum: Spectrum, kernel: int) -> Tensor:
    """A grouped convolution over time with kernel // 2 zeros in front: [B, T, D] -> [B, T, D].

    Overlap-save: segments of W = 2k frames, each k - 1 frames into the next, go to Q = k + 1 frequencies, where the
    convolution is a product of channels, and come back; the f = k + 1 results that did not wrap around are kept. That
    is exact, and a sixth of the work for k = 128. The transforms are products with cosines and sines: at this size they
    cost little, need no complex numbers, and matrix units can make them.
    """
    B, T, D = x_BTD.shape
    forward_2QW, inverse_f2Q = _fourier(kernel, x_BTD.dtype, x_BTD.device)
    step, size = inverse_f2Q.shape[0], forward_2QW.shape[1]
    segments = -(-T // step)
    padded = F.pad(x_BTD, (0, 0, kernel // 2, (segments + 1) * step - T - kernel // 2))
    blocks = padded.view(B, segments + 1, step, D)
    segments_nWD = torch.cat([blocks[:, :-1], blocks[:, 1:, : size - step]], 2).flatten(0, 1)
    width = spectrum.real.shape[-1]
    # [n, 2, Q x G, width], with X = real - i imaginary
    real, imaginary = (forward_2QW @ segments_nWD).view(len(segments_nWD), 2, -1, width).unbind(1)
    real, imaginary = real.transpose(0, 1), imaginary.transpose(0, 1)
    out_real = torch.baddbmm(torch.bmm(real, spectrum.real), imaginary, spectrum.imaginary)
    out_imaginary = torch.baddbmm(torch.bmm(real, spectrum.imaginary), imaginary, spectrum.real, alpha=-1)
    out_n2QD = torch.stack([out_real, out_imaginary]).permute(2, 0, 1, 3).reshape(len(segments_nWD), -1, D)
    return (inverse_f2Q @ out_n2QD).view(B, segments * step, D)[:, :T]


@lru_cache
def _fourier(kernel: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [2Q, W] that take a segment to its frequencies, and those [f, 2Q] that bring f of it back."""
    with torch.inference_mode(False):  # training may use them after inference
        return _fourier_matrices(kernel, dtype, device)


def _fourier_matrices(kernel: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    size = 2 * kernel
    frequency_Q = torch.arange(kernel + 1, dtype=torch.float64)
    angle_QW = 2 * math.pi / size * frequency_Q[:, None] * torch.arange(size)
    forward = torch.cat([angle_QW.cos(), angle_QW.sin()])
    share_Q = torch.full((kernel + 1,), 2 / size, dtype=torch.float64)  # the negative frequencies are conjugates,
    share_Q[0] = share_Q[-1] = 1 / size  # and these two have none
    inverse = torch.cat([share_Q[:, None] * angle_QW.cos(), -share_Q[:, None] * angle_QW.sin()]).t()[: kernel + 1]
    return forward.to(device, dtype), inverse.to(device, dtype).contiguous()
