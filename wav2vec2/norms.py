"""The norms: of a frame over channels, and of a channel over the valid frames of an utterance."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Layer norm in the precision of its own weights; the result has the type of the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        y = F.layer_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.to(x.dtype)


class ChannelNorm(nn.Module):
    """Weights of a group norm of one group per channel, which `convolutions.normed_first_conv` computes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = 1e-5

    def forward(self) -> tuple[Tensor, Tensor]:
        """Gain and shift [C]. Sharded weights are gathered when their module is called.

        Views, because hooks are hung on what a module gives, and on a parameter they would pile up.
        """
        return self.weight.view_as(self.weight), self.bias.view_as(self.bias)


def valid_positions(lengths_B: Tensor, size: int) -> Tensor:
    """True [B, size] where a row is not padding."""
    return torch.arange(size, device=lengths_B.device) < lengths_B[:, None]


def at_least_fp32(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def working_dtype(weight: Tensor) -> torch.dtype:
    """What a product with this weight is computed in: autocast's type where it is on, else the weight's own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
