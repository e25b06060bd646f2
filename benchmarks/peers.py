"""What this toolkit is compared with: Hugging Face transformers, or any implementation through a runner file."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from benchmarks.workload import SyntheticBatch, Workload, make_precision
from common import rng
from common.data.collate import present
from common.errors import ConfigError
from common.precision import autocast
from wav2vec2.build import HALF
from wav2vec2.convert.huggingface_config import from_config


class Stepper(Protocol):
    """An implementation that can make one training step."""

    def step(self, batch: SyntheticBatch) -> Any:
        """Forward, backward, optimizer."""


Build = Callable[[Workload], Stepper]


@contextmanager
def peer_program(workload: Workload, load: Callable[[], Build], precision: str) -> Iterator[Stepper]:
    """A peer's step in one of PRECISIONS; its process is as Python and torch leave it."""
    recipe = replace(workload.recipe, precision=make_precision(precision))
    yield load()(replace(workload, recipe=recipe))


class HuggingFaceStep:
    """Wav2Vec2ForPreTraining of the same sizes with torch's fused AdamW, and autocast in half precision.

    Its loss has no feature penalty and its extractor no factor on the gradient; neither costs it anything.
    """

    def __init__(self, workload: Workload) -> None:
        from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining  # so that only this peer needs it

        recipe, self._device = workload.recipe, workload.device
        options = from_config(recipe, has_mask_embedding=True) | {"attn_implementation": "sdpa"}
        rng.seed_all(recipe.run.seed, "weights")
        self._model = cast(Any, Wav2Vec2ForPreTraining(Wav2Vec2Config(**options)))
        self._model.set_gumbel_temperature(recipe.objective.latent_temp[0])
        self._model.train().to(self._device)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=recipe.optim.lr,
            betas=(recipe.optim.adam_betas[0], recipe.optim.adam_betas[1]),
            eps=recipe.optim.adam_eps,
            weight_decay=recipe.optim.weight_decay,
            fused=True,
        )
        self._dtype = HALF.get(recipe.precision.name)
        self._scaler = torch.amp.GradScaler(
            self._device.type, init_scale=recipe.precision.fp16_init_scale, enabled=recipe.precision.fp16
        )

    def step(self, batch: SyntheticBatch) -> None:
        """One update; the loss, a sum, is divided by the masked frames."""
        with autocast(self._device, self._dtype):
            loss = self._model(
                batch.audio_BS,
                mask_time_indices=batch.mask_BT,
                sampled_negative_indices=present(batch.negatives_BTN),
            ).loss
        self._scaler.scale(loss / batch.num_masked).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()

    @property
    def num_parameters(self) -> int:
        """Trained weights."""
        return sum(parameter.numel() for parameter in self._model.parameters())


def hugging_face() -> Build:
    """How the Hugging Face peer is built. Raises ConfigError without transformers."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("--against huggingface: transformers is not installed; pip install transformers")
    return HuggingFaceStep


def load_runner(path: Path) -> Build:
    """The function `build` of a runner file. Raises ConfigError where there is none."""
    if not path.is_file():
        raise ConfigError(f"--against_runner {path}: no such file; name a Python file that defines build(config)")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--against_runner {path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    build = getattr(module, "build", None)
    if not callable(build):
        raise ConfigError(f"--against_runner {path}: defines no build(config); see docs/performance.md")
    return build
