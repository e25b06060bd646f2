"""Operations with a backward pass of their own."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from common.sharding import is_sharded


class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        """Return x."""
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Scale the gradient."""
        return gradients[0] * ctx.factor, None


def touch(x: Tensor, module: nn.Module) -> Tensor:
    """x, with every parameter of the module in its graph, at gradient 0: plain DDP waits for all of them.

    Nobody waits for those that are in shards.
    """
    waited_for = [p for p in module.parameters() if p.requires_grad and not is_sharded(p)]
    zero = sum(parameter.flatten()[0] * 0 for parameter in waited_for)
    return x + zero.to(x.dtype) if isinstance(zero, Tensor) else x
