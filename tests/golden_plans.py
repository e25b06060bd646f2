"""What an acceptance test asks beside the model: logs, schedules, draws, batches. Used by golden_adapter.py alone."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import schedules
from common.data import batching, buckets, masking
from common.data.collate import Collator
from common.data.dataset import Sample
from common.data.sampler import PlannedSubBatch, UpdateSampler, plan_validation
from common.data.segment import RandomSegment
from common.errors import ConfigError, TrainingError
from common.metrics import Metrics
from common.precision import LossScaler
from common.rng import numpy_rng, torch_rng
from utils.generate_filelist import draw_valid
from wav2vec2 import criterion
from wav2vec2.config import ObjectiveConfig
from wav2vec2.logging import REDUCTIONS, summarize, throughput

# ---- What is logged -------------------------------------------------------------------------------------------------

SIZES = {"nsentences": 0.0, "nframes": 0.0, "nsamples": 0.0, "blank_frames": 0.0}  # where they are not given
PERPLEXITIES = ("code_perplexity", "prob_perplexity")


def reported_metrics(task: str, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    if task.endswith("_interval"):
        return interval_metrics("pretrain" if task.startswith("pretrain") else "finetune", batches)
    if task == "ctc":
        return summarize(summed({**batch, "nsentences": batch["sample_size"]} for batch in batches), "finetune")
    values = summarize(summed({**batch, "ntokens": batch["sample_size"]} for batch in batches), "pretrain")
    return values | mean({"temp": batch["temp"]} for batch in batches if "temp" in batch)


def summed(batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Sums over batches; perplexities weighted by their masked frames."""
    metrics = Metrics(REDUCTIONS)
    for batch in batches:
        metrics.add({**SIZES, **{name: batch[name] for name in batch if name in REDUCTIONS}} | weighted(batch))
    return metrics.reduce("cpu")


def weighted(batch: Mapping[str, Any]) -> dict[str, float]:
    return {name: batch[name] * batch["ntokens"] for name in PERPLEXITIES if name in batch}


