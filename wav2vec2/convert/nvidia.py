"""Checkpoints of NVIDIA DeepLearningExamples <-> Contents: one flat table of options, the names of fairseq."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import flags, torch_file
from common.errors import CheckpointError, shown
from common.labels import SPECIAL_SYMBOLS, Dictionary
from wav2vec2.config import Config
from wav2vec2.convert import adam_state, original
from wav2vec2.convert.contents import Contents, symbols_of
from wav2vec2.convert.names import optimizer_groups, original_names, original_order
from wav2vec2.convert.options import from_config, schedule
from wav2vec2.convert.stand_ins import count_in, number_in, plain, table_in


def recognises(content: Any) -> bool:
    """Whether torch_file.read() gave a checkpoint of NVIDIA's."""
    args = content.get("args") if isinstance(content, Mapping) else None
    return isinstance(args, Mapping) and "mode" in args and "model" in content


def to_contents(path: str | Path, content: Mapping[str, Any]) -> Contents:
    """What a file says. Raises CheckpointError naming it."""
    where = str(path)
    args = plain(where, content["args"])
    mode = args["mode"]
    if mode not in flags.MODES:
        raise CheckpointError(f"{where}: has the mode {shown(mode)}; this toolkit has {' and '.join(flags.MODES)}")
    progress = table_in(content, "train_state")
    contents = original.read(
        where,
        "nvidia",
        mode,
        args,
        weights=content["model"],
        averaged=table_in(content, "ema_model"),
        optimizer=table_in(content, "optimizer"),
        position=progress,
        stacked=args.get("mha") != "fairseq",
    )
    return replace(
        contents,
        labels=_labels(where, content.get("output_labels"), contents.num_symbols),
        step=count_in(progress, "step"),
        best=number_in(progress, "best_val_wer" if mode == "finetune" else "best_val_loss"),
    )


def to_content(contents: Contents) -> dict[str, Any]:
    """A checkpoint in NVIDIA's layout, as plain data. Raises CheckpointError for what its models do not have."""
    config = contents.config
    original.refuse_projection("nvidia", contents)
    table = original_names(config.model)
    weights = table.to_foreign(contents.weights)
    order, half = original_order(weights), config.precision.o2
    content: dict[str, Any] = {
        "args": _args(config),
        "model": {name: weights[name] for name in order},
        "ema_model": table.to_foreign({**contents.weights, **contents.averaged}) if contents.averaged else None,
        "scaler": {},
        "train_state": {
            "step": contents.step or 0,
            "epoch": contents.epoch or 1,
            "best_val_loss": _best(contents, "pretrain"),
            "best_val_wer": _best(contents, "finetune"),
            "optimizer_type": None if not contents.optimizer else "FP16Optimizer" if half else "FusedAdamV2",
            "scaler_type": None,
        },
    }
    if contents.optimizer:
        content["optimizer"] = adam_state.write(contents, optimizer_groups(order, stacked=True), table, flat=half)
    if config.mode == "finetune":
        if contents.labels is None:
            raise CheckpointError(
                "--to nvidia: its fine-tuned files hold the symbols of the output layer, which this one lacks; "
                "name their file with --dictionary"
            )
        content["output_labels"] = "".join(f"{line}\n" for line in Dictionary(contents.labels).lines())
    return content


def write(path: Path, contents: Contents) -> None:
    """Write a file in NVIDIA's layout."""
    torch_file.write(path, to_content(contents))


def _labels(where: str, text: Any, num_symbols: int) -> tuple[str, ...] | None:
    """The symbols in the text of a label file (`symbol count` per line), the special ones first."""
    if not num_symbols or not isinstance(text, str):
        return None
    symbols = (*SPECIAL_SYMBOLS, *(line.rsplit(" ", 1)[0] for line in text.splitlines() if line.strip()))
    return symbols_of(where, symbols, num_symbols)


def _best(contents: Contents, mode: str) -> float:
    return contents.best if contents.best is not None and contents.config.mode == mode else float("inf")


def _args(config: Config) -> dict[str, Any]:
    """All options that NVIDIA's programs look for in a file."""
    data, curve = config.data, schedule(config)
    args = {
        **_FIXED_ARGS,
        **from_config(config),
        "mode": config.mode,
        "sample_rate": config.model.sample_rate,
        "max_tokens_valid": data.max_tokens_valid or data.max_tokens,
        "max_sample_size": data.max_sample_size or None,
        "min_sample_size": data.min_sample_size or None,
        "seed": config.run.seed,
        "hold_updates": curve.get("hold_updates", 0),
        "initial_lr_scale": curve.get("initial_lr_scale", 0.0),
        "final_lr_scale": curve.get("final_lr_scale", 0.0),
        "lr_poly_power": curve.get("power", 1.0),
    }
    args.pop("feature_projection")
    return args


_FIXED_ARGS: dict[str, Any] = {
    "activation_fn": "gelu",
    "quantize_input": False,
    "target_glu": False,
    "quantizer_depth": 1,
    "quantizer_factor": 3,
    "infonce": True,
    "log_keys": ["prob_perplexity", "code_perplexity", "temp"],
    "use_spectrogram_features": False,
    "rotary_embeddings": False,
    "spectrogram_feature_stacking": 1,
    "spectrogram_feature_subsampling": 1,
    "spectrogram_window_size": 0.02,
    "spectrogram_window_stride": 0.01,
    "spectrogram_n_filt": 80,
    "mha": "pyt",  # as in all its recipes: the optimizer sees q, k and v as one parameter
    "required_seq_len_multiple": 2,
    "require_same_masks": True,
    "mask_dropout": 0.0,
    "mask_channel_before": False,
    "fp32_transformer_layernorm": False,
    "fp32_mha_softmax": False,
    "fp32_cosine_sim": False,
    "fp32_pos_conv": False,
    "fp32_conv_norms": False,
    "bf16_disable_loss_scaler": False,
    "min_loss_scale": 0.0001,
    "fp16_init_scale": 128,
    "optimizer": "adam",
    "batch_size": None,
    "batch_size_valid": None,
    "num_batch_buckets": 0,
    "num_workers": 6,
    "skip_invalid_size_inputs_valid_test": True,
    "train_subset": "train",
    "valid_subset": "valid",
    "labels": "ltr",
    "data": "data",
    "w2v_path": "",
    "output_dir": "results",
    "log_file": None,
    "log_frequency": 1,
    "epochs_this_job": 0,
    "benchmark_epochs_num": 3,
    "save_frequency": 1,
    "keep_milestones": [100, 200, 300, 400],
    "no_save": False,
    "resume": True,
    "ckpt": None,
    "cpu": False,
    "cudnn_benchmark": False,
    "local_rank": 0,
    "world_size": 1,
}
