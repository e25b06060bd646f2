"""Files of fairseq and NVIDIA, made by hand from those programs' layouts: optimizer states, settings, symbols."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import hostile_files
import numpy as np
import originals
import pytest
import torch
from hostile_files import Call, Named
from originals import (
    ABSENT,
    FINETUNING,
    HEADS,
    MOMENTS,
    NVIDIA_ARGS,
    PRETRAINING,
    SYMBOLS,
    TRUNK,
    fairseq_file,
    nvidia_file,
    patched,
    skeleton,
)
from torch import Tensor, nn

from common.errors import CheckpointError
from wav2vec2.config import Config, ModelConfig, OptimConfig, PrecisionConfig
from wav2vec2.convert import fairseq, nvidia
from wav2vec2.convert.contents import Contents
from wav2vec2.convert.load_any import load_any
from wav2vec2.convert.names import optimizer_groups, original_order

FOLD = {"linear": True, "hourglass": (1, 2, 3, 1)}  # layers before, in the middle, factor, after
CONV_LAYERS = {"extractor_mode": "layer_norm", "conv_bias": True}
FINETUNED_ARGS = {**NVIDIA_ARGS, "mode": "finetune", "apply_mask": True, "freeze_finetune_updates": 2}


def read(tmp_path: Path, content: Mapping[str, Any], *, old: bool = False) -> Contents:
    hostile_files.save(content, tmp_path / "original.pt", old=old)
    return load_any(tmp_path / "original.pt")


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=0, msg=name)


def has_moments(contents: Contents, expected: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    """All moments by this toolkit's names, and one count."""
    assert contents.optimizer is not None
    for moment in MOMENTS:
        same({name: entry[moment] for name, entry in contents.optimizer.items()}, originals.native(expected[moment]))
    assert {entry["step"] for entry in contents.optimizer.values()} == {step}


# ---- The order of the optimizer -------------------------------------------------------------------------------------

MODELS = {
    "plain": {},
    "layer norm": {"layer_norm": True},
    "stacked": {"stacked": True},
    "hourglass": {"hourglass": (1, 2, 3, 1)},
    "hourglass, linear": FOLD,
    "hourglass, stacked": {**FOLD, "stacked": True},
    "ctc": {"ctc": True, "heads": False},
    "ctc, stacked": {"ctc": True, "heads": False, "stacked": True},
    "ctc with idle heads": {"ctc": True},
    "no quantizer": {"quantizer": False},
    "twelve layers": {"hourglass": (12, 1, 2, 1)},
}


@pytest.mark.parametrize("case", MODELS)
def test_the_order_of_the_optimizer_is_that_of_the_modules(case):
    parameters = dict(skeleton(**MODELS[case]).named_parameters())
    expected = [list(originals.split({name: tensor})) for name, tensor in parameters.items()]
    names = [name for group in expected for name in group]
    for seed in range(5):
        random.Random(seed).shuffle(names)
        assert optimizer_groups(names, stacked="stacked" in case) == expected
    if "stacked" not in case:
        assert original_order(names) == list(parameters)


# ---- Optimizer states that torch's Adam made ------------------------------------------------------------------------