def mean(batches: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every value over the batches that have it."""
    found = list(batches)
    metrics = Metrics(dict.fromkeys((name for batch in found for name in batch), "mean"))
    for batch in found:
        metrics.add(batch)
    return metrics.reduce("cpu")


def interval_metrics(mode: str, updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Tokens and errors out of the sums of the interval; everything else is the mean of lines that log one update."""
    sums = [summed(update["micro_batches"]) for update in updates]
    total = summed(micro for update in updates for micro in update["micro_batches"])
    seconds = sum(update["seconds"] for update in updates)
    speed = throughput(total, updates=len(updates), seconds=seconds, sample_rate=16000)
    lines = [
        {"loss": values["loss"], **{name: values[name] for name in ("accuracy",) if name in values}}
        | {name: update[name] for name in ("lr", "loss_scale") if name in update}
        for update, values in zip(updates, (summarize(part, mode) for part in sums), strict=True)
    ]
    perplexities = mean(
        {name: micro[name] for name in PERPLEXITIES if name in micro}
        for update in updates
        for micro in update["micro_batches"]
    )
    rates = {name: value for name, value in summarize(total, mode).items() if name in ("uer", "wer")}
    return {name: speed[name] for name in ("ntokens", "ntokens/s")} | mean(lines) | perplexities | rates


# ---- Schedules and random draws -------------------------------------------------------------------------------------


def schedule(name: str, step: int, settings: Mapping[str, Any]) -> float:
    if name == "gumbel_temperature":
        return schedules.gumbel_temperature(step, *settings["latent_temp"])
    policy, translated = POLICIES[name](settings)
    if policy == "poly" and translated["hold_updates"]:
        decay_starts = translated["warmup_updates"] + translated["hold_updates"]
        if decay_starts < step < translated["max_update"]:
            raise NotImplementedError("the jump of the polynomial after a hold")
    return schedules.make_schedule(policy, **translated)(step)


def polynomial_decay(s: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    shape = {"hold_updates": 0, "final_lr_scale": s["end_learning_rate"] / s["lr"], "power": s["power"]}
    return "poly", {"lr": s["lr"], "warmup_updates": s["warmup_updates"], "max_update": s["total_num_update"], **shape}


def tri_stage(s: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    warmup, hold, decay = (int(share * s["max_update"]) for share in s["phase_ratio"])
    scales = {"initial_lr_scale": s["init_lr_scale"], "final_lr_scale": s["final_lr_scale"]}
    steps = {"warmup_updates": warmup, "hold_updates": hold, "max_update": warmup + hold + decay}
    return "exp", {"lr": s["lr"], **steps, **scales}


def one_based(policy: str, shape: str = "", ours: str = "") -> Any:
    """A policy whose steps count from 1, so that step n is ours after n updates; `shape` is an option of its own."""

    def translate(s: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        steps = {"warmup_updates": s["warmup_steps"], "hold_updates": s["hold_steps"], "max_update": s["num_steps"]}
        scales = {name: s[name] for name in ("initial_lr_scale", "final_lr_scale") if name in s}
        return policy, {"lr": s["lr"], **steps, **scales, **({ours: s[shape]} if shape else {})}

    return translate


def noam(s: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return "noam", {**{name: s[name] for name in ("lr", "d_model", "min_lr")}, "warmup_updates": s["warmup_steps"]}


def cosine_from_zero(s: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Steps count from 0, and the first rate is already one step of the warm-up."""
    scales = {"initial_lr_scale": 1 / (s["warmup_steps"] + 1), "final_lr_scale": s["min_lr"] / s["lr"]}
    return "cosine", {"lr": s["lr"], "warmup_updates": s["warmup_steps"], "max_update": s["max_steps"], **scales}


POLICIES = {
    "polynomial_decay": polynomial_decay,
    "tri_stage": tri_stage,
    "poly": one_based("poly", "power", "power"),
    "exp": one_based("exp", "decay", "lr_exp_decay"),
    "noam": noam,
    "cosine_zero_based_warmup": cosine_from_zero,
    "cosine_one_based_warmup": one_based("cosine"),
    "cosine_one_based_warmup_hold": one_based("cosine"),
}


def random_mask(kind: str, lengths: Sequence[int], settings: Mapping[str, Any], seed: int) -> Tensor:
    if kind != "span":
        raise NotImplementedError(f"masks of the kind {kind}")
    renamed = {"mask_prob": "prob", "mask_length": "length", "mask_type": "selection", "mask_other": "other"}
    options = {renamed.get(name, name): value for name, value in settings.items() if name != "frames"}
    rng = numpy_rng(seed, "mask")
    return torch.from_numpy(masking.span_mask(lengths, settings["frames"], masking.SpanMasking(**options), rng))


def sample_negatives(batch: int, frames: int, settings: Mapping[str, Any], seed: int) -> Tensor:
    objective = ObjectiveConfig(**settings)
    own_bM = torch.arange(frames).expand(batch, frames)
    generator = torch_rng("cpu", seed, "negatives")
    drawn = criterion.sample_negatives(objective, own_bM, torch.full((batch,), frames), frames, generator)
    starts_b11 = 0 if drawn.across_rows else torch.arange(batch)[:, None, None] * frames
    kinds = [objective.num_negatives, objective.cross_sample_negatives]
    return torch.cat([part.flatten(1) for part in (drawn.frames_bMN + starts_b11).split(kinds, -1)], 1)


def loss_scaler(events: Sequence[str], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    window = settings.get("scale_window")
    scaler = LossScaler(
        init=settings["init_scale"],
        factor=settings["scale_factor"],
        window=window or LossScaler.default_window(settings["world_size"], settings["update_freq"]),
        tolerance=settings["tolerance"],
        threshold=settings["threshold"],
        minimum=settings["min_loss_scale"],
    )
    trace = []
    for event in events:
        used = scaler.scale
        try:
            result = scaler.update(event == "ok")
        except TrainingError:  # the run ends here
            return [*trace, {"scale_used": used, "result": "raised", "scale_after": scaler.scale}]
        trace.append({"scale_used": used, "result": result, "scale_after": scaler.scale})
    return trace


# ---- Batches --------------------------------------------------------------------------------------------------------


def data_plan(kind: str, settings: Mapping[str, Any]) -> Any:
    if settings.get("reference"):
        raise NotImplementedError("random numbers and left-over groups of the original")
    return PLANS[kind]({name: value for name, value in settings.items() if name != "reference"})


def batch_by_size(s: Mapping[str, Any]) -> list[int]:
    limits = s["max_tokens"], s["max_sentences"], s["required_batch_size_multiple"]
    try:
        return np.diff(batching.token_batches(np.array(s["lengths"]), *limits)).tolist()
    except ConfigError as error:
        raise ValueError(str(error)) from error


def length_order(s: Mapping[str, Any]) -> list[int]:
    rng = numpy_rng(s["seed"], "length_order")
    return batching.length_order(np.array(s["sizes"]), s["max_sample_size"], rng).tolist()


def joined_batches(s: Mapping[str, Any]) -> list[list[list[int]]]:
    """Neighbours joined; in training without the samples above the limit, for which the toolkit would refuse to run."""
    lengths = batching.clipped(s["sizes"], None if s["pad"] else s["max_sample_size"])
    order, limit = np.array(s["order"], int), s["max_tokens"]
    if s["training"]:
        order = order[lengths[order] <= (limit or np.inf)]
    elif limit:
        limit = max(limit, int(lengths.max()))  # in validation such a sample is a batch of its own
    limits = limit, s["max_sentences"], s["required_batch_size_multiple"]
    offsets = batching.token_batches(lengths[order], *limits)
    parts = [part.tolist() for part in np.split(order, offsets[1:-1]) if len(part)]
    number = s["num_concat_batches"] or 1
    return [parts[first : first + number] for first in range(0, len(parts), number)]


def collate(s: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of zeros through the toolkit's collator."""
    samples = []
    for lengths in map(np.array, s["lengths"]):
        plan = batching.plan_sub_batches(
            lengths,
            max_tokens=None,
            max_sentences=None,
            multiple=1,
            crop=not s["pad"],
            max_sample_size=s["max_sample_size"],
            rng=numpy_rng("any"),
        )
        audio_S = np.zeros(plan.samples[0], np.float32)
        samples.append([Sample(str(row), audio_S[:length], None, None) for row, length in enumerate(lengths)])
    planned = [PlannedSubBatch(1, index, index) for index in range(len(samples))]
    batch = Collator(num_frames=lambda samples: samples, seed=0)(planned, samples)
    rows = [sub.rows for sub in batch.sub_batches]
    return {"samples_per_row": batch.audio_BS.shape[1], "sub_batch_sizes": rows}


def rank_batches(s: Mapping[str, Any]) -> list[int | None]:
    rank, world = s["rank"], s["world_size"]
    if not s["training"]:
        own = [plan.sub_batch for plan in plan_validation(s["batches"], rank=rank, world=world)]
        return own + [None] * (-(-s["batches"] // world) - len(own))
    sampler = UpdateSampler(lengths=np.zeros(s["batches"]), sub_batches_per_update=world, seed=s["seed"])
    layout = {"rank": rank, "world": world, "concat": 1, "update_freq": 1}
    updates = [sampler.micro_batches(s["epoch"], update, **layout) for update in range(sampler.updates_per_epoch)]
    return [plan.sub_batch for update in updates for micro in update for plan in micro]


def bucket_order(s: Mapping[str, Any]) -> list[list[int]]:
    epochs = range(1, s["epochs"] + 1)
    return [buckets.bucket_order(s["strategy"], s["buckets"], epoch, rank=s["rank"]).tolist() for epoch in epochs]


def batch_sizes(s: Mapping[str, Any]) -> list[int]:
    size = s["bucketing_batch_size"]
    if not isinstance(size, (int, list)):
        raise ValueError(f"{size!r} is neither a number nor a list")
    try:
        return buckets.adaptive_batch_sizes(size, s["datasets"], s["bucketing_weights"] or ())
    except ConfigError as error:
        raise ValueError(str(error)) from error


def shards(s: Mapping[str, Any]) -> list[str]:
    from common.data.shards import expand_pattern, shards_of_rank

    return shards_of_rank(expand_pattern(s["pattern"]), s["strategy"], s["rank"], s["world_size"])


def duration_buckets(s: Mapping[str, Any]) -> dict[str, Any]:
    """Both edges belong to a bucket there; in a run a duration on an inner edge is in the first of the two."""
    edges = buckets.equal_width_ranges(s["min_duration"], s["max_duration"], s["buckets"]).tolist()
    inside = [[i for i, (low, high) in enumerate(edges) if low <= seconds <= high] for seconds in s["durations"]]
    return {"edges": edges, "member_of": inside}


def length_buckets(s: Mapping[str, Any]) -> dict[str, Any]:
    """The ends, and what every utterance is padded to in a plan."""
    plan = batching.plan_sub_batches(
        np.array(s["sizes"]),
        max_tokens=None,
        max_sentences=1,
        multiple=1,
        crop=False,
        max_sample_size=None,
        rng=numpy_rng("any"),
        bucketing=batching.Bucketing(s["num_buckets"]),
    )
    padded = plan.samples[np.argsort(plan.order)]
    ends = buckets.percentile_ends(np.array(s["sizes"]), s["num_buckets"])
    return {"buckets": np.unique(ends).tolist(), "bucketed": padded.tolist()}


def manifest_split(s: Mapping[str, Any]) -> list[int]:
    return np.flatnonzero(draw_valid(s["files"], s["valid_percent"], s["seed"])).tolist()


def random_segment(s: Mapping[str, Any]) -> dict[str, int]:
    segment = RandomSegment(s["duration_sec"], pad=s["pad_to_duration"])
    silence = np.zeros(s["num_samples"], np.float32)
    _, frames, zeros = segment.draw(
        len(silence), s["sample_rate"], numpy_rng("any"), lambda start, frames: silence[start : start + frames]
    )
    return {"out_samples": frames + zeros, "zero_tail": zeros}


PLANS = {
    "batch_by_size": batch_by_size,
    "length_order": length_order,
    "joined_batches": joined_batches,
    "collate": collate,
    "rank_batches": rank_batches,
    "bucket_order": bucket_order,
    "batch_sizes": batch_sizes,
    "shards": shards,
    "duration_buckets": duration_buckets,
    "length_buckets": length_buckets,
    "manifest_split": manifest_split,
    "random_segment": random_segment,
}
