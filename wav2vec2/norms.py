"""The norms: of a frame over channels, and of a channel over the valid frames of an utterance."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Layer norm in the precision of its own weights; the result has the type of the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        y = F.layer_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.to(x.dtype)


class ChannelNorm(nn.GroupNorm):
    """Group norm with one group per channel, over the valid frames of each utterance only.

    With `lengths_B` a row never sees its padding, so that its result does not depend on what it is batched with.
    """

    def forward(self, x_BCT: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Normalise every channel over time; `lengths_B` are valid frames per row, None when all are."""
        if lengths_B is None:
            x = x_BCT.to(self.weight.dtype)
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps).to(x_BCT.dtype)
        return _MaskedNorm.apply(x_BCT, lengths_B, self.weight, self.bias, self.eps)


class _MaskedNorm(torch.autograd.Function):
    """The masked form, in fp32 inside: sums over seconds of audio overflow float16.

    y = w (x - m) r + b with mean m and reciprocal deviation r of the n valid frames. With g = w dy and h = (x - m) r:
    dx = r (g - valid (sum g + h sum(g h)) / n), dw = sum(h dy), db = sum dy. Written out because autograd would keep
    three tensors of the size of x, the largest activation of the model; this keeps x.
    """

    @staticmethod
    def forward(ctx: Any, x_BCT: Tensor, lengths_B: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
        """Normalise all frames by the statistics of the valid ones."""
        x = at_least_fp32(x_BCT)
        valid_B1T = valid_positions(lengths_B, x.shape[-1])[:, None]
        count_B11 = lengths_B[:, None, None]
        mean_BC1 = (x * valid_B1T).sum(-1, keepdim=True) / count_B11
        variance_BC1 = ((x - mean_BC1).square() * valid_B1T).sum(-1, keepdim=True) / count_B11
        scale_BC1 = torch.rsqrt(variance_BC1 + eps)
        ctx.save_for_backward(x_BCT, lengths_B, weight_C, mean_BC1, scale_BC1)
        y = (x - mean_BC1) * (scale_BC1 * weight_C[:, None]) + bias_C[:, None]
        return y.to(x_BCT.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The formulas of the class."""
        x_BCT, lengths_B, weight_C, mean_BC1, scale_BC1 = ctx.saved_tensors
        dy = at_least_fp32(gradients[0])
        h = (at_least_fp32(x_BCT) - mean_BC1) * scale_BC1
        g = dy * weight_C[:, None]
        valid_B1T = valid_positions(lengths_B, x_BCT.shape[-1])[:, None]
        through = (g.sum(-1, keepdim=True) + h * (g * h).sum(-1, keepdim=True)) / lengths_B[:, None, None]
        dx = scale_BC1 * (g - valid_B1T * through)
        dw, db = (dy * h).sum((0, 2)), dy.sum((0, 2))
        return dx.to(x_BCT.dtype), None, dw.to(weight_C.dtype), db.to(weight_C.dtype), None


def valid_positions(lengths_B: Tensor, size: int) -> Tensor:
    """True [B, size] where a row is not padding."""
    return torch.arange(size, device=lengths_B.device) < lengths_B[:, None]


def at_least_fp32(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()