def made(program: str, model: nn.Module, state: Mapping[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """A file of a program around a model; the settings are NVIDIA's, or by section fairseq's."""
    ctc = any(name.startswith(TRUNK) for name, _ in model.named_parameters())
    if program == "fairseq":
        cfg = patched(FINETUNING if ctc else PRETRAINING, settings)
        return fairseq_file(model, cfg, last_optimizer_state=state)
    return nvidia_file(model, {**(FINETUNED_ARGS if ctc else NVIDIA_ARGS), **settings}, optimizer=state)


PROGRAMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fairseq": ({}, {}),
    "nvidia": ({"stacked": True}, {"mha": "pyt"}),
    "nvidia, apart": ({}, {"mha": "fairseq"}),
}


@pytest.mark.parametrize("ctc", [False, True], ids=["pretrain", "ctc"])
@pytest.mark.parametrize("layout", ["numbered", "tensor", "group", "flat"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_moments_are_read_by_parameter(tmp_path, program, layout, ctc):
    shape, settings = PROGRAMS[program]
    model = skeleton(**shape, ctc=ctc, heads=not ctc)
    optimizer = originals.train(model)
    state = {
        "numbered": lambda: originals.numbered(optimizer),
        "tensor": optimizer.state_dict,  # torch counts updates in tensors
        "group": lambda: originals.counted_by_the_group(optimizer),
        "flat": lambda: originals.flat(model, optimizer, 3),
    }[layout]()
    contents = read(tmp_path, made(program.partition(",")[0], model, state, **settings))
    same(contents.weights, originals.native(dict(model.named_parameters())))
    has_moments(contents, originals.moments(model, optimizer), 3)
    assert (contents.scaler or {}).get("scale") == (32.0 if layout == "flat" else None)
    assert (contents.source, contents.step, contents.remarks) == (program.partition(",")[0], 3, ())
    assert contents.epoch == {"fairseq": 2, "nvidia": 4}[contents.source]


@pytest.mark.parametrize(("shape", "settings"), [({}, {"mha": "fairseq"}), ({"stacked": True}, {"mha": "pyt"})])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("layout", ["numbered", "flat"])
def test_moments_of_an_hourglass(tmp_path, shape, settings, linear, layout):
    model = skeleton(**shape, **{**FOLD, "linear": linear})
    optimizer = originals.train(model)
    state = originals.flat(model, optimizer, 3) if layout == "flat" else originals.counted_by_the_group(optimizer)
    fold = {"hourglass_transformer": "[1,(2,3),1]", "hourglass_resample": "linear" if linear else "naive"}
    contents = read(tmp_path, made("nvidia", model, state, **settings, **fold))
    assert contents.config.model.hourglass() == (1, 2, 3, 1)
    same(contents.weights, originals.native(dict(model.named_parameters())))
    has_moments(contents, originals.moments(model, optimizer), 3)


def test_moments_of_a_model_with_layer_norms(tmp_path):
    model = skeleton(layer_norm=True)
    optimizer = originals.train(model)
    settings = {f"model.{name}": value for name, value in CONV_LAYERS.items()}
    contents = read(tmp_path, made("fairseq", model, originals.numbered(optimizer), **settings))
    has_moments(contents, originals.moments(model, optimizer), 3)


def test_layers_that_sat_out_updates_take_the_highest_count(tmp_path):
    model = skeleton()
    optimizer = originals.train(model, 4, lambda step, name: not name.startswith(f"encoder.layers.{step}."))
    contents = read(tmp_path, made("fairseq", model, originals.numbered(optimizer)))
    has_moments(contents, originals.moments(model, optimizer), 4)
    [remark] = contents.remarks
    assert "3 to 4 updates" in remark


def test_parameters_without_an_entry_have_zeros(tmp_path):
    model = skeleton()
    optimizer = originals.train(model, moves=lambda step, name: name not in ("mask_emb", "final_proj.bias"))
    state = originals.numbered(optimizer)
    names = [name for name, _ in model.named_parameters()]
    assert set(range(len(names))) - set(state["state"]) == {names.index("mask_emb"), names.index("final_proj.bias")}
    contents = read(tmp_path, made("fairseq", model, state))
    has_moments(contents, originals.moments(model, optimizer), 3)
    assert contents.optimizer is not None
    assert not contents.optimizer["mask_emb"]["exp_avg"].any()
    assert contents.optimizer["mask_emb"]["exp_avg"].shape == (originals.DIM,)


@pytest.mark.parametrize("program", ["fairseq", "nvidia"])
def test_an_output_layer_that_trained_alone_at_first_has_its_own_count(tmp_path, program):
    shape, settings = PROGRAMS[program]
    model = skeleton(**shape, ctc=True, heads=False)
    optimizer = originals.train(model, 5, lambda step, name: step >= 2 or ".proj." in name)
    contents = read(tmp_path, made(program, model, originals.numbered(optimizer), **settings))
    assert contents.optimizer is not None
    assert {name: e["step"] for name, e in contents.optimizer.items() if e["step"] != 3} == {
        "proj.weight": 5,
        "proj.bias": 5,
    }
    for moment, expected in originals.moments(model, optimizer).items():
        same({name: entry[moment] for name, entry in contents.optimizer.items()}, originals.native(expected))
    assert contents.remarks == ()


def test_moments_in_16_bits_are_multiplied_by_their_scale(tmp_path):
    model = skeleton()
    optimizer = originals.train(model)
    state = originals.numbered(optimizer)
    expected: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
    for number, (name, _) in enumerate(model.named_parameters()):
        for moment in MOMENTS:
            value = state["state"][number][moment]
            scale = 1e-8 + value.abs().max().item() / torch.finfo(torch.float16).max
            half = (value / scale).half()
            state["state"][number] |= {moment: half, f"{moment}_scale": scale}
            expected[moment][name] = half.float() * scale
            torch.testing.assert_close(expected[moment][name], value, rtol=1e-2, atol=1e-6)
    has_moments(read(tmp_path, made("fairseq", model, state)), expected, 3)


@pytest.mark.parametrize("layout", ["gaps", "zeros", "flat"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_fine_tuned_file_may_hold_the_heads_of_pretraining(tmp_path, program, layout):
    """They are parameters of the optimizer, too, of which it has no moments, or zeros."""
    shape, settings = PROGRAMS[program]
    model = skeleton(**shape, ctc=True)
    idle = {name for name, _ in model.named_parameters() if name.removeprefix(TRUNK).startswith(HEADS)}
    optimizer = originals.train(model, moves=lambda step, name: name not in idle)
    state = originals.flat(model, optimizer, 3) if layout == "flat" else originals.numbered(optimizer)
    assert len(idle) == 7
    if layout == "zeros":
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if name in idle:
                state["state"][number] = {"step": 3, **{moment: torch.zeros_like(parameter) for moment in MOMENTS}}
    contents = read(tmp_path, made(program.partition(",")[0], model, state, **settings))
    kept = {name: tensor for name, tensor in model.named_parameters() if name not in idle}
    same(contents.weights, originals.native(kept))
    by_name = originals.moments(model, optimizer)
    has_moments(contents, {moment: {name: by_name[moment][name] for name in kept} for moment in MOMENTS}, 3)
    [remark] = contents.remarks
    assert all(name in remark for name in idle)


@pytest.mark.parametrize("program", ["fairseq", "nvidia"])
@pytest.mark.parametrize("change", ["one more", "another shape", "no step", "no moment"])
def test_the_optimizer_of_another_model_is_refused(tmp_path, program, change):
    shape, settings = PROGRAMS[program]
    model = skeleton(**shape)
    state = originals.numbered(originals.train(model))
    entries = state["state"]
    if change == "one more":
        entries[len(entries)] = entries[0]
    elif change == "another shape":
        entries[1]["exp_avg"] = torch.zeros(3)
    else:
        del entries[2]["step" if change == "no step" else "exp_avg_sq"]
    with pytest.raises(CheckpointError, match="its optimizer state cannot be used"):
        read(tmp_path, made(program, model, state, **settings))


# ---- Optimizer states that the originals are given ------------------------------------------------------------------

ARCHITECTURE = ModelConfig(
    conv_feature_layers=originals.CONV,
    encoder_layers=2,
    encoder_embed_dim=8,
    encoder_ffn_embed_dim=10,
    encoder_attention_heads=2,
    conv_pos=4,
    conv_pos_groups=2,
    final_dim=6,
    latent_vars=5,
    latent_groups=2,
)
WARMING_UP = OptimConfig(lr=0.004, warmup_updates=4, max_update=10, adam_betas=(0.9, 0.97), weight_decay=0.02)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, precision: PrecisionConfig) -> Contents:
    """This toolkit's contents of the third update of a skeleton."""
    by_name = {moment: originals.native(named) for moment, named in originals.moments(model, optimizer).items()}
    weights = originals.native(dict(model.named_parameters()))
    counters = {"num_skipped": 0, "since_overflow": 5, "since_change": 5, "overflows_since_change": 0}
    return Contents(
        source="native",
        config=Config(mode="pretrain", model=ARCHITECTURE, optim=WARMING_UP, precision=precision),
        weights=weights,
        optimizer={name: {**{moment: by_name[moment][name] for moment in MOMENTS}, "step": 3} for name in weights},
        scaler={"scale": 64.0, **counters} if precision.fp16 else None,
        step=3,
    )


def given(program: str, contents: Contents) -> dict[str, Any]:
    """The optimizer state in a file for a program."""
    if program == "fairseq":
        return fairseq.to_content(contents, "data")["last_optimizer_state"]
    return nvidia.to_content(contents)["optimizer"]


# the options, and which programs keep one vector over all parameters
PRECISIONS: dict[str, tuple[PrecisionConfig, tuple[str, ...]]] = {
    "fp32": (PrecisionConfig(), ()),
    "bf16": (PrecisionConfig(bf16=True), ("nvidia",)),
    "fp16": (PrecisionConfig(fp16=True), ("fairseq", "nvidia")),
    "fp16, autocast": (PrecisionConfig(fp16=True, amp=True), ()),
    "bf16, autocast": (PrecisionConfig(bf16=True, amp=True), ()),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("program", ["fairseq", "nvidia"])
def test_the_optimizer_of_the_original_takes_our_moments(program, precision):
    """Adam of torch over the parameters of the original, or over one vector of all of them."""
    model = skeleton(stacked=program == "nvidia")
    optimizer = originals.train(model)
    options, flat_in = PRECISIONS[precision]
    is_flat = program in flat_in
    state = given(program, trained(model, optimizer, options))
    parameters = list(model.parameters())
    by_name = originals.moments(model, optimizer)
    expected = {moment: list(named.values()) for moment, named in by_name.items()}
    if is_flat:
        parameters = [nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))]
        expected = {moment: [torch.cat([t.flatten() for t in tensors])] for moment, tensors in expected.items()}
    [group] = state["param_groups"]
    assert group["params"] == list(range(1 if is_flat else len(parameters)))
    assert len(state["state"]) == len(parameters)
    original = torch.optim.Adam(parameters, betas=originals.BETAS)
    original.load_state_dict(state)
    for number, parameter in enumerate(parameters):
        for moment in MOMENTS:
            assert torch.equal(original.state[parameter][moment], expected[moment][number]), (moment, number)
        assert int(original.state[parameter]["step"]) == 3


def test_the_modules_of_the_original_take_our_weights():
    model, other = skeleton(), skeleton()
    contents = trained(model, originals.train(model), PrecisionConfig())
    for content in (fairseq.to_content(contents, "data"), nvidia.to_content(contents)):
        assert list(content["model"]) == [name for name, _ in model.named_parameters()]
        other.load_state_dict(content["model"])  # refuses names and shapes that are not its own
        same(dict(other.named_parameters()), dict(model.named_parameters()))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("program", ["fairseq", "nvidia"])
def test_options_of_the_optimizer_are_those_of_its_next_update(program, precision):
    model = skeleton(stacked=program == "nvidia")
    state = given(program, trained(model, originals.train(model), PRECISIONS[precision][0]))
    [group] = state["param_groups"]
    assert group["lr"] == pytest.approx(0.003, rel=1e-12)  # the fourth update has the rate after three of four
    assert (list(group["betas"]), group["eps"], group["weight_decay"], group["step"]) == ([0.9, 0.97], 1e-6, 0.02, 3)
    assert state.get("loss_scale") == (64.0 if "fp16" in precision else None)


# ---- Settings of fairseq --------------------------------------------------------------------------------------------

GENERATIONS = ("dict", "omegaconf", "namespace")
Case = tuple[dict[str, Any], dict[str, Any]]


def values(contents: Contents, paths: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the configuration by path ("optim.lr"), or what the contents themselves have."""
    return {
        path: reduce(getattr, path.split("."), contents if hasattr(contents, path) else contents.config)
        for path in paths
    }


PRETRAINED: dict[str, Case] = {
    "architecture": (
        {},
        {
            **{"model.encoder_layers": 2, "model.encoder_embed_dim": 8, "model.conv_feature_layers": originals.CONV},
            **{
                "model.final_dim": 6,
                "model.latent_vars": 5,
                "model.conv_pos": 4,
                "objective.latent_temp": (2, 0.25, 0.999),
            },
            **{"dropout.dropout": 0.15, "dropout.encoder_layerdrop": 0.05, "dropout.feature_grad_mult": 0.125},
            **{"mask.mask_prob": 0.65, "mask.mask_length": 7, "model.normalize": False},
        },
    ),
    "the run": (
        {},
        {
            **{"optim.lr": 0.002, "optim.adam_betas": (0.9, 0.97), "optim.adam_eps": 1e-6, "optim.weight_decay": 0.01},
            **{"optim.clip_norm": 0.5, "data.max_tokens": 1234567, "data.update_freq": 1, "step": 3, "best": 12.5},
        },
    ),
    "polynomial": (
        {},
        {
            **{"optim.lr_policy": "poly", "optim.warmup_updates": 10, "optim.max_update": 100},
            **{"optim.final_lr_scale": 0.0, "optim.lr_poly_power": 1.0},
        },
    ),
    "polynomial with a floor": (
        {"lr_scheduler.end_learning_rate": 0.0005, "lr_scheduler.power": 2.0, "lr_scheduler.warmup_updates": 20},
        {"optim.final_lr_scale": 0.25, "optim.lr_poly_power": 2.0, "optim.warmup_updates": 20},
    ),
    "polynomial that ends before the run": ({"lr_scheduler.total_num_update": 80}, {"optim.max_update": 80}),
    "polynomial that ends behind the run": ({"lr_scheduler.total_num_update": 400.0}, {"optim.max_update": 400}),
    "a run without an end": (
        {"optimization.max_update": 0, "lr_scheduler.total_num_update": 300},
        {"optim.max_update": 300, "optim.lr_policy": "poly", "optim.warmup_updates": 10},
    ),
    "update_freq": ({"optimization.update_freq": [16]}, {"data.update_freq": 16}),
    "two loss weights": ({"criterion.loss_weights": [0.2, 5]}, {"objective.loss_weights": (0.2, 5.0)}),
    "loss weights as text": ({"criterion.loss_weights": "[0.2, 5]"}, {"objective.loss_weights": (0.2, 5.0)}),
    "one loss weight": ({"criterion.loss_weights": [0.3]}, {"objective.loss_weights": (0.3, 0.3)}),
    "no loss weights": ({"criterion.loss_weights": None}, {"objective.loss_weights": (0.0, 0.0)}),
    "absent loss weights": ({"criterion.loss_weights": ABSENT}, {"objective.loss_weights": (0.0, 0.0)}),
    "loss": ({"checkpoint.best_checkpoint_metric": "loss"}, {"best": 12.5}),
    "accuracy": ({"checkpoint.best_checkpoint_metric": "accuracy"}, {"best": None}),
    "the highest": ({"checkpoint.maximize_best_checkpoint_metric": True}, {"best": None}),
    "normalized": ({"task.normalize": True}, {"model.normalize": True}),
    "fp32": ({}, {"precision": PrecisionConfig()}),
    "fp16": ({"common.fp16": True}, {"precision": PrecisionConfig(fp16=True)}),
    "bf16": ({"common.bf16": True}, {"precision": PrecisionConfig(bf16=True)}),
    "amp": ({"common.amp": True}, {"precision": PrecisionConfig(fp16=True, amp=True)}),
}
FINETUNED: dict[str, Case] = {
    "of its own": (
        {},
        {
            **{"dropout.dropout": 0.0, "dropout.attention_dropout": 0.0, "dropout.activation_dropout": 0.1},
            **{"dropout.final_dropout": 0.02, "dropout.feature_grad_mult": 0.0, "mask.mask_length": 3},
            **{"ctc.freeze_finetune_updates": 50, "optim.lr": 0.0001, "optim.max_update": 200, "data.update_freq": 4},
        },
    ),
    "of the pre-trained model": (
        {},
        {"model.encoder_layers": 2, "model.encoder_ffn_embed_dim": 10, "model.conv_pos": 4, "model.latent_vars": 5},
    ),
    "not of the run of the pre-trained model": (
        {},
        {"precision": PrecisionConfig(), "optim.lr_policy": "exp", "optim.lr_poly_power": None},
    ),
    "masks": (
        {"model.apply_mask": True},
        {"mask.mask_prob": 0.5, "mask.mask_channel_prob": 0.25, "mask.mask_channel_length": 4},
    ),
    "no masks": ({"model.apply_mask": False}, {"mask.mask_prob": 0.0, "mask.mask_channel_prob": 0.0}),
    "no word about masks": ({"model.apply_mask": ABSENT}, {"mask.mask_prob": 0.0, "mask.mask_channel_prob": 0.0}),
    "its default of mask_prob": ({"model.mask_prob": ABSENT}, {"mask.mask_prob": 0.5}),
    "its default of dropout": ({"model.dropout": ABSENT}, {"dropout.dropout": 0.0}),
    "its default of feature_grad_mult": ({"model.feature_grad_mult": ABSENT}, {"dropout.feature_grad_mult": 0.0}),
    "layerdrop": ({"model.layerdrop": 0.2}, {"dropout.encoder_layerdrop": 0.2}),
    "phases": (
        {},
        {
            **{"optim.lr_policy": "exp", "optim.warmup_updates": 20, "optim.hold_updates": 80, "optim.max_update": 200},
            **{"optim.initial_lr_scale": 0.01, "optim.final_lr_scale": 0.05},
        },
    ),
    "phases as text": (
        {"lr_scheduler.phase_ratio": "(0.25, 0.5, 0.25)"},
        {"optim.warmup_updates": 50, "optim.hold_updates": 100, "optim.max_update": 200},
    ),
    "a length in floating point": ({"lr_scheduler.max_update": 200.0}, {"optim.max_update": 200}),
    "steps": (
        {
            **{"lr_scheduler.phase_ratio": None, "lr_scheduler.warmup_steps": 30, "lr_scheduler.hold_steps": 40},
            **{"lr_scheduler.decay_steps": 130, "lr_scheduler.final_lr_scale": 0.02},
        },
        {
            **{"optim.lr_policy": "exp", "optim.warmup_updates": 30, "optim.hold_updates": 40},
            **{"optim.max_update": 200, "optim.final_lr_scale": 0.02},
        },
    ),
    "steps that end before the run": (
        {
            **{"lr_scheduler.phase_ratio": None, "lr_scheduler.warmup_steps": 30, "lr_scheduler.hold_steps": 40},
            **{"lr_scheduler.decay_steps": 50},
        },
        {"optim.warmup_updates": 30, "optim.hold_updates": 40, "optim.max_update": 120},
    ),
    "WER": ({"checkpoint.best_checkpoint_metric": "wer"}, {"best": 12.5}),
    "not WER": ({"checkpoint.best_checkpoint_metric": "loss"}, {"best": None}),
    "no word about the best": ({"checkpoint.best_checkpoint_metric": ABSENT}, {"best": None}),
    "fp16": ({"common.fp16": True}, {"precision": PrecisionConfig(fp16=True)}),
    "amp": ({"common.amp": True}, {"precision": PrecisionConfig(fp16=True, amp=True)}),
}
REFERENCES: dict[str, Case] = {
    "not normalized": ({}, {"model.normalize": False}),
    "normalized": ({"task.normalize": True}, {"model.normalize": True}),
    "normalized by its own": ({"model.normalize": True, "task.normalize": True}, {"model.normalize": True}),
    "max_update": (
        {
            "lr_scheduler.phase_ratio": [0.25, 0.25, 0.5],
            "lr_scheduler.max_update": "${optimization.max_update}",
            "optimization.max_update": 400,
        },
        {"optim.max_update": 400, "optim.warmup_updates": 100, "optim.hold_updates": 100},
    ),
    "lr": ({"lr_scheduler.lr": "${optimization.lr}", "optimizer.lr": "${optimization.lr}"}, {"optim.lr": 0.0001}),
}


def finetuned_file(patches: Mapping[str, Any], generation: str = "dict", **more: Any) -> dict[str, Any]:
    return fairseq_file(skeleton(ctc=True, heads=False), patched(FINETUNING, patches), generation, **more)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("case", PRETRAINED)
def test_settings_of_pretraining_in_fairseq(tmp_path, case, generation):
    patches, expected = PRETRAINED[case]
    content = fairseq_file(skeleton(), patched(PRETRAINING, patches), generation)
    contents = read(tmp_path, content, old=generation == "namespace")
    assert contents.config.mode == "pretrain"
    assert values(contents, expected) == expected
    assert contents.remarks == ()


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("case", FINETUNED)
def test_settings_of_finetuning_in_fairseq(tmp_path, case, generation):
    patches, expected = FINETUNED[case]
    contents = read(tmp_path, finetuned_file(patches, generation), old=generation == "namespace")
    assert contents.config.mode == "finetune"
    assert values(contents, expected) == expected
    assert contents.remarks == ()


@pytest.mark.parametrize("generation", ["dict", "omegaconf"])
@pytest.mark.parametrize("case", REFERENCES)
def test_settings_that_refer_to_others(tmp_path, case, generation):
    patches, expected = REFERENCES[case]
    contents = read(tmp_path, finetuned_file(patches, generation))
    assert values(contents, expected) == expected
    assert contents.remarks == ()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_length_that_is_that_of_the_run(tmp_path, generation):
    """By a reference, or (in a flat table, which has no sections to refer to) because nothing else is said."""
    refers = ABSENT if generation == "namespace" else "${optimization.max_update}"
    patches = {"optimization.max_update": 150, "lr_scheduler.total_num_update": refers}
    contents = read(tmp_path, fairseq_file(skeleton(), patched(PRETRAINING, patches), generation))
    assert (contents.config.optim.max_update, contents.remarks) == (150, ())


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    "name", ["inverse_sqrt", "fixed", "cosine", "reduce_lr_on_plateau", "triangular", "poly", "exp"]
)
def test_learning_rates_of_other_kinds_are_told(tmp_path, name, generation):
    patches = {"lr_scheduler": {"_name": name, "warmup_updates": 10, "lr": [0.002]}}
    contents = read(tmp_path, fairseq_file(skeleton(), patched(PRETRAINING, patches), generation))
    assert any(name in remark for remark in contents.remarks)
    assert contents.config.optim.lr == 0.002


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_final_dim_of_zero_is_the_width_of_the_transformer(tmp_path, generation):
    content = fairseq_file(skeleton(final_dim=8), patched(PRETRAINING, {"model.final_dim": 0}), generation)
    contents = read(tmp_path, content)
    assert (contents.config.model.final_dim, contents.config.model.target_dim) == (8, 8)
    assert contents.weights["final_proj.weight"].shape == (8, 8)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("weights", [[0.3], "[0.3]"])
def test_without_a_quantizer_one_term_is_weighed(tmp_path, weights, generation):
    patches = {"model.quantize_targets": False, "criterion.loss_weights": weights}
    contents = read(tmp_path, fairseq_file(skeleton(quantizer=False), patched(PRETRAINING, patches), generation))
    assert contents.config.objective.loss_weights == (0.0, 0.3)
    assert not contents.config.model.quantize_targets


UNSUPPORTED = {
    **{"activation_fn": "relu", "layer_type": "conformer", "pos_conv_depth": 5, "conv_pos_batch_norm": True},
    **{"attn_type": "espnet", "pos_enc_type": "rope", "crop_seq_to_multiple": 2},
}
UNSUPPORTED_IN_PRETRAINING = {"quantize_input": True, "target_glu": True, "quantizer_depth": 2, "same_quantizer": True}


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", {**UNSUPPORTED, **UNSUPPORTED_IN_PRETRAINING})
def test_other_architectures_are_refused_by_the_name_of_their_option(tmp_path, name, generation):
    patches = {f"model.{name}": (UNSUPPORTED | UNSUPPORTED_IN_PRETRAINING)[name]}
    with pytest.raises(CheckpointError, match=f"has {name} ") as caught:
        read(tmp_path, fairseq_file(skeleton(), patched(PRETRAINING, patches), generation))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_architectures_are_refused_where_they_were_fine_tuned(tmp_path, name):
    section = "model" if name == "layer_type" else "model.w2v_args.model"  # that one fine-tuning sets itself
    with pytest.raises(CheckpointError, match=f"has {name} "):
        read(tmp_path, finetuned_file({f"{section}.{name}": UNSUPPORTED[name]}))


def test_text_that_is_no_list_of_numbers_is_not_evaluated(tmp_path):
    mark = tmp_path / "mark"
    text = f"[__import__('pathlib').Path({str(mark)!r}).touch()]"
    with pytest.raises(CheckpointError, match="loss_weights"):
        read(tmp_path, fairseq_file(skeleton(), patched(PRETRAINING, {"criterion.loss_weights": text})))
    assert not mark.exists()


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_pickled_dictionary_has_the_symbols(tmp_path, generation, old):
    task_state = {"target_dictionary": originals.dictionary()}
    contents = read(tmp_path, finetuned_file({}, generation, task_state=task_state), old=old)
    assert contents.labels == ("<s>", "<pad>", "</s>", "<unk>", "|", "E", "Ä")
    assert read(tmp_path, finetuned_file({}, generation), old=old).labels is None


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_both_formats_of_torch_hold_the_same(tmp_path, generation, old):
    model = skeleton().half()  # as published files have them
    contents = read(tmp_path, fairseq_file(model, PRETRAINING, generation), old=old)
    same(contents.weights, originals.native(dict(model.named_parameters())))
    assert {tensor.dtype for tensor in contents.weights.values()} == {torch.float16}


# ---- Settings of NVIDIA ---------------------------------------------------------------------------------------------

ARGS: dict[str, Case] = {
    "poly": (
        {"lr_poly_power": 2.0, "initial_lr_scale": 0.1, "final_lr_scale": 0.3, "hold_updates": 5},
        {
            **{"optim.lr_policy": "poly", "optim.lr_poly_power": 2.0, "optim.initial_lr_scale": 0.1},
            **{"optim.final_lr_scale": 0.3, "optim.hold_updates": 5, "optim.warmup_updates": 10},
        },
    ),
    "exp": (
        {"lr_policy": "exp", "hold_updates": 40, "initial_lr_scale": 0.02, "final_lr_scale": 0.04},
        {
            **{"optim.lr_policy": "exp", "optim.warmup_updates": 10, "optim.hold_updates": 40, "optim.max_update": 100},
            **{"optim.initial_lr_scale": 0.02, "optim.final_lr_scale": 0.04, "optim.lr_exp_decay": None},
        },
    ),
    "exp by a factor": (
        {"lr_policy": "exp", "lr_exp_decay": 0.97, "final_lr_scale": 0.04},
        {"optim.lr_policy": "exp", "optim.lr_exp_decay": 0.97, "optim.final_lr_scale": 0.04},
    ),
    "batches": (
        {"update_freq": 4, "num_concat_batches": 8},
        {
            **{"data.update_freq": 4, "data.num_concat_batches": 8},
            **{"data.max_tokens": 1400000, "data.max_tokens_valid": 1300000},
        },
    ),
    "optimizer": (
        {"ema": 0.999},
        {
            **{"optim.lr": 0.0005, "optim.adam_betas": (0.9, 0.98), "optim.adam_eps": 1e-6, "optim.ema": 0.999},
            **{"optim.weight_decay": 0.01, "optim.clip_norm": 25.0},
        },
    ),
    "fp16": ({"fp16": True}, {"precision": PrecisionConfig(fp16=True)}),
    "bf16": ({"bf16": True}, {"precision": PrecisionConfig(bf16=True)}),
    "objective": ({}, {"objective.loss_weights": (0.1, 10.0), "objective.latent_temp": (2.0, 0.25, 0.999)}),
    "progress": ({}, {"step": 3, "epoch": 4, "best": 1.25}),
    "architecture": ({}, {"model.encoder_layers": 2, "model.hourglass_transformer": "", "mask.mask_prob": 0.65}),
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("case", ARGS)
def test_settings_of_nvidia(tmp_path, case, old):
    patches, expected = ARGS[case]
    contents = read(tmp_path, nvidia_file(skeleton(stacked=True), {**NVIDIA_ARGS, **patches}), old=old)
    assert values(contents, expected) == expected
    assert contents.remarks == ()


@pytest.mark.parametrize(("apply_mask", "probabilities"), [(True, (0.65, 0.1)), (False, (0.0, 0.0))])
def test_settings_and_symbols_of_a_fine_tuned_model_of_nvidia(tmp_path, apply_mask, probabilities):
    args = {
        **FINETUNED_ARGS,
        "apply_mask": apply_mask,
        "mask_channel_prob": 0.1,
        "lr_policy": "exp",
        "hold_updates": 20,
    }
    args |= {"initial_lr_scale": 0.01, "final_lr_scale": 0.05, "bf16": True}
    state = {"step": 9, "epoch": 2, "best_val_loss": float("inf"), "best_val_wer": 7.5}
    model = skeleton(stacked=True, ctc=True, heads=False)
    contents = read(tmp_path, nvidia_file(model, args, train_state=state, output_labels="| 94802\nE 51860\nÄ 1\n"))
    assert contents.labels == SYMBOLS
    expected = {"optim.hold_updates": 20, "ctc.freeze_finetune_updates": 2, "best": 7.5, "step": 9, "num_symbols": 7}
    assert values(contents, expected) == expected
    assert (contents.config.mask.mask_prob, contents.config.mask.mask_channel_prob) == probabilities
    assert contents.config.precision == PrecisionConfig(bf16=True)


OLD_FLOAT64 = Call(Named("numpy", "dtype"), "f8", False, True, state=(3, "<", None, None, None, -1, -1, 0))
OLD_BYTES = Call(Named("_codecs", "encode"), struct.pack("<d", 0.1).decode("latin1"), "latin1")
OLD_NUMBER = Call(Named("numpy.core.multiarray", "scalar"), OLD_FLOAT64, OLD_BYTES)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize(
    "number", [np.float64(0.1), Call(Named("numpy.core.multiarray", "scalar"), OLD_FLOAT64, OLD_BYTES)]
)
def test_the_best_loss_may_be_a_number_of_numpy(tmp_path, number, old):
    state = {"step": 3, "epoch": 4, "best_val_loss": number, "best_val_wer": float("inf")}
    contents = read(tmp_path, nvidia_file(skeleton(stacked=True), NVIDIA_ARGS, train_state=state), old=old)
    assert (contents.best, type(contents.best)) == (0.1, float)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_weights_in_bfloat16_are_read_as_they_are(tmp_path, old):
    model = skeleton(stacked=True)
    for name, parameter in model.named_parameters():
        if "pos_conv" not in name:  # which stays in fp32
            parameter.data = parameter.data.bfloat16()
    contents = read(tmp_path, nvidia_file(model, {**NVIDIA_ARGS, "bf16": True}), old=old)
    same(contents.weights, originals.native(dict(model.named_parameters())))
    kinds = {name: tensor.dtype for name, tensor in contents.weights.items()}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == {
        *("encoder.pos_conv.bias", "encoder.pos_conv.weight_g", "encoder.pos_conv.weight_v")
    }
    assert kinds["encoder.layers.0.self_attn.qkv_proj.weight"] == torch.bfloat16


@pytest.mark.parametrize("program", ["fairseq", "nvidia"])
def test_averaged_weights(tmp_path, program):
    shape, settings = PROGRAMS[program]
    model = skeleton(**shape)
    averages = {name: tensor.detach() + 1 for name, tensor in model.named_parameters()}
    content = made(program, model, **settings)
    if program == "fairseq":
        content["extra_state"]["ema"] = originals.split(averages)
    else:
        content["ema_model"] = originals.split(averages)
    contents = read(tmp_path, content)
    assert contents.averaged is not None
    same(contents.averaged, originals.native(averages))
    same(contents.weights, originals.native(dict(model.named_parameters())))


def test_an_unknown_schedule_of_nvidia_is_told_and_other_architectures_are_refused(tmp_path):
    model = skeleton(stacked=True)
    contents = read(tmp_path, nvidia_file(model, {**NVIDIA_ARGS, "lr_policy": "stairs"}))
    assert any("stairs" in remark for remark in contents.remarks)
    for name, value in {"rotary_embeddings": True, "use_spectrogram_features": True, "activation_fn": "relu"}.items():
        with pytest.raises(CheckpointError, match=f"has {name} "):
            read(tmp_path, nvidia_file(model, {**NVIDIA_ARGS, name: value}))


def test_the_skeletons_are_models_of_this_toolkit():
    """What the expected values are made from: every parameter has another name and another value."""
    for shape in MODELS.values():
        named = dict(skeleton(**shape).named_parameters())
        ours = originals.native(named)
        assert sum(t.numel() for t in ours.values()) == sum(t.numel() for t in named.values())
        assert all(tensor.unique().numel() > 1 for tensor in ours.values())
    assert replace(ARCHITECTURE, hourglass_transformer="[1,(2,3),1]").hourglass() == FOLD["hourglass"]
