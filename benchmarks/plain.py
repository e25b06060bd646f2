"""The plain forms of what the toolkit computes in a faster way: the same numbers, as a textbook writes them.

`--plain NAME` of benchmarks/step.py puts a form in place of the toolkit's own within one process, and measures that as
one more side. Nothing of this is in the toolkit; that it gives the same numbers is tested.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.our_step import OurStep, our_program
from benchmarks.workload import Workload
from common.errors import ConfigError
from common.optim import Adam
from wav2vec2.convolutions import PositionalConv
from wav2vec2.criterion import Negatives
from wav2vec2.dropout import Dropout
from wav2vec2.model import ConvBlock, FeatureExtractor, GumbelQuantizer, TransformerEncoder, num_frames
from wav2vec2.norms import ChannelNorm, at_least_fp32, valid_positions

# ---- The contrastive task and the quantizer -------------------------------------------------------------------------


def contrastive_logits(
    predictions_bMF: Tensor,
    targets_bMF: Tensor,
    ids_bM: Tensor,
    candidates_bPF: Tensor,
    candidate_ids_bP: Tensor,
    negatives: Negatives,
    temperature: float,
    codebook: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Equation 3 for the positive and N negatives of every masked frame, with all their vectors [b, M, 1 + N, F]."""
    places_bMN = negatives.frames_bMN
    if not negatives.across_rows:
        rows, per_row, _ = candidates_bPF.shape
        places_bMN = places_bMN + per_row * torch.arange(rows, device=places_bMN.device)[:, None, None]
    vectors, ids = [candidates_bPF.flatten(0, 1)[places_bMN]], [candidate_ids_bP.flatten()[places_bMN]]
    if codebook is not None:
        vectors.append(codebook[0])
        ids.append(codebook[1])
    vectors_bMNF = torch.cat([targets_bMF[:, :, None], *vectors], 2)
    similarity_bMN = F.cosine_similarity(predictions_bMF[:, :, None], vectors_bMNF, dim=-1, eps=1e-8)
    is_positive_bMN = F.pad(torch.cat(ids, 2) == ids_bM[..., None], (1, 0))
    return at_least_fp32(similarity_bMN.masked_fill(is_positive_bMN, -torch.inf)) / temperature


def look_up(self: GumbelQuantizer, choice_RGV: Tensor) -> Tensor:
    """The vectors of a choice: all codes, each times its share in the choice, [R, G, V, d], and summed over V."""
    book_GVd = self.vars.view(self.groups, self.codes, -1)
    return (choice_RGV[..., None] * book_GVd).sum(2).flatten(1)


# ---- The convolutions -----------------------------------------------------------------------------------------------


def conv_block(block: ConvBlock, x_BIT: Tensor, lengths_B: Tensor | None = None) -> Tensor:
    """Convolution, norm, GELU over a sequence, channels first; a channel is normalised over `lengths_B` frames."""
    conv, norm = block.conv, block.norm
    x_BCT = F.conv1d(x_BIT.to(conv.weight.dtype), conv.weight, conv.bias, conv.stride)
    if isinstance(norm, ChannelNorm):
        x = x_BCT.to(norm.weight.dtype)
        x_BCT = masked_group_norm(x, lengths_B, norm).to(x_BCT.dtype)
    elif norm is not None:
        x_BCT = norm(x_BCT.transpose(1, 2)).transpose(1, 2)
    return F.gelu(x_BCT)


def masked_group_norm(x_BCT: Tensor, lengths_B: Tensor | None, norm: ChannelNorm) -> Tensor:
    """Group norm of one group per channel over the first frames of every row, None for all."""
    if lengths_B is None:
        return F.group_norm(x_BCT, len(norm.weight), norm.weight, norm.bias, norm.eps)
    valid_B1T, count_B11 = valid_positions(lengths_B, x_BCT.shape[-1])[:, None], lengths_B[:, None, None]
    mean_BC1 = (x_BCT * valid_B1T).sum(-1, keepdim=True) / count_B11
    variance_BC1 = ((x_BCT - mean_BC1).square() * valid_B1T).sum(-1, keepdim=True) / count_B11
    return (x_BCT - mean_BC1) / torch.sqrt(variance_BC1 + norm.eps) * norm.weight[:, None] + norm.bias[:, None]


