"""Says what a checkpoint is: format, mode, architecture, symbols, progress, size, and what is missing from it."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

from common.errors import UserError, one_line
from utils import program
from wav2vec2.config import ModelConfig
from wav2vec2.convert.contents import Contents
from wav2vec2.convert.load_any import load_any


def describe(path: Path, contents: Contents) -> dict[str, str]:
    """Topic -> text."""
    model = contents.config.model
    kinds = {"pretrain": "pre-trained", "finetune": "fine-tuned (CTC)"}
    found = {
        "format": contents.source
        + (f", converted from {contents.origin}" if contents.source == "native" and contents.origin else ""),
        "kind": kinds[contents.config.mode],
        "size": size(path, contents),
        "transformer": transformer(model),
        "feature extractor": extractor(model),
        "quantizer": quantizer(contents),
        "audio": f"{model.sample_rate} Hz, {'normalised' if model.normalize else 'not normalised'}",
        "output symbols": symbols(contents),
        "training": training(contents),
        "optimizer": f"moments of {len(contents.optimizer)} weights" if contents.optimizer else "none",
        "averaged weights": "yes" if contents.averaged else "none",
        "missing": ", ".join(contents.missing) or "nothing",
        "remarks": "; ".join(contents.remarks),
    }
    return {topic: text for topic, text in found.items() if text}


def size(path: Path, contents: Contents) -> str:
    """Bytes on the disk, number of weights and their types."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    types = Counter[str]()
    for tensor in contents.weights.values():
        types[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    weights = ", ".join(f"{number / 1e6:.2f} M {name}" for name, number in types.most_common())
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB; weights: {weights}"


def transformer(model: ModelConfig) -> str:
    """Layers, widths, norms."""
    hourglass = model.hourglass()
    layers = f"{model.encoder_layers} layers"
    if hourglass:
        before, middle, factor, after = hourglass
        layers = (
            f"{before} + {middle} + {after} layers, the middle ones at 1/{factor} of the frame rate "
            f"(Hourglass, {model.hourglass_resample})"
        )
    return (
        f"{layers}, width {model.encoder_embed_dim}, feed-forward {model.encoder_ffn_embed_dim}, "
        f"{model.encoder_attention_heads} heads, {'pre' if model.layer_norm_first else 'post'}-LN, "
        f"positional convolution {model.conv_pos} / {model.conv_pos_groups} groups"
    )


def extractor(model: ModelConfig) -> str:
    """Blocks and norms."""
    blocks = model.conv_layers()
    norm = "group norm in the first block" if model.extractor_mode == "default" else "layer norm in every block"
    text = one_line(model.conv_feature_layers)  # of unknown origin
    return f"{len(blocks)} blocks {text}, {norm}{', biases' if model.conv_bias else ''}"


def quantizer(contents: Contents) -> str:
    """Codebooks; empty for fine-tuned models."""
    model = contents.config.model
    if contents.config.mode == "finetune":
        return ""
    if not model.quantize_targets:
        return "none by design"
    if not any(name.startswith("quantizer.") for name in contents.weights):
        return "none in this file"
    return f"{model.latent_groups} groups of {model.latent_vars} codes, width {model.target_dim} -> {model.final_dim}"


def symbols(contents: Contents) -> str:
    """Number and spelling of the output symbols."""
    if contents.config.mode == "pretrain":
        return ""
    if contents.labels is None:
        return f"{contents.num_symbols}, not named"
    return f"{len(contents.labels)}: {' '.join(contents.labels)}"


def training(contents: Contents) -> str:
    """Progress."""
    if contents.step is None:
        return "not told"
    epoch = f", epoch {contents.epoch}" if contents.epoch is not None else ""
    best = "" if contents.best is None else f", best validation result {contents.best:.4g}"
    return f"{contents.step} updates{epoch}{best}"


def main(argv: list[str] | None = None) -> None:
    """Print a table for each file."""
    parser = program.Parser(__doc__ or "")
    parser.add_argument("paths", metavar="PATH", nargs="+", type=Path, help="file, or folder of Hugging Face")
    failed: list[UserError] = []
    for path in parser.parse(argv).paths:
        try:
            found = describe(path, load_any(path))
        except UserError as error:
            failed.append(error)
            continue
        print(path)
        for topic, text in found.items():
            print(f"  {topic + ':':19}{text}")
    for earlier in failed[:-1]:
        print(f"error: {earlier}", file=sys.stderr)
    if failed:
        raise failed[-1]


if __name__ == "__main__":
    program.run(main)
