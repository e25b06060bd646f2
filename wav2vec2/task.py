"""What DDP and torch.compile wrap: a batch goes in, the loss of its share of the update and statistics come out.

Every statistic is a sum over sub-batches that stays on the device; losses are in nats.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common import distributed, rng
from common.data.collate import Batch, SubBatch, present
from common.precision import autocast
from common.schedules import gumbel_temperature
from wav2vec2 import criterion
from wav2vec2.config import ObjectiveConfig
from wav2vec2.criterion import Negatives
from wav2vec2.model import Quantized, Wav2Vec2Ctc, Wav2Vec2Model
from wav2vec2.norms import at_least_fp32, valid_positions

Stats = dict[str, Tensor | float]


@dataclass(frozen=True)
class _Place:
    """One sub-batch, and its share of the rows, the masked frames and the quantized frames of a batch."""

    sub: SubBatch
    rows: slice
    masked: slice
    quantized: slice


@dataclass(frozen=True)
class _Outputs:
    """What the model gives the losses: predictions, targets with their ids, and the energy of every frame."""

    predictions_RF: Tensor
    targets_QF: Tensor
    ids_Q: Tensor
    quantized: Quantized | None
    energy_BT: Tensor


@dataclass(frozen=True)
class SubBatchLoss:
    """The losses of one sub-batch (weighted sums over its masked frames, in nats) and what they are made of.

    `perplexities` are multiplied by the number of masked frames too; `diversity` and `penalty` are not weighted.
    """

    terms: dict[str, Tensor]
    perplexities: dict[str, Tensor]
    logits_bMN: Tensor
    quantized: Quantized | None
    diversity: Tensor | None
    penalty: Tensor


def _add(stats: Stats, name: str, value: Tensor) -> None:
    stats[name] = stats.get(name, 0.0) + value


def _share(batch: Batch, loss: Tensor, stats: Stats, count: Tensor) -> tuple[Tensor, Stats]:
    """The loss as its share of an update, for DDP's mean over ranks; of an idle batch nothing but the graph."""
    if batch.idle:
        loss = loss * 0
        stats = {name: value.new_zeros(()) if isinstance(value, Tensor) else 0.0 for name, value in stats.items()}
    return loss / count * distributed.world_size(), stats


def norm_lengths(batch: Batch, *, reference_padding: bool) -> Tensor | None:
    """Samples [B] over which the channel norm averages; None when that is the whole row for all rows.

    The original averages over all of a (sub-)batch, padding included.
    """
    if not reference_padding:
        return batch.lengths_B if batch.padded else None
    if all(sub.samples == batch.audio_BS.shape[1] for sub in batch.sub_batches):
        return None
    device = batch.audio_BS.device  # full() fills there; tensor() would copy from the host
    return torch.cat([torch.full((sub.rows,), sub.samples, device=device) for sub in batch.sub_batches])


def draw_layerdrop(probability: float, num_layers: int, seed: int, step: int) -> list[bool]:
    """Which layers take part in an update: one draw for all ranks and micro-batches."""
    draws = rng.numpy_rng(seed, "layerdrop", step).random(num_layers)
    return [bool(draw >= probability) for draw in draws]


