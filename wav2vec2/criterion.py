"""The losses: InfoNCE over negatives with diversity and feature penalty (section 3.2), and CTC.

Everything random belongs to a sub-batch and is drawn here from a generator that the task hands in. All losses are
sums in nats; the task divides them by the units of the whole update.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wav2vec2.config import ObjectiveConfig
from wav2vec2.norms import at_least_fp32

# ---- Draws ----------------------------------------------------------------------------------------------------------


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise -log(-log(u)), as -log of an exponential variable."""
    exponential = torch.empty(shape, device=generator.device).exponential_(generator=generator)
    return -exponential.clamp_min(torch.finfo(exponential.dtype).tiny).log()


@dataclass(frozen=True)
class Negatives:
    """Negatives of one sub-batch of b rows with M masked frames each.

    `frames_bMN` are indices of candidate frames: within the own row, or, when `across_rows`, into all rows laid end to
    end. `codes_bMNG` are codes of the quantizer, None without codebook negatives.
    """

    frames_bMN: Tensor
    across_rows: bool
    codes_bMNG: Tensor | None = None


def sample_negatives(
    objective: ObjectiveConfig,
    own_bM: Tensor,
    candidates_b: Tensor,
    row_size: int,
    generator: torch.Generator,
    codebook: tuple[int, int] = (0, 0),
) -> Negatives:
    """Draw the negatives of a sub-batch, uniformly and with replacement, never the frame itself.

    `own_bM`: index of every masked frame among the candidates of its row. `candidates_b`: candidates per row; they come
    first among the `row_size` places of a row. `codebook`: (groups, codes) of the quantizer.
    A row with a single candidate gives that one; being equal to the positive it is excluded from the logits.
    """
    rows, masked = own_bM.shape
    device = own_bM.device

    def uniform(count: int) -> Tensor:
        return torch.rand((rows, masked, count), generator=generator, device=device, dtype=torch.float64)

    def other_than(own: Tensor, candidates: Tensor, draw: Tensor) -> Tensor:
        """An index in [0, candidates) without `own`."""
        index = (draw * (candidates - 1)).long()
        return torch.minimum(index + (index >= own), candidates - 1)

    own_bM1, candidates_b11 = own_bM[..., None], candidates_b[:, None, None]
    within = other_than(own_bM1, candidates_b11, uniform(objective.num_negatives))
    across = objective.cross_sample_negatives > 0
    if across:
        first_b = candidates_b.cumsum(0) - candidates_b  # rows laid end to end, without their padding
        draw = other_than(
            own_bM1 + first_b[:, None, None], candidates_b.sum(), uniform(objective.cross_sample_negatives)
        )
        row = torch.searchsorted(candidates_b.cumsum(0), draw, right=True)
        anywhere = row * row_size + draw - first_b[row]
        within = torch.cat([within + torch.arange(rows, device=device)[:, None, None] * row_size, anywhere], -1)
    codes = None
    if objective.codebook_negatives:
        groups, size = codebook
        shape = (rows, masked, objective.codebook_negatives, groups)
        codes = torch.randint(size, shape, generator=generator, device=device)
    return Negatives(within, across, codes)


# ---- The contrastive task -------------------------------------------------------------------------------------------


def target_ids(targets_RC: Tensor) -> Tensor:
    """A number [R] per frame that is equal exactly where unquantized targets are equal in every component.

    A hash of the bits: a product of matrices need not give equal results for equal rows.
    """
    bits_RC = (at_least_fp32(targets_RC.detach()) + 0.0).view(
        torch.int64 if targets_RC.dtype == torch.float64 else torch.int32
    )
    position_C = torch.arange(1, bits_RC.shape[-1] + 1, device=bits_RC.device)
    multipliers_C = (position_C * 0x9E3779B97F4A7C1) ^ (position_C * 0xC2B2AE3D27D4EB4F % (1 << 61))
    mixed_RC = (bits_RC.long() ^ (bits_RC.long() << 29)) * (2 * multipliers_C + 1)
    return (mixed_RC ^ (mixed_RC >> 31)).sum(-1)


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
    """Cosine similarities over the temperature [b, M, 1 + N], the positive first (equation 3).

    One product gives the similarity of every prediction with every candidate; the negatives are columns of it.
    A negative whose target equals that of the frame gets -inf. `codebook`: vectors [b, M, n, F] and ids [b, M, n] of
    codebook negatives.
    """
    rows, masked, _ = predictions_bMF.shape
    predictions = F.normalize(predictions_bMF, dim=-1, eps=1e-8)
    positive = (predictions * F.normalize(targets_bMF, dim=-1, eps=1e-8)).sum(-1, keepdim=True)
    queries, candidates = predictions, F.normalize(candidates_bPF, dim=-1, eps=1e-8)
    ids, frames = ids_bM, negatives.frames_bMN
    if negatives.across_rows:  # all rows become one long row
        queries, candidates = queries.flatten(0, 1)[None], candidates.flatten(0, 1)[None]
        ids, frames, candidate_ids_bP = (
            ids.flatten()[None],
            frames.flatten(0, 1)[None],
            candidate_ids_bP.flatten()[None],
        )
    similarity = torch.bmm(queries, candidates.transpose(1, 2)).gather(2, frames)
    negative_ids = candidate_ids_bP[:, None].expand(-1, ids.shape[1], -1).gather(2, frames)
    similarity = similarity.masked_fill(negative_ids == ids[..., None], -torch.inf).view(rows, masked, -1)
    logits = [positive, similarity]
    if codebook is not None:
        vectors_bMnF, codes_bMn = codebook
        similarity = torch.einsum("bmf,bmnf->bmn", predictions, F.normalize(vectors_bMnF, dim=-1, eps=1e-8))
        logits.append(similarity.masked_fill(codes_bMn == ids_bM[..., None], -torch.inf))
    return at_least_fp32(torch.cat(logits, -1)) / temperature


