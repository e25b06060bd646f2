"""Contents of tiny checkpoints with random weights, for tests of conversions."""

from __future__ import annotations

from typing import Any

import torch
from tiny_model import MODEL, NO_DROPOUT

from common.labels import SPECIAL_SYMBOLS
from wav2vec2.config import Config, ModelConfig
from wav2vec2.convert.contents import Contents
from wav2vec2.model import Wav2Vec2Ctc, Wav2Vec2Model

SYMBOLS = (*SPECIAL_SYMBOLS, "|", "O", "Ä", "N", "E")


def contents_of(model: torch.nn.Module, mode: str, architecture: ModelConfig, **more: Any) -> Contents:
    """A model whose biases and norms are moved off their initial values, so that a lost one shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    config = Config(mode=mode, model=architecture)
    return Contents(source="native", config=config, weights=model.state_dict(), **more)


def pretrained(architecture: ModelConfig = MODEL, **more: Any) -> Contents:
    """A pre-trained model."""
    torch.manual_seed(1)
    return contents_of(Wav2Vec2Model(architecture, NO_DROPOUT), "pretrain", architecture, **more)


def finetuned(
    architecture: ModelConfig = MODEL, labels: tuple[str, ...] | None = SYMBOLS, num_symbols: int = 0, **more: Any
) -> Contents:
    """A fine-tuned model; without labels it has `num_symbols` outputs."""
    torch.manual_seed(2)
    model = Wav2Vec2Ctc(architecture, NO_DROPOUT, num_symbols=num_symbols or len(labels or SYMBOLS))
    return contents_of(model, "finetune", architecture, labels=labels, **more)


def adam(weights: dict[str, torch.Tensor], step: int) -> dict[str, dict[str, Any]]:
    """Optimizer state after some updates."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: {
            "exp_avg": torch.randn(tensor.shape, generator=generator) * 1e-3,
            "exp_avg_sq": torch.rand(tensor.shape, generator=generator) * 1e-6,
            "step": step,
        }
        for name, tensor in weights.items()
    }
