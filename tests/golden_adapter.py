"""The toolkit behind the interface of an acceptance test: every function maps onto public functions of the toolkit.

The other side calls parameters by their original names and lays sequences out as the original does: logits in rows
m * B + b, negatives as flat indices [B, M * N], frames first in the logits of CTC.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.data import audio
from common.data.collate import PAD, Batch, SubBatch
from common.labels import BLANK, Dictionary
from common.precision import MixedPrecisionOptimizer
from wav2vec2 import criterion, decoding
from wav2vec2.config import DropoutConfig, ObjectiveConfig
from wav2vec2.convert import fairseq, native
from wav2vec2.convert.contents import Contents
from wav2vec2.convert.load_any import load_any
from wav2vec2.convert.names import original_names
from wav2vec2.convert.options import from_config
from wav2vec2.criterion import Negatives
from wav2vec2.model import Wav2Vec2Ctc, Wav2Vec2Model
from wav2vec2.norms import valid_positions
from wav2vec2.task import FinetuneTask, PretrainTask, SubBatchLoss

sys.path.append(str(Path(__file__).parent))  # whoever loads this file need not know its neighbours
from golden_plans import data_plan, loss_scaler, random_mask, reported_metrics, sample_negatives, schedule  # noqa: E402

__all__ = ["data_plan", "loss_scaler", "random_mask", "reported_metrics", "sample_negatives"]  # handed on

MOMENTS = ("exp_avg", "exp_avg_sq")
WRITERS = {"original": fairseq.write, "native": native.write}
SEED = 1  # of tasks whose random draws are all given


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


@dataclass
class Handle:
    """A checkpoint and the model made of it."""

    contents: Contents
    model: Wav2Vec2Model | Wav2Vec2Ctc

    @property
    def trunk(self) -> Wav2Vec2Model:
        """The model without its output layer."""
        return self.model.w2v if isinstance(self.model, Wav2Vec2Ctc) else self.model

    def current(self) -> Contents:
        """The checkpoint with the weights that the model has now."""
        weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        return replace(self.contents, weights=weights)


def load_checkpoint(path: str) -> Handle:
    contents = load_any(path)
    config = contents.config
    no_dropout = {name: 0.0 for name in DropoutConfig.__dataclass_fields__ if name != "feature_grad_mult"}
    dropout = replace(config.dropout, **no_dropout)
    model: Wav2Vec2Model | Wav2Vec2Ctc
    if config.mode == "pretrain":
        model = Wav2Vec2Model(config.model, dropout)
    else:
        model = Wav2Vec2Ctc(
            config.model,
            dropout,
            num_symbols=contents.num_symbols,
            blank_weight=config.ctc.blank_weight,
            blank_mode=config.ctc.blank_mode,
        )
    model.load_state_dict(contents.weights)
    return Handle(contents, model.eval())


def model_settings(handle: Handle) -> dict[str, Any]:
    contents, model = handle.contents, handle.contents.config.model
    settings = from_config(contents.config)
    settings["conv_feature_layers"] = model.conv_layers()
    hourglass = model.hourglass()
    if hourglass:
        before, middle, factor, after = hourglass
        settings["hourglass_transformer"] = [before, [middle, factor], after]
    if contents.labels:
        settings["symbols"] = list(contents.labels)
    if contents.config.mode == "pretrain" and contents.step is not None:  # fine-tuning keeps its best WER, not the loss
        settings["train_state"] = {
            "step": contents.step,
            "epoch": contents.epoch,
            "best_val_loss": float("inf") if contents.best is None else contents.best,
        }
    return settings


def named_parameters(handle: Handle, gradients: bool = False) -> dict[str, Tensor | None]:
    parameters = dict(handle.model.named_parameters())
    if not gradients:
        return original(handle.contents, parameters)
    given = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    table = original_names(handle.contents.config.model)
    absent = {part: None for name in parameters if name not in given for part in table.foreign(name)}
    return {**original(handle.contents, given), **absent}


def original(contents: Contents, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors by their original names."""
    return original_names(contents.config.model).to_foreign(tensors)


def export_checkpoint(handle: Handle, path: str, format: str) -> None:
    WRITERS[format](Path(path), handle.current())


