"""Self-attention."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wav2vec2.dropout import keep_mask
from wav2vec2.norms import at_least_fp32

SIMILARITIES_AT_HAND = 2**20  # so that they stay in the cache of a CPU
ROWS_OF_A_RUN = {"cpu": 1, "cuda": 4}  # with fewer, a GPU is not filled; there, this number is not measured

Runs = tuple[tuple[int, int], ...]  # rows and valid frames of neighbours of one length


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, heads: int, *, dropout: float = 0.0, fp32_softmax: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.fp32_softmax = fp32_softmax
        self.qkv_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor, keys: Tensor | Runs | None = None, wanted_R: Tensor | None = None) -> Tensor:
        """Attend to the frames that `keys` names, see `keys_of`.

        Returns [B, T, D], or [R, D] of the wanted frames (b x T + t); what stands at padding has no meaning.
        """
        qkv_BTX = self.qkv_proj(x_BTD)
        y = self._by_runs(qkv_BTX, keys) if isinstance(keys, tuple) else self._attend(qkv_BTX, keys)
        return self.out_proj(y if wanted_R is None else y.flatten(0, 1).index_select(0, wanted_R))

    def _by_runs(self, qkv_BTX: Tensor, runs: Runs) -> Tensor:
        """Every run of rows by itself and without its padding: [B, T, D], 0 at padding.

        Exact, because a key that is masked has the weight 0; without a mask the kernels for whole sequences serve.
        """
        T = qkv_BTX.shape[1]
        parts = zip(runs, qkv_BTX.split([rows for rows, _ in runs]), strict=True)
        return torch.cat([F.pad(self._attend(part[:, :t]), (0, 0, 0, T - t)) for (_, t), part in parts])

    def _attend(self, qkv_BTX: Tensor, keys_B11T: Tensor | None = None) -> Tensor:
        """Queries, keys and values [B, T, 3 D] -> [B, T, D]."""
        q_BHTd, k_BHTd, v_BHTd = qkv_BTX.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dtype = qkv_BTX.dtype
        if self.fp32_softmax:
            q_BHTd, k_BHTd, v_BHTd = q_BHTd.float(), k_BHTd.float(), v_BHTd.float()
        dropout = self.dropout if self.training else 0.0
        with torch.autocast(qkv_BTX.device.type, enabled=False):  # it would round what is to stay in fp32
            if dropout and qkv_BTX.device.type == "cpu" and not torch.compiler.is_compiling():
                y_BHTd = _DropoutAttention.apply(q_BHTd, k_BHTd, v_BHTd, keys_B11T, dropout)
            else:
                y_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, attn_mask=keys_B11T, dropout_p=dropout)
        return y_BHTd.to(dtype).transpose(1, 2).flatten(2)


def keys_of(valid_BT: Tensor | None, lengths: Sequence[int] | None) -> Tensor | Runs | None:
    """The frames that can be attended to: None for all, runs where the host knows the lengths, or a mask [B, 1, 1, T].

    Joined sub-batches are runs of rows of one length. Where runs are so short that they do not pay, it is the mask.
    """
    if valid_BT is None:
        return None
    if lengths is not None:
        runs = tuple((len(list(rows)), length) for length, rows in groupby(lengths))
        if len(lengths) >= ROWS_OF_A_RUN[valid_BT.device.type] * len(runs):
            return runs
    return valid_BT[:, None, None]


class _DropoutAttention(torch.autograd.Function):
    """Attention with dropout on a CPU, for which torch has no kernel: softmax(q k' / sqrt(d)) times mask, times v.

    A few heads at a time, and for backward only the dropped places are kept: probabilities are computed again. They
    and their gradient are in float32 or better, as in torch's kernels. Every row must have a key that is True.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BHTd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor, keys_B11T: Tensor | None, dropout: float
    ) -> Tensor:
        """[B, H, T, d] -> [B, H, T, d]."""
        B, H, T, _ = q_BHTd.shape
        kept_BHTT, ctx.scale = keep_mask(torch.Size((B, H, T, T)), dropout)
        ctx.save_for_backward(q_BHTd, k_BHTd, v_BHTd, keys_B11T, kept_BHTT)
        y_BHTd = q_BHTd.new_empty(B, T, H, q_BHTd.shape[-1]).transpose(1, 2)  # as the output projection reads it
        for row, heads in _tiles(B, H, T):
            p_hTT = _probabilities(
                q_BHTd[row, heads], k_BHTd[row, heads], None if keys_B11T is None else keys_B11T[row]
            )
            p_hTT = p_hTT.mul_(kept_BHTT[row, heads]).to(v_BHTd.dtype)
            y_BHTd[row, heads] = (p_hTT @ v_BHTd[row, heads]).mul_(ctx.scale)
        return y_BHTd

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of queries, keys and values."""
        q_BHTd, k_BHTd, v_BHTd, keys_B11T, kept_BHTT = ctx.saved_tensors
        B, H, T, d = q_BHTd.shape
        dq_BHTd, dk_BHTd, dv_BHTd = q_BHTd.new_empty(B, T, 3, H, d).permute(2, 0, 3, 1, 4)
        for row, heads in _tiles(B, H, T):
            q, k, v = q_BHTd[row, heads], k_BHTd[row, heads], v_BHTd[row, heads]
            dy = gradients[0][row, heads] * ctx.scale
            p_hTT = _probabilities(q, k, None if keys_B11T is None else keys_B11T[row])
            kept = kept_BHTT[row, heads].to(p_hTT.dtype)
            dp_hTT = (at_least_fp32(dy) @ at_least_fp32(v).transpose(1, 2)).mul_(kept)
            dv_BHTd[row, heads] = kept.mul_(p_hTT).to(q.dtype).transpose(1, 2) @ dy
            ds_hTT = torch._softmax_backward_data(dp_hTT, p_hTT, -1, p_hTT.dtype).to(q.dtype)
            dq_BHTd[row, heads] = (ds_hTT @ k).div_(math.sqrt(d))
            dk_BHTd[row, heads] = (ds_hTT.transpose(1, 2) @ q).div_(math.sqrt(d))
        return dq_BHTd, dk_BHTd, dv_BHTd, None, None


def _probabilities(q_hTd: Tensor, k_hTd: Tensor, keys_11T: Tensor | None) -> Tensor:
    """What every frame of some heads attends to: [h, T, T]."""
    q_hTd, k_hTd = at_least_fp32(q_hTd), at_least_fp32(k_hTd)
    similarity_hTT = (q_hTd / math.sqrt(q_hTd.shape[-1])) @ k_hTd.transpose(1, 2)
    if keys_11T is not None:
        similarity_hTT.masked_fill_(~keys_11T, -torch.inf)
    return torch.softmax(similarity_hTT, -1)


def _tiles(rows: int, heads: int, frames: int) -> Iterator[tuple[int, slice]]:
    """A row and some of its heads, in turn."""
    size = max(1, SIMILARITIES_AT_HAND // frames**2)
    for row in range(rows):
        for first in range(0, heads, size):
            yield row, slice(first, first + size)