class PretrainTask(nn.Module):
    """The contrastive task with its diversity term and feature penalty."""

    def __init__(
        self,
        model: Wav2Vec2Model,
        objective: ObjectiveConfig,
        *,
        seed: int,
        layerdrop: float = 0.0,
        reference_padding: bool = False,
        fp32_cosine: bool = True,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.seed = seed
        self.layerdrop = layerdrop
        self.reference_padding = reference_padding
        self.fp32_cosine = fp32_cosine
        self.amp_dtype = amp_dtype
        self.contrastive_logits = criterion.contrastive_logits  # or that, compiled
        self.step = 0

    @property
    def frozen_groups(self) -> tuple[str, ...]:
        """Parameter groups that do not train in this update."""
        return ()

    def set_step(self, step: int) -> None:
        """Set all that depends on the number of finished updates."""
        self.step = step
        encoder = self.model.encoder
        encoder.kept = draw_layerdrop(self.layerdrop, encoder.num_layers, self.seed, step)
        if self.model.quantizer is not None:
            start, end, factor = self.objective.latent_temp
            self.model.quantizer.temperature = gumbel_temperature(step, start, end, factor)

    @staticmethod
    def count_units(batches: Sequence[Batch]) -> int:
        """Masked frames: what the loss is divided by."""
        return sum(batch.num_masked for batch in batches if not batch.idle)

    def forward(self, batch: Batch, count: Tensor) -> tuple[Tensor, Stats]:
        """The loss of this batch as its share of an update of `count` masked frames, for DDP's mean over ranks."""
        noise, negatives = self._draw(batch)
        loss, stats, _ = self.losses(batch, noise, negatives)
        return _share(batch, loss, stats, count)

    def losses(
        self, batch: Batch, noise_QGV: Tensor | None, negatives: Sequence[Negatives]
    ) -> tuple[Tensor, Stats, list[SubBatchLoss]]:
        """Total loss (sum over masked frames, in nats), statistics, and what each sub-batch gave.

        Q are the quantized frames: the R masked ones, or with --negatives_from_everywhere all frames of all
        sub-batches, one after the other. Without noise the quantizer takes the arg-max.
        """
        outputs = self._outputs(batch, noise_QGV)
        results = [
            self._sub_batch_loss(batch, place, outputs, drawn)
            for place, drawn in zip(self._places(batch), negatives, strict=True)
            if place.sub.masked
        ]
        terms = [term for result in results for term in result.terms.values()]
        # Without a masked frame there are no terms; empty sums keep every parameter in the graph, as DDP needs.
        empty = outputs.predictions_RF[:0].sum() + outputs.targets_QF[:0].sum()
        total = torch.stack(terms).sum() if terms else empty
        stats: Stats = {"loss": total.detach(), "correct": 0.0, "ntokens": float(batch.num_masked), **counts(batch)}
        for result in results:
            _add(stats, "correct", criterion.num_correct(result.logits_bMN.detach()))
            for name, term in {**result.terms, **result.perplexities}.items():
                _add(stats, name, term.detach())
        return total, stats, results

    def _outputs(self, batch: Batch, noise_QGV: Tensor | None) -> _Outputs:
        """The model's part, under autocast with --amp."""
        model = self.model
        with autocast(batch.audio_BS.device, self.amp_dtype):
            encoded = model(
                batch.audio_BS,
                batch.lengths_B if batch.padded else None,
                frame_lengths=batch.frame_lengths,
                norm_lengths_B=norm_lengths(batch, reference_padding=self.reference_padding),
                mask_BT=batch.mask_BT,
                channel_mask_BD=batch.channel_mask_BD,
                wanted_R=present(batch.masked_R),
            )
            predictions_RF = model.final_proj(encoded.x)
            features_QC = self._frames_to_quantize(batch, encoded.features_BTC)
            targets_QF, quantized = model.quantize(features_QC, noise_QGV)
        if quantized is None:
            ids_Q = criterion.target_ids(features_QC)
        else:
            ids_Q = present(model.quantizer).joint_codes(quantized.codes_RG)
        if self.fp32_cosine:
            predictions_RF, targets_QF = at_least_fp32(predictions_RF), at_least_fp32(targets_QF)
        energy_BT = criterion.frame_energy(encoded.conv_features_BTC)
        return _Outputs(predictions_RF, targets_QF, ids_Q, quantized, energy_BT)

    def _sub_batch_loss(self, batch: Batch, place: _Place, outputs: _Outputs, drawn: Negatives) -> SubBatchLoss:
        """The terms of one sub-batch, each a sum over its masked frames; a zero weight drops its term."""
        size = place.sub.rows * place.sub.masked
        logits_bMN = self._logits(batch, place, outputs, drawn)
        penalty = self._penalty(batch, place, outputs.energy_BT)
        terms, perplexities, diversity = {"loss_0": criterion.info_nce(logits_bMN)}, {}, None
        diversity_weight, penalty_weight = self.objective.loss_weights
        quantized = outputs.quantized.rows(place.quantized) if outputs.quantized is not None else None
        if quantized is not None:
            code_perplexity, prob_perplexity = criterion.code_statistics(
                quantized.logits_RGV, self._weights(batch, place)
            )
            diversity = criterion.diversity(prob_perplexity, quantized.logits_RGV[0].numel())
            perplexities = {"code_perplexity": code_perplexity * size, "prob_perplexity": prob_perplexity * size}
            if diversity_weight:
                terms["loss_1"] = diversity_weight * size * diversity
        if penalty_weight:
            terms["loss_2"] = penalty_weight * size * penalty
        return SubBatchLoss(terms, perplexities, logits_bMN, quantized, diversity, penalty)

    def _draw(self, batch: Batch) -> tuple[Tensor | None, list[Negatives]]:
        """Gumbel noise (in training) and negatives, each from the generator of its sub-batch."""
        device = batch.audio_BS.device
        quantizer = self.model.quantizer
        book = (quantizer.groups, quantizer.codes) if quantizer is not None else (0, 0)
        noise, negatives = [], []
        for place in self._places(batch):
            sub, num_quantized = place.sub, place.quantized.stop - place.quantized.start
            where = ("train", self.step) if self.training else ("valid", 0)
            generator = rng.torch_rng(device, self.seed, "sub-batch", *where, sub.index)
            if quantizer is not None and self.training:
                noise.append(criterion.gumbel_noise((num_quantized, *book), generator))
            if self.objective.negatives_from_everywhere:
                candidates_b = self.model.num_frames(batch.lengths_B[place.rows])
            else:
                candidates_b = torch.full((sub.rows,), sub.masked, device=device)
            own_bM = self._own_frames(batch, place)
            row_size = num_quantized // sub.rows
            negatives.append(
                criterion.sample_negatives(self.objective, own_bM, candidates_b, row_size, generator, book)
            )
        return torch.cat(noise) if noise else None, negatives

    def _places(self, batch: Batch) -> Iterator[_Place]:
        """Where each sub-batch lies among the rows, the masked and the quantized frames of its batch."""
        rows = masked = quantized = 0
        for sub in batch.sub_batches:
            per_row = sub.frames if self.objective.negatives_from_everywhere else sub.masked
            ends = rows + sub.rows, masked + sub.rows * sub.masked, quantized + sub.rows * per_row
            yield _Place(sub, slice(rows, ends[0]), slice(masked, ends[1]), slice(quantized, ends[2]))
            rows, masked, quantized = ends

    def _frames_to_quantize(self, batch: Batch, features_BTC: Tensor) -> Tensor:
        if not self.objective.negatives_from_everywhere:
            return features_BTC.flatten(0, 1).index_select(0, present(batch.masked_R))
        return torch.cat([features_BTC[place.rows, : place.sub.frames].flatten(0, 1) for place in self._places(batch)])

    def _own_frames(self, batch: Batch, place: _Place) -> Tensor:
        """Place [b, M] of every masked frame among the candidates of its row."""
        shape = place.sub.rows, place.sub.masked
        if self.objective.negatives_from_everywhere:
            return (present(batch.masked_R)[place.masked] % present(batch.mask_BT).shape[1]).view(shape)
        return torch.arange(place.sub.masked, device=batch.audio_BS.device).expand(shape)

    def _logits(self, batch: Batch, place: _Place, outputs: _Outputs, drawn: Negatives) -> Tensor:
        """Similarities [b, M, 1 + N] of one sub-batch."""
        candidates, ids = outputs.targets_QF[place.quantized], outputs.ids_Q[place.quantized]
        rows, width = place.sub.rows, candidates.shape[-1]
        own_bM = self._own_frames(batch, place)
        candidates_bPF, ids_bP = candidates.view(rows, -1, width), ids.view(rows, -1)
        codebook = None
        if drawn.codes_bMNG is not None:
            codes = drawn.codes_bMNG
            quantizer = present(self.model.quantizer)
            vectors = self.model.project_q(quantizer.look_up(codes.flatten(0, 2)))
            vectors_bMnF = vectors.to(candidates.dtype).view(*codes.shape[:3], width)
            codebook = vectors_bMnF, quantizer.joint_codes(codes)
        return self.contrastive_logits(
            outputs.predictions_RF[place.masked].view(rows, -1, width),
            candidates_bPF.gather(1, own_bM[..., None].expand(-1, -1, width)),
            ids_bP.gather(1, own_bM),
            candidates_bPF,
            ids_bP,
            drawn,
            self.objective.logit_temp,
            codebook,
        )

    def _weights(self, batch: Batch, place: _Place) -> Tensor | None:
        """Weights of the quantized frames of a sub-batch in the code statistics: 0 for padding."""
        if not self.objective.negatives_from_everywhere:
            return None
        return self._valid(batch, place).flatten().float()

    def _penalty(self, batch: Batch, place: _Place, energy_BT: Tensor) -> Tensor:
        """Mean energy of the frames of a sub-batch, without its padding."""
        valid_bT = self._valid(batch, place)
        return (energy_BT[place.rows, : place.sub.frames] * valid_bT).sum() / valid_bT.sum()

    def _valid(self, batch: Batch, place: _Place) -> Tensor:
        """Frames [b, T] of a sub-batch that count: not its padding, unless the original's behaviour is asked for."""
        lengths_b = self.model.num_frames(batch.lengths_B[place.rows])
        if self.reference_padding:
            lengths_b = torch.full_like(lengths_b, place.sub.frames)
        return valid_positions(lengths_b, place.sub.frames)


class FinetuneTask(nn.Module):
    """CTC on transcripts."""

    def __init__(
        self,
        model: Wav2Vec2Ctc,
        *,
        seed: int,
        layerdrop: float = 0.0,
        freeze_updates: int = 0,
        reference_padding: bool = False,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.seed = seed
        self.layerdrop = layerdrop
        self.freeze_updates = freeze_updates
        self.reference_padding = reference_padding
        self.amp_dtype = amp_dtype

    @property
    def frozen_groups(self) -> tuple[str, ...]:
        """Parameter groups that do not train in this update."""
        return ("w2v",) if self.model.frozen else ()

    def set_step(self, step: int) -> None:
        """Set all that depends on the number of finished updates."""
        self.model.frozen = step < self.freeze_updates
        encoder = self.model.w2v.encoder
        encoder.kept = draw_layerdrop(self.layerdrop, encoder.num_layers, self.seed, step)

    @staticmethod
    def count_units(batches: Sequence[Batch]) -> int:
        """Sentences: what the loss is divided by."""
        return sum(batch.num_rows for batch in batches if not batch.idle)

    def forward(self, batch: Batch, count: Tensor) -> tuple[Tensor, Stats]:
        """The loss of this batch as its share of an update of `count` sentences, for DDP's mean over ranks."""
        loss, stats, _ = self.losses(batch)
        return _share(batch, loss, stats, count)

    def losses(self, batch: Batch) -> tuple[Tensor, Stats, Tensor]:
        """Total loss (sum over sentences, in nats), statistics, and the logits [B, T, K]."""
        with autocast(batch.audio_BS.device, self.amp_dtype):
            logits_BTK = self.logits(batch)
        losses_B = criterion.ctc_losses(
            logits_BTK, batch.frame_lengths, present(batch.labels_BL), present(batch.label_lengths)
        )
        total = losses_B.sum()
        stats: Stats = {"loss": total.detach(), "ntokens": float(batch.num_labels), **counts(batch)}
        return total, stats, logits_BTK

    def logits(self, batch: Batch) -> Tensor:
        """Scores [B, T, K] of every symbol in every frame, before the softmax."""
        logits_BTK, _ = self.model(
            batch.audio_BS,
            batch.lengths_B if batch.padded else None,
            frame_lengths=batch.frame_lengths,
            norm_lengths_B=norm_lengths(batch, reference_padding=self.reference_padding),
            mask_BT=batch.mask_BT,
            channel_mask_BD=batch.channel_mask_BD,
        )
        return logits_BTK


def counts(batch: Batch) -> Stats:
    """Sizes of a batch, known on the host."""
    return {
        "nsentences": float(batch.num_rows),
        "nframes": float(batch.num_frames),
        "nsamples": float(batch.num_samples),
    }