def optimizer_state(path: str) -> dict[str, Any]:
    contents = load_any(path)
    entries = contents.optimizer or {}
    state: dict[str, Any] = {
        moment: original(contents, {name: entry[moment] for name, entry in entries.items()}) for moment in MOMENTS
    }
    state["step"] = max(entry["step"] for entry in entries.values())
    if contents.scaler:
        state["loss_scale"] = contents.scaler["scale"]
    return state


# ---- Model ----------------------------------------------------------------------------------------------------------


def normalize_waveform(waveform: Tensor, lengths: Tensor) -> Tensor:
    normalized = torch.zeros_like(waveform)
    for row, wave, length in zip(normalized, waveform, lengths.tolist(), strict=True):
        row[:length] = torch.from_numpy(audio.normalize(wave[:length].numpy()))
    return normalized


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """Positional arguments and result of every call of some modules, by the names given to them."""
    calls: dict[str, list[tuple[Any, Any]]] = {name: [] for name in modules}

    def keep(name: str) -> Any:
        return lambda _, arguments, result: calls[name].append((arguments, result))

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def refuse_leaking_hourglass(handle: Handle, batch: Batch, reference_padding: bool) -> None:
    """The toolkit keeps padding out of the Hourglass in any case."""
    if reference_padding and batch.padded and handle.trunk.encoder.has_hourglass:
        raise NotImplementedError("padding inside the Hourglass")


@torch.no_grad()
def encode(
    handle: Handle,
    source: Tensor,
    padding_mask: Tensor | None,
    mask_indices: Tensor | None = None,
    layer: int | None = None,
    reference_padding: bool = True,
) -> dict[str, Any]:
    trunk, encoder = handle.trunk, handle.trunk.encoder
    batch = make_batch(trunk, source, padding_mask)
    refuse_leaking_hourglass(handle, batch, reference_padding)
    lengths_B = batch.lengths_B if batch.padded else None
    stacks = [encoder.layers]
    modules = {"projected": trunk.post_extract_proj, "pos_conv": encoder.pos_conv, "before_layers": encoder.dropout}
    if encoder.has_hourglass:
        stacks += [encoder.hourglass_layers, encoder.post_layers]
        modules |= {"downsampled": encoder.downsample, "upsampled": encoder.upsample}
    layers = {f"layer{index}": part for index, part in enumerate(part for stack in stacks for part in stack)}
    modules |= layers | {f"{name}.ffn": part.fc2 for name, part in layers.items()}
    with recorded(modules) as calls:
        encoded = trunk(
            source,
            lengths_B,
            frame_lengths=batch.frame_lengths,
            norm_lengths_B=None if reference_padding else lengths_B,
            mask_BT=mask_indices,
            layer=layer,
        )
    results = {name: call[0][1] for name, call in calls.items() if call}
    inputs = {name: call[0][0] for name, call in calls.items() if call}
    found = {
        "x": encoded.x,
        "frame_padding_mask": None,
        "conv_features": encoded.conv_features_BTC.transpose(1, 2),
        "layer_normed": encoded.features_BTC,
        "projected": results["projected"],
        "pos_conv_in": inputs["pos_conv"][0],
        "pos_conv_out": results["pos_conv"],
        "layer0_in": results["before_layers"],
        "layer_outputs": [results[name] for name in layers if name in results],
        "layer_ffn": [results[f"{name}.ffn"] for name in layers if name in results],
    }
    if encoded.frame_lengths_B is not None:
        found["frame_padding_mask"] = ~valid_positions(encoded.frame_lengths_B, encoded.x.shape[1])
    if encoder.has_hourglass:
        before, middle = len(encoder.layers), len(encoder.hourglass_layers)
        found["pre_out"] = results[f"layer{before - 1}"] if before else results["before_layers"]
        found |= {name: results[name] for name in ("downsampled", "upsampled")}
        found["merged"] = inputs[f"layer{before + middle}"][0] if len(encoder.post_layers) else encoded.x
        keys = inputs[f"layer{before}"][1]
        if isinstance(keys, tuple):
            pooled_B = torch.tensor([frames for rows, frames in keys for _ in range(rows)])
            found["pooled_padding_mask"] = ~valid_positions(pooled_B, inputs[f"layer{before}"][0].shape[1])
        else:
            found["pooled_padding_mask"] = None if keys is None else ~keys[:, 0, 0]
    quantizer = getattr(trunk, "quantizer", None)
    if quantizer is not None and mask_indices is None:
        codes_RG = quantizer(encoded.features_BTC.flatten(0, 1)).codes_RG
        shape = encoded.features_BTC.shape[:2]
        found["codes"] = codes_RG.unflatten(0, shape)
        found["codebook_index"] = quantizer.joint_codes(codes_RG).unflatten(0, shape)
    return found


