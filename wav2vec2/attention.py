"""Self-attention."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, heads: int, *, dropout: float = 0.0, fp32_softmax: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.fp32_softmax = fp32_softmax
        self.qkv_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor, keys_B11T: Tensor | None = None) -> Tensor:
        """Attend to the frames whose key is True (all of them when `keys_B11T` is None). Returns [B, T, D]."""
        B, T, D = x_BTD.shape
        q_BHTd, k_BHTd, v_BHTd = self.qkv_proj(x_BTD).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        dtype = x_BTD.dtype
        if self.fp32_softmax:
            q_BHTd, k_BHTd, v_BHTd = q_BHTd.float(), k_BHTd.float(), v_BHTd.float()
        y_BHTd = F.scaled_dot_product_attention(
            q_BHTd, k_BHTd, v_BHTd, attn_mask=keys_B11T, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out_proj(y_BHTd.to(dtype).transpose(1, 2).reshape(B, T, D))
