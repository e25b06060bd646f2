"""Dropout, with masks that a CPU draws quickly."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 2**16


class Dropout(nn.Module):
    """Dropout; on a CPU its masks come from `keep_mask`, except in compiled code, which draws its own."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Zero entries of x with probability p, and scale the others so that the mean stays."""
        if not self.training or self.p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p, self.training)
        mask, scale = keep_mask(x.shape, self.p)
        return (x * mask).mul_(scale)


def keep_mask(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """What dropout with 0 <= p <= 1 keeps, True or False, and the factor for it. Drawn by torch's generator of the CPU.

    A 64-bit draw serves four entries with 16 bits each, which takes a quarter of the time of torch's own masks. So p is
    rounded to a multiple of 2^-16, and the factor is that of the rounded p.
    """
    dropped = round(p * _LEVELS)
    draws = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    if dropped == _LEVELS:
        return torch.zeros(shape, dtype=torch.bool), 0.0
    return draws[: shape.numel()].view(shape) >= dropped - _LEVELS // 2, _LEVELS / (_LEVELS - dropped)
