"""The figures of docs/parallel.md against the models and the optimizer: counted, not copied."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from conftest import ROOT

from common.optim import parameter_groups
from common.precision import MixedPrecisionOptimizer
from wav2vec2.arg_parser import parse_train
from wav2vec2.config import Config, DropoutConfig, ModelConfig
from wav2vec2.model import TransformerLayer, Wav2Vec2Model

PRESETS = ("1b", "2b")
FIGURES = {
    cells[0]: cells[1:]
    for line in (ROOT / "docs/parallel.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and (cells := [cell.strip() for cell in line.strip("|").split("|")])
}


def figure(row: str, preset: str) -> float:
    return float(FIGURES[row][PRESETS.index(preset)].removesuffix(" GB").replace(",", ""))


@lru_cache
def config(preset: str) -> Config:
    """What the preset gives train.py."""
    folder = str(ROOT / "docs")  # any that exists
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "NUM_GPUS": "1", "FILELISTS_DIR": folder}
    script = ROOT / "scripts" / f"pretrain_xlsr_{preset}.sh"
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=True)
    command = shlex.split(done.stdout.splitlines()[-1])
    return parse_train(command[command.index("pretrain") :])


@lru_cache
def model(preset: str) -> Wav2Vec2Model:
    with torch.device("meta"):
        return Wav2Vec2Model(config(preset).model, DropoutConfig())


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_table_and_of_the_paper(preset):
    whole, encoder = count(model(preset)), model(preset).encoder
    assert whole == figure("parameters", preset)
    assert whole // 10**6 == {"1b": 965, "2b": 2162}[preset]
    assert {count(layer) for layer in encoder.layers} == {figure("of a transformer layer", preset)}
    assert count(encoder.pos_conv) == figure("of the positional convolution", preset)


@pytest.mark.parametrize("preset", PRESETS)
def test_gigabytes_follow_from_the_bytes_per_parameter(preset):
    whole, layer, fp32 = (
        figure(f"{row}", preset) for row in ("parameters", "of a transformer layer", "of the positional convolution")
    )
    width, layers = config(preset).model.encoder_embed_dim, config(preset).model.encoder_layers
    frames = figure("frames of a full sub-batch", preset)
    assert frames == config(preset).data.max_tokens / 320
    expected = {
        "DDP in fp32, per device": 16 * whole,
        "DDP in bf16, per device": 20 * (whole - fp32) + 16 * fp32,
        "FSDP on 8 devices, per device": 16 * whole / 8,
        "FSDP on 64 devices, per device": 16 * whole / 64,
        "gathered at a time: two layers, positional convolution, rest": 2 * 2 * layer
        + 4 * fp32
        + 2 * (whole - layers * layer - fp32),
        "activations of all layers": 2 * 16 * width * layers * frames,
        "activations with checkpointing": 2 * width * frames * (layers + 16),
    }
    for row, size in expected.items():
        digits = len(FIGURES[row][0].removesuffix(" GB").split(".")[1])
        assert figure(row, preset) == round(size / 1e9, digits), row


@pytest.mark.parametrize(
    ("row", "dtype"), [("DDP, fp32 or `AMP`", torch.float32), ("DDP, `BF16` or `FP16`", torch.bfloat16)]
)
def test_an_update_holds_so_many_bytes_per_parameter(row, dtype):
    """Every tensor that the optimizer and the model keep, counted once by its memory."""
    module = torch.nn.Linear(64, 64).to(dtype)
    groups = parameter_groups(module, lambda name: "all")
    optimizer = MixedPrecisionOptimizer(groups, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    optimizer.backward(module(torch.randn(2, 64, dtype=dtype)).sum())
    optimizer.clip_grad_norm(1.0)
    held = {}

    def hold(item: object) -> None:
        if isinstance(item, torch.Tensor):
            held[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
            hold(item.grad if item.is_leaf else None)
        elif isinstance(item, dict):
            hold(list(item.values()))
        elif isinstance(item, (list, tuple)):
            for part in item:
                hold(part)
        elif hasattr(item, "__dict__") and not isinstance(item, (type, Callable)):
            hold(vars(item))

    hold(optimizer)
    hold(list(module.parameters()))
    per_parameter = sum(held.values()) / count(module)
    cells = [int(cell) for cell in FIGURES[row] if re.fullmatch(r"\d+", cell)]
    assert sum(cells[:-1]) == cells[-1]
    assert per_parameter == pytest.approx(cells[-1], rel=0.01)  # beside steps and norm


def test_a_layer_keeps_16_numbers_per_frame_and_channel():
    width, frames = 128, 300
    config = ModelConfig(
        encoder_embed_dim=width, encoder_ffn_embed_dim=4 * width, encoder_attention_heads=2, layer_norm_first=True
    )
    layer = TransformerLayer(config, DropoutConfig(dropout=0.0, attention_dropout=0.0))
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(1, frames, width, requires_grad=True))
    for parameter in layer.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) / 4 / frames / width == pytest.approx(16, rel=0.01)