def first_block(self: ConvBlock, audio_BS: Tensor, lengths_B: Tensor | None, pitch: int) -> tuple[Tensor, bool]:
    """The first block as `conv_block`; its output is then copied to the flat buffer [B x pitch, C] of the others."""
    x_BTC = conv_block(self, audio_BS[:, None], lengths_B).transpose(1, 2)
    return F.pad(x_BTC, (0, 0, 0, pitch - x_BTC.shape[1])).flatten(0, 1), False


def conv_stack(self: FeatureExtractor, audio_BS: Tensor, lengths_B: Tensor | None = None) -> Tensor:
    """The other blocks as `conv_block`, after the toolkit's first."""
    first, *others = _blocks(self)
    first_lengths_B = None if lengths_B is None else num_frames(lengths_B, self.conv_layers[:1])
    x_RC, gelu = first.forward_audio(audio_BS, first_lengths_B, num_frames(audio_BS.shape[1], self.conv_layers[:1]))
    x_BCT = (F.gelu(x_RC) if gelu else x_RC).unflatten(0, (len(audio_BS), -1)).transpose(1, 2)
    for block in others:
        x_BCT = conv_block(block, x_BCT)
    return x_BCT.transpose(1, 2)


def extractor(self: FeatureExtractor, audio_BS: Tensor, lengths_B: Tensor | None = None) -> Tensor:
    """All blocks as `conv_block`: what `first_block` and `conv_stack` together are, without copies in between."""
    first, *others = _blocks(self)
    first_lengths_B = None if lengths_B is None else num_frames(lengths_B, self.conv_layers[:1])
    x_BCT = conv_block(first, audio_BS[:, None], first_lengths_B)
    for block in others:
        x_BCT = conv_block(block, x_BCT)
    return x_BCT.transpose(1, 2)


def _blocks(extractor: FeatureExtractor) -> list[ConvBlock]:
    return cast(list[ConvBlock], list(extractor.blocks))


def positional_conv(self: PositionalConv, x_BTD: Tensor) -> Tensor:
    """A grouped convolution with a weight-normed kernel, and GELU."""
    weight_Dek = self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))
    x_BDT = x_BTD.to(self.bias.dtype).transpose(1, 2)
    y_BDT = F.conv1d(x_BDT, weight_Dek, self.bias, padding=self.kernel // 2, groups=self.groups)
    return F.gelu(y_BDT[..., : x_BTD.shape[1]]).transpose(1, 2).to(x_BTD.dtype)


# ---- The transformer ------------------------------------------------------------------------------------------------


def attention(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor, keys_B11T: Tensor | None, dropout: float) -> Tensor:
    """torch's own attention with its own dropout."""
    return F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, attn_mask=keys_B11T, dropout_p=dropout)


def dropout(self: Dropout, x: Tensor) -> Tensor:
    """torch's own dropout."""
    return F.dropout(x, self.p, self.training)


