"""Which options cannot work together, and which would have no effect."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from common.errors import ConfigError
from common.schedules import make_schedule
from wav2vec2.config import FP32_OPS, Config, ModelConfig, PrecisionConfig
from wav2vec2.data_checks import check_data
from wav2vec2.health_config import HealthConfig
from wav2vec2.inference_config import InferenceConfig

_ARCHITECTURE = tuple(ModelConfig.__dataclass_fields__)
_RULES = tuple(name for name in HealthConfig.__dataclass_fields__ if name not in ("health", "on_nan"))


def check_train_config(config: Config, explicit: Collection[str]) -> None:
    """Refuse combinations that cannot work, and flags that would have no effect. Raises ConfigError."""
    _check_precision(config.precision, explicit)
    _check_optimizer(config)
    _check_masks(config)
    _check_objective(config, explicit)
    _check_paths(config)
    _check_speed(config)
    check_data(config.data, config.shards, config.mode, explicit)
    _check_effects(config, explicit)
    check_model(config)


def _check_precision(precision: PrecisionConfig, explicit: Collection[str]) -> None:
    if precision.fp16 and precision.bf16:
        raise ConfigError("--fp16 --bf16: only one of them can be used; drop one")
    if precision.amp and precision.name == "fp32":
        raise ConfigError("--amp: needs --bf16 or --fp16 beside it")
    if "fp32_ops" in explicit:
        if precision.name == "fp32" or precision.amp:
            raise ConfigError("--fp32_ops: has an effect only with --fp16 or --bf16 and without --amp; drop it")
        unknown = set(precision.fp32_ops or ()) - {*FP32_OPS, "none"}
        if unknown or ("none" in (precision.fp32_ops or ()) and precision.fp32_ops != ("none",)):
            raise ConfigError(
                f"--fp32_ops {' '.join(precision.fp32_ops or ())}: takes some of {', '.join(FP32_OPS)}, or none alone"
            )
    for name in ("fp16_init_scale", "fp16_scale_window", "min_loss_scale"):
        if name in explicit and not precision.fp16:
            raise ConfigError(f"--{name}: has an effect only with --fp16; drop it")


def _check_speed(config: Config) -> None:
    run = config.run
    if run.cuda_graphs and not run.compile:
        raise ConfigError("--cuda_graphs: needs --compile beside it")
    if run.parallel == "fsdp" and run.compile:
        raise ConfigError(
            "--parallel fsdp --compile: shards are gathered by hooks that compiled parts would not call; drop one"
        )
    if run.cuda_graphs and config.dropout.encoder_layerdrop:
        raise ConfigError("--cuda_graphs: every choice of LayerDrop would be a graph; set --encoder_layerdrop 0")


def _check_optimizer(config: Config) -> None:
    optim = config.optim
    if not all(0 <= beta < 1 for beta in optim.adam_betas):
        raise ConfigError(f"--adam_betas {' '.join(map(str, optim.adam_betas))}: each is from 0 to below 1")
    if optim.ema == 1:
        raise ConfigError("--ema 1: the average would never move; 0.999 and 0.9999 are usual")
    make_schedule(**optim.schedule(config.model.encoder_embed_dim))


def _check_masks(config: Config) -> None:
    for kind, spans in (("mask", config.mask.of_time()), ("mask_channel", config.mask.of_channels())):
        if spans["selection"] == "uniform" and spans["other"] > 2 * spans["length"]:
            raise ConfigError(
                f"--{kind}_other {spans['other']}: the shortest span, at most twice --{kind}_length {spans['length']}; "
                "lower it"
            )


def _check_objective(config: Config, explicit: Collection[str]) -> None:
    if config.mode == "finetune":
        if config.ctc.freeze_finetune_updates >= config.optim.max_update:
            raise ConfigError(
                f"--freeze_finetune_updates {config.ctc.freeze_finetune_updates}: the encoder would never train in "
                f"--max_update {config.optim.max_update} updates; lower it"
            )
        return
    objective = config.objective
    if objective.num_negatives + objective.cross_sample_negatives + objective.codebook_negatives == 0:
        raise ConfigError("--num_negatives 0: there would be no negatives at all; set some")
    if config.mask.mask_prob == 0:
        raise ConfigError("--mask_prob 0: pre-training predicts masked frames; set it above 0")
    if not config.model.quantize_targets:
        for name in ("latent_vars", "latent_groups", "latent_dim", "latent_temp"):
            if name in explicit:
                raise ConfigError(f"--{name}: has no effect with --no_quantize_targets; drop it")
    start, end, factor = objective.latent_temp
    if not (start >= end > 0 and 0 < factor <= 1):
        raise ConfigError(f"--latent_temp {start} {end} {factor}: needs start >= end > 0 and a factor in (0, 1]")


def check_model(config: Config) -> None:
    """The same where the architecture decides, which a checkpoint may say. Raises ConfigError."""
    if config.mode == "pretrain" and config.objective.codebook_negatives and not config.model.quantize_targets:
        raise ConfigError("--codebook_negatives: needs a model with a quantizer; drop it")


def _check_paths(config: Config) -> None:
    if not Path(config.data.data).is_dir():
        raise ConfigError(
            f"--data {config.data.data}: no such folder; make file lists with scripts/generate_filelists.sh"
        )
    run, w2v_path = config.run, config.ctc.w2v_path
    for name, path, remedy in (
        ("w2v_path", w2v_path, "check the path, or pre-train first"),
        ("init_from", run.init_from, "check the path"),
        ("resume_from", run.resume_from, "check the path"),
    ):
        if path and not run.resume and not _exists(path):
            raise ConfigError(f"--{name} {path}: no such file or folder; {remedy}")
    if config.mode == "finetune" and not (w2v_path or run.resume or run.resume_from):
        raise ConfigError("--w2v_path: is missing; name the checkpoint to fine-tune")
    for name in ("init_from", "w2v_path"):
        if run.resume_from and (run.init_from if name == "init_from" else w2v_path):
            raise ConfigError(f"--{name} --resume_from: only one of them can be used; drop one")


def _check_effects(config: Config, explicit: Collection[str]) -> None:
    mask, save = config.mask, (config.run.save, "without --no_save")
    channels, width = config.model.conv_layers()[-1][0], config.model.encoder_embed_dim
    fresh = not (config.run.init_from or config.run.resume_from)
    needs = [
        *((name, fresh, "without --init_from and --resume_from, whose file says it") for name in _ARCHITECTURE),
        ("feature_projection", channels == width, "where --encoder_embed_dim is the width of the last conv block"),
        ("encoder_layers", not config.model.hourglass_transformer, "without --hourglass_transformer"),
        ("hourglass_resample", bool(config.model.hourglass_transformer), "with --hourglass_transformer"),
        *((name, *save) for name in ("save_frequency", "save_interval_updates", "save_interval_minutes")),
        ("keep_milestones", *save),
        ("on_nan", config.run.save or config.health.on_nan != "rollback", "without --no_save: it needs a checkpoint"),
        ("auto_batch", config.run.probe_memory, "without --no_probe_memory"),
        ("auto_batch", config.run.parallel != "fsdp", "without --parallel fsdp, where no batch is tried"),
        ("auto_batch", not config.shards.streaming, "without --streaming: a stream does not tell its largest batch"),
        ("blank_mode", config.ctc.blank_weight != 0, "with --blank_weight"),
        ("bucket_cap_mb", config.run.parallel == "ddp", "with --parallel ddp"),
        *((name, config.health.health != "off", "without --health off") for name in _RULES),
        ("min_code_share", config.model.quantize_targets, "with a quantizer"),
        ("max_overflows", config.precision.fp16, "with --fp16"),
        ("num_warmup_epochs", config.run.num_epochs > config.run.num_warmup_epochs, "with a larger --num_epochs"),
    ]
    for kind, spans in (("mask", mask.of_time()), ("mask_channel", mask.of_channels())):
        drawn = (spans["prob"] > 0, f"with --{kind}_prob above 0")
        names = [f"{kind}_{part}" for part in ("length", "selection", "other", "min_space")]
        needs += [(name, *drawn) for name in (*names, f"no_{kind}_overlap")]
        two_numbers = spans["selection"] in ("uniform", "normal")
        needs.append((f"{kind}_other", two_numbers, f"with --{kind}_selection uniform or normal"))
        needs.append((f"{kind}_min_space", spans["no_overlap"], f"with --no_{kind}_overlap"))
    for name, has_effect, condition in needs:
        if name in explicit and not has_effect:
            raise ConfigError(f"--{name}: has an effect only {condition}; drop it")


def check_inference_config(config: InferenceConfig, explicit: Collection[str]) -> None:
    """The same for inference. Raises ConfigError."""
    if config.fp16 and config.bf16:
        raise ConfigError("--fp16 --bf16: only one of them can be used; drop one")
    inputs = {
        "valid_subset": config.valid_subset,
        "transcribe_wav": config.transcribe_wav,
        "transcribe_filelist": config.transcribe_filelist,
    }
    given = [f"--{name}" for name, value in inputs.items() if value]
    if len(given) != 1:
        raise ConfigError(
            f"{' '.join(given) or '--valid_subset'}: give exactly one of --valid_subset (to score it), "
            "--transcribe_wav and --transcribe_filelist"
        )
    remedies = {"transcribe_wav": "check the path", "dictionary": "fairseq's is dict.ltr.txt"}
    for name, remedy in remedies.items():
        path = getattr(config, name)
        if path and not _is_file(path):
            raise ConfigError(f"--{name} {path}: no such file; {remedy}")
    if not _exists(config.w2v_path):
        raise ConfigError(f"--w2v_path {config.w2v_path}: no such file; fine-tune a model first")
    if config.save_logits and config.save_logits == config.save_predictions:
        raise ConfigError(f"--save_logits {config.save_logits}: is the file of --save_predictions; name another one")
    if config.valid_subset and not Path(config.data).is_dir():
        raise ConfigError(f"--data {config.data}: no such folder; it holds the file list of --valid_subset")
    if not (config.batch_size or config.max_tokens):
        raise ConfigError("--batch_size 0 --max_tokens 0: all speech would be one batch; limit one of them")
    for name in ("data", "labels"):
        if name in explicit and not config.valid_subset:
            raise ConfigError(f"--{name}: has an effect only with --valid_subset; drop it")


def _exists(path: str) -> bool:
    """Whether there is such a file or folder."""
    return _is_file(path) or os.path.isdir(path)  # noqa: PTH112 - Path.is_dir() raises for names that are too long


def _is_file(path: str) -> bool:
    """Whether there is such a file; also False where the system refuses to say, as for a name that is too long."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False
