"""Checkpoints of fairseq and NVIDIA as those programs make them: their modules' parameters, their Adam, their settings.

Nothing here comes from this toolkit's writers, so that what these files hold is known from somewhere else.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hostile_files import Call, Named
from torch import Tensor, nn

CHANNELS, DIM, FFN, POS, GROUPS, LATENT_VARS, LATENT_GROUPS = 6, 8, 10, 4, 2, 5, 2
CONV = "[(6,10,5),(6,3,2)]"
TRUNK = "w2v_encoder.w2v_model."
HEADS = ("quantizer.", "project_q.", "final_proj.")
BETAS = (0.9, 0.98)
MOMENTS = ("exp_avg", "exp_avg_sq")
SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>", "|", "E", "Ä")


# ---- The modules: parameters in the originals' order, and nothing that computes -------------------------------------


def _module(**parts: nn.Module | nn.Parameter) -> nn.Module:
    """A module with these attributes, in this order."""
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def _conv_block(index: int, layer_norm: bool) -> nn.Sequential:
    conv = nn.Conv1d(CHANNELS if index else 1, CHANNELS, (10, 3)[index], bias=layer_norm)
    if layer_norm:
        norms = [nn.Sequential(nn.Identity(), nn.LayerNorm(CHANNELS), nn.Identity())]
    else:
        norms = [] if index else [nn.GroupNorm(CHANNELS, CHANNELS)]
    return nn.Sequential(conv, nn.Dropout(), *norms, nn.GELU())


def _layer(stacked: bool) -> nn.Module:
    inputs = {"qkv": 3} if stacked else {"k_proj": 1, "v_proj": 1, "q_proj": 1}
    projections = {name: nn.Linear(DIM, times * DIM) for name, times in inputs.items()}
    return _module(
        self_attn=_module(**projections, out_proj=nn.Linear(DIM, DIM)),
        self_attn_layer_norm=nn.LayerNorm(DIM),
        fc1=nn.Linear(DIM, FFN),
        fc2=nn.Linear(FFN, DIM),
        final_layer_norm=nn.LayerNorm(DIM),
    )


def _encoder(stacked: bool, hourglass: tuple[int, int, int, int] | None, linear: bool) -> nn.Module:
    with warnings.catch_warnings():  # this old weight norm is the one that names and orders parameters as they do
        warnings.simplefilter("ignore")
        conv = torch.nn.utils.weight_norm(nn.Conv1d(DIM, DIM, POS, groups=GROUPS), dim=2)
    before, middle, factor, after = hourglass or (2, 0, 1, 0)
    stacks = {"layers": before, **({"hourglass_layers": middle, "post_layers": after} if hourglass else {})}
    parts = {name: nn.ModuleList(_layer(stacked) for _ in range(number)) for name, number in stacks.items()}
    if linear:
        parts["upsample_layer"] = _module(linear=nn.Linear(DIM, factor * DIM))
        parts["downsample_layer"] = _module(linear=nn.Linear(factor * DIM, DIM))
    return _module(pos_conv=nn.Sequential(conv), **parts, layer_norm=nn.LayerNorm(DIM))


def skeleton(
    *,
    stacked: bool = False,
    hourglass: tuple[int, int, int, int] | None = None,
    linear: bool = False,
    layer_norm: bool = False,
    final_dim: int = 6,
    quantizer: bool = True,
    heads: bool = True,
    ctc: bool = False,
) -> nn.Module:
    """The model of fairseq (or, stacked, of NVIDIA) with random weights; `ctc` is the fine-tuned one around it."""
    torch.manual_seed(7)
    book = nn.Parameter(torch.rand(1, LATENT_GROUPS * LATENT_VARS, final_dim // LATENT_GROUPS))
    codes = _module(vars=book, weight_proj=nn.Linear(CHANNELS, LATENT_GROUPS * LATENT_VARS))
    model = _module(
        mask_emb=nn.Parameter(torch.rand(DIM)),
        feature_extractor=_module(conv_layers=nn.ModuleList(_conv_block(i, layer_norm) for i in range(2))),
        post_extract_proj=nn.Linear(CHANNELS, DIM),
        **({"quantizer": codes} if heads and quantizer else {}),
        **({"project_q": nn.Linear(final_dim if quantizer else CHANNELS, final_dim)} if heads else {}),
        encoder=_encoder(stacked, hourglass, linear),
        layer_norm=nn.LayerNorm(CHANNELS),
        **({"final_proj": nn.Linear(DIM, final_dim)} if heads else {}),
    )
    if ctc:
        model = _module(w2v_encoder=_module(w2v_model=model, proj=nn.Linear(DIM, len(SYMBOLS))))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms and biases, too
    return model


def split(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of files, in which a stacked matrix is three views of one storage."""
    found = {}
    for name, tensor in named.items():
        start, is_stacked, kind = name.partition("self_attn.qkv.")
        parts = [f"{start}self_attn.{letter}_proj.{kind}" for letter in "qkv"] if is_stacked else [name]
        found.update(zip(parts, tensor.detach().chunk(len(parts)), strict=True))
    return found