def info_nce(logits_bMN: Tensor) -> Tensor:
    """Cross-entropy of the positive, summed over masked frames, in nats."""
    flat = logits_bMN.flatten(0, 1)
    return F.cross_entropy(flat, flat.new_zeros(len(flat), dtype=torch.long), reduction="sum")


def num_correct(logits_bMN: Tensor) -> Tensor:
    """Frames whose positive is most similar, less those where all similarities are equal."""
    positive = logits_bMN[..., 0]
    return ((positive == logits_bMN.amax(-1)) & (positive != logits_bMN.amin(-1))).sum()


def perplexity(probabilities_GV: Tensor) -> Tensor:
    """Exponential of the entropy of every group, summed over groups (equation 4): G for one code, G x V for all."""
    entropy_G = -(probabilities_GV * torch.log(probabilities_GV + 1e-7)).sum(-1)
    return entropy_G.exp().sum()


def code_statistics(logits_RGV: Tensor, weights_R: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Perplexity of the arg-max codes and of the mean probabilities of R frames, each counted with its weight."""
    if weights_R is None:
        weights_R = logits_RGV.new_ones(len(logits_RGV))
    share_R = weights_R.to(logits_RGV.dtype) / weights_R.sum()
    used_RGV = F.one_hot(logits_RGV.argmax(-1), logits_RGV.shape[-1]).to(logits_RGV.dtype)
    probabilities_RGV = torch.softmax(logits_RGV, -1)
    means = [torch.einsum("r,rgv->gv", share_R, values) for values in (used_RGV, probabilities_RGV)]
    return perplexity(means[0]), perplexity(means[1])


def diversity(prob_perplexity: Tensor, num_codes: int) -> Tensor:
    """Share of the G x V codes that is not used, in [0, 1]."""
    return (num_codes - prob_perplexity) / num_codes


def frame_energy(conv_features_BTC: Tensor) -> Tensor:
    """Mean square [B, T] over the channels of the conv features: the feature penalty of every frame."""
    return at_least_fp32(conv_features_BTC).square().mean(-1)


# ---- CTC ------------------------------------------------------------------------------------------------------------


def ctc_losses(
    logits_BTK: Tensor,
    frame_lengths: Sequence[int] | Tensor,
    labels_BL: Tensor,
    label_lengths: Sequence[int] | Tensor,
    *,
    zero_infinity: bool = True,
) -> Tensor:
    """Negative log-likelihood [B] of every transcript in nats; blank is symbol 0.

    Lengths belong on the host: torch would read back those of a tensor on the device. On CUDA the host waits all the
    same, for three blocking copies of lengths and offsets in the forward pass and three in the backward pass.
    With `zero_infinity` a transcript that does not fit into its frames counts 0.
    """
    log_probs_TBK = F.log_softmax(at_least_fp32(logits_BTK), -1).transpose(0, 1)
    # cuDNN's CTC knows no zero_infinity for all of these cases and is not deterministic
    ctc_loss: Any = F.ctc_loss  # torch's stubs do not know lengths that are numbers
    with torch.backends.cudnn.flags(enabled=False):
        return ctc_loss(
            log_probs_TBK, labels_BL, frame_lengths, label_lengths, reduction="none", zero_infinity=zero_infinity
        )
