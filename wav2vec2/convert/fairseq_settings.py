"""The settings (`cfg`) that fairseq's own programs look for in a checkpoint."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

from wav2vec2.config import Config
from wav2vec2.convert.options import from_config, schedule

_MASK_OPTIONS = (
    *("mask_length", "mask_prob", "mask_selection", "mask_other", "no_mask_overlap", "mask_min_space"),
    *("mask_channel_length", "mask_channel_prob", "mask_channel_selection", "mask_channel_other"),
    *("no_mask_channel_overlap", "mask_channel_min_space"),
)
_TRUNK_OPTIONS = (
    *("extractor_mode", "encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads"),
    *("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "dropout_input", "dropout_features"),
    *("final_dim", "layer_norm_first", "conv_feature_layers", "conv_bias", "logit_temp", "quantize_targets"),
    *("feature_grad_mult", "latent_vars", "latent_groups", "latent_dim", "latent_temp", "num_negatives"),
    *("negatives_from_everywhere", "cross_sample_negatives", "codebook_negatives", "conv_pos", "conv_pos_groups"),
    *_MASK_OPTIONS,
)
_CTC_OPTIONS = (
    *("dropout_input", "final_dropout", "dropout", "attention_dropout", "activation_dropout", "feature_grad_mult"),
    *("freeze_finetune_updates", "blank_weight", "blank_mode", "apply_mask"),
    *_MASK_OPTIONS,
)
_FIXED_IN_TRUNK = {
    "activation_fn": "gelu",
    "layer_type": "transformer",
    "quantize_input": False,
    "same_quantizer": False,
    "target_glu": False,
    "quantizer_depth": 1,
    "quantizer_factor": 3,
    "pos_conv_depth": 1,
    "require_same_masks": True,
    "mask_dropout": 0.0,
    "mask_channel_before": False,
    "required_seq_len_multiple": 2,
    "crop_seq_to_multiple": 1,
}
# Its tasks read these without a default of their own.
_FIXED_IN_TASK = {
    "tpu": False,
    "multi_corpus_keys": None,
    "multi_corpus_sampling_weights": None,
    "binarized_dataset": False,
    "num_batch_buckets": 0,
    "text_compression_level": "none",
    "rebuild_batches": True,
    "precompute_mask_config": None,
    "post_save_script": None,
    "subsample": 1.0,
}


def settings(config: Config, data: str) -> dict[str, Any]:
    """All sections as nested plain dicts; `data` is the folder with the dictionary."""
    options = from_config(config)
    task = {
        "data": data,
        "sample_rate": config.model.sample_rate,
        "normalize": config.model.normalize,
        "enable_padding": config.data.enable_padding,
        "max_sample_size": config.data.max_sample_size or None,
        "min_sample_size": config.data.min_sample_size or None,
        "seed": config.run.seed,
        **_FIXED_IN_TASK,
    }
    pretraining = {"_name": "audio_pretraining", "labels": None, **task}
    trunk = {"_name": "wav2vec2", **_FIXED_IN_TRUNK, **{name: options[name] for name in _TRUNK_OPTIONS}}
    cfg = _of_the_run(config)
    if config.mode == "pretrain":
        criterion = {"_name": "wav2vec", "infonce": True, "loss_weights": options["loss_weights"]}
        return {**cfg, "model": trunk, "task": pretraining, "criterion": criterion}
    model = {
        "_name": "wav2vec_ctc",
        "w2v_path": "",
        **{name: options[name] for name in _CTC_OPTIONS},
        "layerdrop": options["encoder_layerdrop"],
        "normalize": config.model.normalize,
        "data": data,
        "w2v_args": {**cfg, "model": trunk, "task": pretraining, "criterion": None, "lr_scheduler": None},
    }
    finetuning = {"_name": "audio_finetuning", "labels": "ltr", **task}
    return {**cfg, "model": model, "task": finetuning, "criterion": {"_name": "ctc", "zero_infinity": True}}


def _of_the_run(config: Config) -> dict[str, Any]:
    """Precision, batches, optimizer and learning rate."""
    optim, options = config.optim, from_config(config)
    metric = "loss" if config.mode == "pretrain" else "wer"
    return {
        "_name": None,
        "common": {
            "_name": None,
            "seed": config.run.seed,
            **{name: options[name] for name in ("fp16", "bf16", "amp")},
            "tpu": False,
        },
        "distributed_training": {"_name": None, "ddp_backend": "pytorch_ddp"},
        "dataset": {
            "_name": None,
            "max_tokens": config.data.max_tokens,
            "required_batch_size_multiple": config.data.required_batch_size_multiple,
        },
        "optimization": {
            "_name": None,
            "max_update": optim.max_update,
            "clip_norm": optim.clip_norm,
            "sentence_avg": config.mode == "finetune",
            "update_freq": [config.data.update_freq * config.data.num_concat_batches],  # it joins none
            "lr": [optim.lr],
        },
        "checkpoint": {
            "_name": None,
            "best_checkpoint_metric": metric,
            "maximize_best_checkpoint_metric": False,
        },
        "optimizer": {
            "_name": "adam",
            "adam_betas": f"({optim.adam_betas[0]},{optim.adam_betas[1]})",
            "adam_eps": optim.adam_eps,
            "weight_decay": optim.weight_decay,
            "lr": [optim.lr],
        },
        "lr_scheduler": lr_scheduler(config),
    }


def lr_scheduler(config: Config) -> dict[str, Any] | None:
    """fairseq's polynomial_decay and tri_stage; None for curves that it does not have."""
    optim, curve = config.optim, schedule(config)
    if optim.lr_policy == "poly" and not curve["hold_updates"] and not curve["initial_lr_scale"]:
        return {
            "_name": "polynomial_decay",
            "warmup_updates": optim.warmup_updates,
            "force_anneal": None,
            "end_learning_rate": curve["final_lr_scale"] * optim.lr,
            "power": curve["power"],
            "total_num_update": float(optim.max_update),
            "lr": [optim.lr],
        }
    if optim.lr_policy == "exp" and curve["lr_exp_decay"] is None:
        held = optim.warmup_updates + curve["hold_updates"]
        return {
            "_name": "tri_stage",
            "warmup_steps": optim.warmup_updates,
            "hold_steps": curve["hold_updates"],
            "decay_steps": optim.max_update - held,
            "phase_ratio": None,
            "init_lr_scale": curve["initial_lr_scale"],
            "final_lr_scale": curve["final_lr_scale"],
            "max_update": optim.max_update,
            "lr": [optim.lr],
        }
    return None
