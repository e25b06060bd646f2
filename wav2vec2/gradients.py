"""Operations with a backward pass of their own."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wav2vec2.dropout import Dropout
from wav2vec2.norms import working_dtype


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
    """x, with every parameter of the module in its graph, at gradient 0: plain DDP waits for all of them."""
    zero = sum(parameter.flatten()[0] * 0 for parameter in module.parameters() if parameter.requires_grad)
    return x + zero.to(x.dtype) if isinstance(zero, Tensor) else x


class GeluLinear(nn.Linear):
    """GELU, dropout, and a linear layer."""

    def __init__(self, inputs: int, outputs: int, *, dropout: float) -> None:
        super().__init__(inputs, outputs)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        if self.training and self.dropout.p:
            return F.linear(self.dropout(F.gelu(x)), self.weight, self.bias)
        dtype = working_dtype(self.weight)
        return _GeluLinear.apply(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class _GeluLinear(torch.autograd.Function):
    """Keeps x alone: what the GELU gives, the widest tensor of a transformer layer, is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
        """The linear layer of gelu(x)."""
        ctx.save_for_backward(x, weight_OI)
        return F.linear(F.gelu(x), weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Gradients of x, weight and bias."""
        x, weight_OI = ctx.saved_tensors
        dy_RO = gradients[0].flatten(0, -2)
        dx = gradients[0] @ weight_OI
        torch.ops.aten.gelu_backward.grad_input(dx, x, grad_input=dx)
        return dx, dy_RO.t() @ F.gelu(x).flatten(0, -2), dy_RO.sum(0)