def native(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same by this toolkit's names; queries, keys and values are one matrix there."""
    left, found = split(named), {}
    while left:
        name = next(iter(left))
        start, is_projection, rest = name.partition("self_attn.")
        if is_projection and not rest.startswith("out_proj"):
            kind = rest.rpartition(".")[2]
            tensor = torch.cat([left.pop(f"{start}self_attn.{letter}_proj.{kind}") for letter in "qkv"])
            name = f"{start}self_attn.qkv_proj.{kind}"
        else:
            tensor = left.pop(name)
        for theirs, ours in (
            *((f"conv_layers.{i}.0.", f"blocks.{i}.conv.") for i in range(2)),
            *((f"conv_layers.{i}.2.1.", f"blocks.{i}.norm.") for i in range(2)),
            *((f"conv_layers.{i}.2.", f"blocks.{i}.norm.") for i in range(2)),
            *(("pos_conv.0.", "pos_conv."), ("sample_layer.", "sample.")),
            *((TRUNK, "w2v."), ("w2v_encoder.proj.", "proj.")),
        ):
            name = name.replace(theirs, ours)
        found[name] = tensor
    return found


# ---- Their optimizer ------------------------------------------------------------------------------------------------


def train(model: nn.Module, steps: int = 3, moves: Callable[[int, str], bool] = lambda step, name: True) -> Any:
    """Adam of torch after some updates with random gradients; `moves(update, name)` tells who has one."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=BETAS)
    generator = torch.Generator().manual_seed(11)
    for step in range(steps):
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient if moves(step, name) else None
        optimizer.step()
    return optimizer


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """exp_avg and exp_avg_sq by the names of the skeleton, zeros where there was never a gradient."""
    return {
        moment: {
            name: optimizer.state[parameter].get(moment, torch.zeros_like(parameter))
            for name, parameter in model.named_parameters()
        }
        for moment in MOMENTS
    }


def numbered(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state as fairseq's Adam keeps it: every entry counts its updates as a plain number."""
    found = copy.deepcopy(optimizer.state_dict())
    for entry in found["state"].values():
        entry["step"] = int(entry["step"])
    return found


def counted_by_the_group(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state as a fused Adam keeps it: the group counts the updates."""
    found = numbered(optimizer)
    counts = {entry.pop("step") for entry in found["state"].values()}
    found["param_groups"][0]["step"] = max(counts)
    return found


def flat(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """The state of a 16-bit run: one vector over all parameters, and the loss scale."""
    vectors = {
        moment: torch.cat([t.flatten() for t in by.values()]) for moment, by in moments(model, optimizer).items()
    }
    groups = [{"lr": 1e-3, "betas": BETAS, "eps": 1e-6, "weight_decay": 0.0, "params": [0]}]
    return {"state": {0: {"step": step, **vectors}}, "param_groups": groups, "loss_scale": 32.0}


# ---- Their settings -------------------------------------------------------------------------------------------------

ARCHITECTURE: dict[str, Any] = {
    "extractor_mode": "default",
    "conv_feature_layers": CONV,
    "conv_bias": False,
    "encoder_layers": 2,
    "encoder_embed_dim": DIM,
    "encoder_ffn_embed_dim": FFN,
    "encoder_attention_heads": 2,
    "layer_norm_first": False,
    "activation_fn": "gelu",
    "conv_pos": POS,
    "conv_pos_groups": GROUPS,
    "final_dim": 6,
    "latent_vars": LATENT_VARS,
    "latent_groups": LATENT_GROUPS,
    "latent_dim": 0,
    "quantize_targets": True,
    "quantize_input": False,
    "latent_temp": [2.0, 0.25, 0.999],
    "dropout": 0.15,
    "attention_dropout": 0.16,
    "encoder_layerdrop": 0.05,
    "feature_grad_mult": 0.125,
    "mask_prob": 0.65,
    "mask_length": 7,
    "mask_channel_prob": 0.0,
}
_RUN: dict[str, Any] = {
    "common": {"_name": None, "seed": 1, "fp16": False},
    "dataset": {"_name": None, "max_tokens": 1234567},
    "checkpoint": {"_name": None, "best_checkpoint_metric": "loss", "maximize_best_checkpoint_metric": False},
    "optimizer": {"_name": "adam", "adam_betas": "(0.9,0.97)", "adam_eps": 1e-06, "weight_decay": 0.01, "lr": [0.002]},
}
PRETRAINING: dict[str, Any] = {
    **_RUN,
    "optimization": {"_name": None, "max_update": 100, "lr": [0.002], "update_freq": [1], "clip_norm": 0.5},
    "model": {"_name": "wav2vec2", **ARCHITECTURE},
    "task": {"_name": "audio_pretraining", "data": "data", "sample_rate": 16000, "normalize": False, "labels": None},
    "criterion": {"_name": "wav2vec", "infonce": True, "loss_weights": [0.1, 10.0]},
    "lr_scheduler": {
        **{"_name": "polynomial_decay", "warmup_updates": 10, "force_anneal": None, "end_learning_rate": 0.0},
        **{"power": 1.0, "total_num_update": 100.0, "lr": [0.002]},
    },
}
FINETUNING: dict[str, Any] = {
    **_RUN,
    "optimization": {"_name": None, "max_update": 200, "lr": [0.0001], "update_freq": [4], "clip_norm": 0.0},
    "model": {
        **{
            "_name": "wav2vec_ctc",
            "w2v_path": "pretrain.pt",
            "apply_mask": True,
            "dropout": 0.0,
            "final_dropout": 0.02,
        },
        **{"attention_dropout": 0.0, "activation_dropout": 0.1, "layerdrop": 0.1, "feature_grad_mult": 0.0},
        **{"mask_prob": 0.5, "mask_length": 3, "mask_channel_prob": 0.25, "mask_channel_length": 4},
        **{"freeze_finetune_updates": 50, "normalize": "${task.normalize}", "data": "${task.data}"},
        "w2v_args": {
            "common": {"_name": None, "fp16": True},
            "optimization": {"_name": None, "max_update": 999, "lr": [0.9], "update_freq": [64]},
            "model": {"_name": "wav2vec2", **ARCHITECTURE},
            "task": {"_name": "audio_pretraining", "data": "data", "sample_rate": 16000, "normalize": False},
            "criterion": {"_name": "wav2vec", "infonce": True, "loss_weights": [0.1, 10.0]},
            "lr_scheduler": {"_name": "polynomial_decay", "warmup_updates": 77, "power": 3.0},
        },
    },
    "task": {"_name": "audio_finetuning", "data": "data", "sample_rate": 16000, "normalize": False, "labels": "ltr"},
    "criterion": {"_name": "ctc", "zero_infinity": True},
    "lr_scheduler": {
        **{"_name": "tri_stage", "warmup_steps": 0, "hold_steps": 0, "decay_steps": 0, "phase_ratio": [0.1, 0.4, 0.5]},
        **{"init_lr_scale": 0.01, "final_lr_scale": 0.05, "max_update": 200, "lr": [0.0001]},
    },
}
NVIDIA_ARGS: dict[str, Any] = {
    **ARCHITECTURE,
    **{"mode": "pretrain", "mha": "pyt", "hourglass_transformer": None, "hourglass_resample": "naive"},
    **{"fp16": False, "bf16": False, "amp": False, "optimizer": "adam", "ema": 0.0, "seed": 1, "apply_mask": False},
    **{"max_tokens": 1400000, "max_tokens_valid": 1300000, "num_concat_batches": 1, "update_freq": 1},
    **{"max_update": 100, "lr": 0.0005, "adam_betas": [0.9, 0.98], "adam_eps": 1e-06, "weight_decay": 0.01},
    **{"lr_policy": "poly", "warmup_updates": 10, "hold_updates": 0, "initial_lr_scale": 0.0, "final_lr_scale": 0.0},
    **{"lr_poly_power": 1.0, "lr_exp_decay": None, "clip_norm": 25.0, "loss_weights": [0.1, 10.0]},
    **{"require_same_masks": True, "mask_dropout": 0.0, "rotary_embeddings": False, "infonce": True},
}
ABSENT: Any = object()  # a patch that takes an option away


def patched(settings: Mapping[str, Any], patches: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with options replaced by their path ("task.normalize")."""
    found = copy.deepcopy(dict(settings))
    for path, value in patches.items():
        *sections, name = path.split(".")
        table = found
        for section in sections:
            table = table[section]
        if value is ABSENT:
            del table[name]
        else:
            table[name] = value
    return found


def omegaconf(value: Any) -> Any:
    """Settings as the containers of omegaconf that older versions pickled."""
    if isinstance(value, Mapping):
        content: Any = {name: omegaconf(entry) for name, entry in value.items()}
        return Call(Named("omegaconf.dictconfig", "DictConfig"), state={"_parent": None, "_content": content})
    if isinstance(value, list):
        content = [omegaconf(entry) for entry in value]
        return Call(Named("omegaconf.listconfig", "ListConfig"), state={"_parent": None, "_content": content})
    return Call(Named("omegaconf.nodes", "AnyNode"), state={"_metadata": None, "_parent": None, "_val": value})


def namespace(cfg: Mapping[str, Any]) -> argparse.Namespace:
    """Settings as the oldest versions pickled them: one flat table, where lists (but two) are text."""
    found: dict[str, Any] = {}
    for name in ("common", "dataset", "checkpoint", "optimizer", "optimization", "criterion", "lr_scheduler", "task"):
        section = {} if cfg.get(name) is None else dict(cfg.get(name, {}))
        kind = section.pop("_name", None)
        found |= section | ({} if kind is None else {name: kind})
    model = {name: value for name, value in cfg["model"].items() if not str(value).startswith("${")}
    found |= {"arch": model.pop("_name"), **model}
    if "w2v_args" in found:
        found["w2v_args"] = namespace(found["w2v_args"])
    is_text = [name for name, value in found.items() if isinstance(value, list) and name not in ("lr", "update_freq")]
    return argparse.Namespace(**{**found, **{name: str(found[name]) for name in is_text}})


def fairseq_file(model: nn.Module, cfg: Mapping[str, Any], generation: str = "dict", **more: Any) -> dict[str, Any]:
    """A checkpoint of fairseq; the generation says how it holds its settings."""
    settings = {
        "dict": lambda: {"args": None, "cfg": dict(cfg)},
        "omegaconf": lambda: {"args": None, "cfg": omegaconf(cfg)},
        "namespace": lambda: {"args": namespace(cfg)},
    }[generation]()
    history = {"criterion_name": "Wav2vecCriterion", "optimizer_name": "FairseqAdam", "num_updates": 3}
    return {
        **settings,
        "model": split(dict(model.named_parameters())),
        "criterion": None,
        "optimizer_history": [{**history, "lr_scheduler_state": {"best": None}}],
        "task_state": {},
        "extra_state": {
            "train_iterator": {"version": 2, "epoch": 2, "iterations_in_epoch": 5, "shuffle": True},
            "best": 12.5,
        },
        **more,
    }


def nvidia_file(model: nn.Module, args: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A checkpoint of NVIDIA's."""
    progress = {"step": 3, "epoch": 4, "best_val_loss": 1.25, "best_val_wer": float("inf")}
    return {
        "args": dict(args),
        "model": split(dict(model.named_parameters())),
        "ema_model": None,
        "optimizer": None,
        "scaler": {},
        "train_state": {**progress, "optimizer_type": "FusedAdamV2", "scaler_type": "GradScaler"},
        **more,
    }


def dictionary() -> Call:
    """The pickled Dictionary of a fine-tuning task."""
    state = {
        "symbols": list(SYMBOLS),
        "count": [1] * len(SYMBOLS),
        "indices": {symbol: i for i, symbol in enumerate(SYMBOLS)},
        **{"bos_word": "<s>", "unk_word": "<unk>", "pad_word": "<pad>", "eos_word": "</s>"},
        **{"bos_index": 0, "pad_index": 1, "eos_index": 2, "unk_index": 3, "nspecial": 4},
    }
    return Call(Named("fairseq.data.dictionary", "Dictionary"), state=state)