def make_batch(
    trunk: Wav2Vec2Model,
    source: Tensor,
    padding_mask: Tensor | None,
    mask_indices: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    **more: Any,
) -> Batch:
    """A batch of given rows; `sizes` are the rows of its sub-batches, each as long as its longest row."""
    rows, samples = source.shape
    lengths_B = torch.full((rows,), samples) if padding_mask is None else (~padding_mask).sum(1)
    subs, first = [], 0
    for index, size in enumerate(sizes or [rows]):
        part = slice(first, first + size)
        own = samples if sizes is None else int(lengths_B[part].max())
        masked = 0 if mask_indices is None else int(mask_indices[first].sum())
        subs.append(SubBatch(size, own, masked, index, trunk.num_frames(own)))
        first += size
    return Batch(
        ids=tuple(map(str, range(rows))),
        audio_BS=source,
        lengths_B=lengths_B,
        padded=bool((lengths_B < samples).any()),
        sub_batches=tuple(subs),
        num_samples=int(lengths_B.sum()),
        frame_lengths=tuple(trunk.num_frames(lengths_B).tolist()),
        mask_BT=mask_indices,
        masked_R=None if mask_indices is None else mask_indices.flatten().nonzero().flatten(),
        **more,
    )


# ---- Pre-training ---------------------------------------------------------------------------------------------------


def pretrain_loss(
    handle: Handle,
    source: Tensor,
    padding_mask: Tensor | None,
    mask_indices: Tensor,
    neg_idxs: Any,
    loss_weights: Sequence[float],
    gumbel_noise: Any = None,
    gumbel_tau: float | None = None,
    negatives: Mapping[str, Any] | None = None,
    codebook_sample_idx: Tensor | None = None,
    reference_padding: bool = True,
    sub_batch_sizes: Sequence[int] | None = None,
    reference_concat: bool = False,
) -> dict[str, Any]:
    if reference_concat:
        raise NotImplementedError("diversity of the last sub-batch only")
    model = handle.trunk
    batch = make_batch(model, source, padding_mask, mask_indices, sub_batch_sizes)
    refuse_leaking_hourglass(handle, batch, reference_padding)
    joined = sub_batch_sizes is not None
    objective = make_objective(handle, loss_weights, negatives)
    if gumbel_tau is not None:
        model.quantizer.temperature = gumbel_tau
    drawn = [
        make_negatives(model, objective, sub, indices, codebook_sample_idx)
        for sub, indices in zip(batch.sub_batches, neg_idxs if joined else [neg_idxs], strict=True)
    ]
    task = PretrainTask(model, objective, seed=SEED, reference_padding=reference_padding)
    with recorded({"x_projected": model.final_proj, "y_projected": model.project_q}) as calls:
        total, stats, losses = task.losses(batch, make_noise(model, gumbel_noise), drawn)
    own = Parts(batch, objective.negatives_from_everywhere)
    found = {
        "total_loss": total,
        "contrastive_loss_sum": stats["loss_0"],
        "loss_terms": [stats[name] for name in ("loss_1", "loss_2") if name in stats],
        "features_pen": own.mean([loss.penalty for loss in losses]),
        "sample_size": batch.num_masked,
        "correct": int(stats["correct"]),
        "count": batch.num_masked,
    }
    parts = {
        "logits": [loss.logits_bMN.transpose(0, 1).flatten(0, 1) for loss in losses],
        "x_projected": own.split(calls["x_projected"][0][1]),
        "y_projected": own.of_masked(calls["y_projected"][0][1]),
    }
    if model.quantizer is not None:
        found["diversity"] = own.mean([loss.diversity for loss in losses])
        found |= {name: stats[name] / batch.num_masked for name in ("code_perplexity", "prob_perplexity")}
        parts |= quantizer_parts(own, losses)
    return {**found, **(parts if joined else {name: part[0] for name, part in parts.items()})}