def keep_mask(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """torch's own draw of what dropout keeps, and the factor for it."""
    return torch.empty(shape, dtype=torch.bool).bernoulli_(1 - p), 1 / (1 - p) if p < 1 else 0.0


_some_frames = TransformerEncoder.forward


def last_layer(
    self: TransformerEncoder,
    x_BTD: Tensor,
    lengths_B: Tensor | None = None,
    *,
    frame_lengths: Sequence[int] | None = None,
    layer: int | None = None,
    wanted_R: Tensor | None = None,
) -> Tensor:
    """All frames through all layers; only then are those taken that are wanted."""
    x_BTD = _some_frames(self, x_BTD, lengths_B, frame_lengths=frame_lengths, layer=layer)
    return x_BTD if wanted_R is None else x_BTD.flatten(0, 1).index_select(0, wanted_R)


# ---- The optimizer, and the memory of the process -------------------------------------------------------------------


@torch.no_grad()
def adam_step(self: Adam, lr: float, gradients: Mapping[str, Sequence[Tensor]], divisor: Tensor | None = None) -> None:
    """The formula of `Adam`, parameter by parameter; first its gradient is unscaled and clipped."""
    beta1, beta2 = self._betas
    for key, of_group in gradients.items():
        group = self._groups[key]
        group.updates += 1
        rate = lr * math.sqrt(1 - beta2**group.updates) / (1 - beta1**group.updates)
        for parameter, gradient, exp_avg, exp_avg_sq in zip(
            group.parameters, of_group, group.exp_avgs, group.exp_avg_sqs, strict=True
        ):
            if divisor is not None:
                gradient.div_(divisor)
            exp_avg.mul_(beta1).add_(gradient, alpha=1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            parameter.mul_(1 - lr * self._weight_decay)
            parameter.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(self._eps), value=-rate)


def norm_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """In place of torch._foreach_norm."""
    return [torch.linalg.vector_norm(tensor) for tensor in tensors]


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """In place of torch._foreach_copy_."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def leave_allocator() -> None:
    """In place of keep_freed_memory: glibc's defaults."""


# ---- Putting them in place ------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {  # name -> what it stands in for
    "contrastive": {"wav2vec2.criterion.contrastive_logits": contrastive_logits},
    "quantizer": {"wav2vec2.model.GumbelQuantizer._look_up": look_up},
    "first_block": {"wav2vec2.model.ConvBlock.forward_audio": first_block},
    "conv_stack": {"wav2vec2.model.FeatureExtractor.forward": conv_stack},
    "positional_conv": {"wav2vec2.convolutions.PositionalConv.forward": positional_conv},
    "attention": {"wav2vec2.attention._DropoutAttention.apply": attention},
    "dropout": {"wav2vec2.dropout.Dropout.forward": dropout, "wav2vec2.attention.keep_mask": keep_mask},
    "last_layer": {"wav2vec2.model.TransformerEncoder.forward": last_layer},
    "optimizer": {
        "common.optim.Adam.step": adam_step,
        "torch._foreach_norm": norm_each,
        "torch._foreach_copy_": copy_each,
    },
    "allocator": {"common.distributed.keep_freed_memory": leave_allocator},
}
TOGETHER = {("first_block", "conv_stack"): {"wav2vec2.model.FeatureExtractor.forward": extractor}}
CPU_ONLY = ("attention", "dropout", "allocator")  # on a GPU the toolkit's own form is this one
ALL = "all"
VARIANTS = (*FORMS, ALL)


def check_plain(names: Sequence[str], device: str) -> None:
    """Raise ConfigError for a name of --plain that stands there twice, or has no effect on the device."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--plain {name}: named twice; remove one")
        if device == "cuda" and name in CPU_ONLY:
            raise ConfigError(f"--plain {name}: has no effect with --device cuda; remove it")


@contextmanager
def plain_forms(names: Collection[str], device: str) -> Iterator[None]:
    """While this lasts, the forms of these names are in place; ALL is all that have an effect on the device."""
    if ALL in names:
        names = [name for name in FORMS if device == "cpu" or name not in CPU_ONLY]
    targets = {target: form for name in names for target, form in FORMS[name].items()}
    for group, forms in TOGETHER.items():
        if set(group) <= set(names):
            targets |= forms
    with ExitStack() as stack:
        for target, form in targets.items():
            stack.enter_context(patch(target, form))
        yield


@contextmanager
def plain_program(workload: Workload, names: Collection[str]) -> Iterator[OurStep]:
    """Our step in its plain forms, in a process that is else set up as ours."""
    with plain_forms(names, workload.device.type), our_program(workload) as ours:
        yield ours