def quantizer_parts(own: Parts, losses: Sequence[SubBatchLoss]) -> dict[str, list[Tensor]]:
    """What the quantizer gave for the masked frames of every sub-batch."""
    chosen = [loss.quantized for loss in losses]
    return {
        "codes": own.of_masked(torch.cat([part.codes_RG for part in chosen])),
        "quantizer_logits": own.of_masked(torch.cat([part.logits_RGV for part in chosen])),
        "quantized": own.of_masked(torch.cat([part.vectors_RD for part in chosen])),
    }


@dataclass(frozen=True)
class Parts:
    """The sub-batches of a batch; `everywhere`: targets are made of all frames, not only of the masked ones."""

    batch: Batch
    everywhere: bool

    def mean(self, values: Sequence[Any]) -> Any:
        """Mean over sub-batches, weighted by their masked frames."""
        sizes = [sub.rows * sub.masked for sub in self.batch.sub_batches]
        return sum(size * value for size, value in zip(sizes, values, strict=True)) / sum(sizes)

    def split(self, values_R: Tensor) -> list[Tensor]:
        """[R, ...] of all masked frames -> [b, M, ...] of every sub-batch."""
        subs = self.batch.sub_batches
        pieces = values_R.split([sub.rows * sub.masked for sub in subs])
        return [piece.unflatten(0, (sub.rows, sub.masked)) for sub, piece in zip(subs, pieces, strict=True)]

    def of_masked(self, values_Q: Tensor) -> list[Tensor]:
        """The same of all quantized frames."""
        if self.everywhere:
            first = accumulate((sub.rows for sub in self.batch.sub_batches), initial=0)
            masks = [
                self.batch.mask_BT[start : start + sub.rows, : sub.frames].flatten()
                for sub, start in zip(self.batch.sub_batches, first, strict=False)
            ]
            values_Q = values_Q[torch.cat(masks)]
        return self.split(values_Q)


def make_objective(
    handle: Handle, loss_weights: Sequence[float], negatives: Mapping[str, Any] | None = None
) -> ObjectiveConfig:
    """The model's objective with other weights and kinds of negatives.

    A single weight counts for all terms: without a quantizer there is only the penalty.
    """
    options = {"num_negatives" if name == "n_negatives" else name: value for name, value in (negatives or {}).items()}
    weights = tuple(loss_weights)
    if handle.trunk.quantizer is None:
        weights = (0.0, *weights)
    elif len(weights) == 1:
        weights *= 2
    return replace(handle.contents.config.objective, loss_weights=weights, **options)


def make_negatives(
    model: Wav2Vec2Model,
    objective: ObjectiveConfig,
    sub: SubBatch,
    indices: Tensor,
    codebook_sample_idx: Tensor | None = None,
) -> Negatives:
    """Flat indices [b, M * N] as Negatives; those that stay in their row are counted from its start."""
    row_size = sub.frames if objective.negatives_from_everywhere else sub.masked
    frames_bMN = indices.view(sub.rows, sub.masked, indices.shape[1] // sub.masked)
    within_bMN = frames_bMN - torch.arange(sub.rows)[:, None, None] * row_size
    across = bool(((within_bMN < 0) | (within_bMN >= row_size)).any())
    codes_bMnG = None
    if codebook_sample_idx is not None:
        # The original reads its block [b * M, n] again as [n, b, M].
        index_bMn = codebook_sample_idx.view(-1, sub.rows, sub.masked).permute(1, 2, 0)
        codes_bMnG = torch.stack(torch.unravel_index(index_bMn, (model.quantizer.codes,) * model.quantizer.groups), -1)
    return Negatives(frames_bMN if across else within_bMN, across, codes_bMnG)


def make_noise(model: Wav2Vec2Model, noise: Any) -> Tensor | None:
    """Rows (b, m, g) of one or several sub-batches as [R, G, V]."""
    if noise is None or model.quantizer is None:
        return None
    rows = noise if isinstance(noise, Tensor) else torch.cat(list(noise))
    return rows.view(-1, model.quantizer.groups, model.quantizer.codes)


def train(
    handle: Handle,
    config: Mapping[str, Any],
    updates: Sequence[Sequence[Mapping[str, Any]]],
    resume_from: str | None = None,
) -> Iterator[dict[str, Any]]:
    model = handle.trunk.train()
    objective = make_objective(handle, config["loss_weights"])
    task = PretrainTask(model, objective, seed=SEED, reference_padding=True)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = MixedPrecisionOptimizer(
        {"all": trained},
        betas=tuple(config["adam_betas"]),
        eps=config["adam_eps"],
        weight_decay=config["weight_decay"],
    )
    first = 0
    if resume_from is not None:
        resumed = load_any(resume_from)
        optimizer.load_state_dict({name: resumed.optimizer[name] for name, _ in trained})
        first = resumed.step
    for step, update in enumerate(updates, start=first):
        task.set_step(step)
        batches = [make_batch(model, m["source"], m["padding_mask"], m["mask_indices"]) for m in update]
        count, results = task.count_units(batches), []
        for batch, micro in zip(batches, update, strict=True):
            negatives = make_negatives(model, objective, batch.sub_batches[0], micro["neg_idxs"])
            loss, stats, _ = task.losses(batch, make_noise(model, micro["gumbel_noise"]), [negatives])
            optimizer.backward(loss / count)
            results.append((loss.item(), batch.num_masked, int(stats["correct"])))
        norm = float(optimizer.clip_grad_norm(config["clip_norm"]))
        rate = schedule("polynomial_decay", step, config)
        optimizer.step(rate)
        handle.contents = replace(handle.contents, optimizer=optimizer.state_dict(), step=step + 1)
        losses, sizes, correct = map(list, zip(*results, strict=True))
        yield {
            "learning_rate": rate,
            "gumbel_temperature": model.quantizer.temperature if model.quantizer is not None else None,
            "losses": losses,
            "sample_sizes": sizes,
            "correct": correct,
            "grad_norm": norm,
        }
    model.eval()


# ---- CTC ------------------------------------------------------------------------------------------------------------


def ctc_loss(
    handle: Handle,
    source: Tensor,
    padding_mask: Tensor | None,
    target: Tensor,
    mask_indices: Tensor | None = None,
    mask_channel_indices: Tensor | None = None,
    zero_infinity: bool = True,
    reference_padding: bool = True,
) -> dict[str, Any]:
    label_lengths = tuple((target != PAD).sum(1).tolist())
    labels = {"channel_mask_BD": mask_channel_indices, "labels_BL": target, "label_lengths": label_lengths}
    batch = make_batch(handle.trunk, source, padding_mask, mask_indices, **labels)
    refuse_leaking_hourglass(handle, batch, reference_padding)
    task = FinetuneTask(handle.model, seed=SEED, reference_padding=reference_padding)
    logits_BTK = task.logits(batch)
    losses_B = criterion.ctc_losses(logits_BTK, batch.frame_lengths, target, label_lengths, zero_infinity=zero_infinity)
    return {
        "loss": losses_B.sum(),
        "per_utt_loss": losses_B,
        "encoder_out": logits_BTK.transpose(0, 1),
        "log_probs": torch.log_softmax(logits_BTK, -1).transpose(0, 1),
        "frame_lengths": torch.tensor(batch.frame_lengths),
        "sample_size": batch.num_rows,
        "ntokens": batch.num_labels,
    }


def ctc_greedy(
    logits: Tensor, frame_lengths: Tensor, dictionary: str, target: Tensor | None = None, blank: int = BLANK
) -> dict[str, Any]:
    if blank != BLANK:
        raise ValueError(f"the blank is symbol {BLANK}")
    symbols = Dictionary.read(dictionary)
    ids, _ = decoding.greedy(logits.transpose(0, 1), frame_lengths.tolist())
    found: dict[str, Any] = {"ids": ids, "text": [symbols.decode(row) for row in ids]}
    if target is not None:
        labels = [row[row != PAD].tolist() for row in target]
        found["c_errors"], found["c_total"] = decoding.symbol_errors(labels, ids)
        texts = [symbols.decode(row) for row in labels]
        found["w_errors"], found["w_total"] = decoding.word_errors(texts, found["text"])
    return found
