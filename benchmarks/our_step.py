"""This toolkit's training step, the run that makes it, and its parts on their own."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor

import train
from benchmarks.stopwatch import Stopwatch
from benchmarks.workload import SyntheticBatch, Workload
from common import distributed
from common.data.loader import TrainLoader
from common.ema import Ema
from common.labels import Dictionary
from common.precision import to_half
from wav2vec2.build import HALF, build_model, build_optimizer, build_task, compile_regions, fp32_modules, trunk
from wav2vec2.config import Config
from wav2vec2.model import Encoded
from wav2vec2.run import Run
from wav2vec2.task import PretrainTask


def bare_run(
    recipe: Config, device: torch.device, loader: TrainLoader | None = None, dictionary: Dictionary | None = None
) -> Run:
    """A run as build_run makes it, with fresh weights, that writes nothing; it may have data.

    Fine-tuning needs a dictionary.
    """
    model = build_model(recipe, dictionary)
    trunk(model).encoder.checkpoint_activations = recipe.run.checkpoint_activations
    if recipe.precision.o2:
        to_half(model, HALF[recipe.precision.name], fp32_modules(model, recipe.precision.kept_in_fp32()))
    task = build_task(recipe, model).to(device)
    if recipe.run.compile:
        compile_regions(task, cuda_graphs=recipe.run.cuda_graphs)
    optimizer = build_optimizer(recipe, model)
    nothing = cast(Any, None)
    return Run(
        config=recipe,
        device=device,
        task=task,
        engine=distributed.wrap(task, device, bucket_cap_mb=recipe.run.bucket_cap_mb),
        optimizer=optimizer,
        schedule=lambda step: recipe.optim.lr,
        ema=Ema(recipe.optim.ema, optimizer.master_weights()),
        train_loader=nothing if loader is None else loader,
        valid_loader=nothing,
        dictionary=dictionary,
        logger=nothing,
        frozen_weights={},
    )


class OurStep:
    """train.train_step on a run that has no data."""

    def __init__(self, workload: Workload) -> None:
        self._run = bare_run(workload.recipe, workload.device)
        self.task, self.optimizer = cast(PretrainTask, self._run.task), self._run.optimizer
        self.device = workload.device

    def step(self, batch: SyntheticBatch) -> None:
        """One update: forward, backward, optimizer."""
        progress = self._run.progress
        progress.step += train.train_step(self._run, [batch], progress.step)

    @property
    def has_graphs(self) -> bool:
        """Whether parts of it are CUDA graphs, whose results the next pass writes over."""
        return self._run.config.run.cuda_graphs

    @property
    def num_parameters(self) -> int:
        """Trained weights."""
        return sum(parameter.numel() for parameter in self.task.model.parameters())


@contextmanager
def our_program(workload: Workload) -> Iterator[OurStep]:
    """Our step, in a process that is set up as train.py sets up its own."""
    with distributed.session(workload.device.type):
        yield OurStep(workload)


class OurParts:
    """The parts of our step on their own, with what a real step hands them: inputs, and gradients of their weights.

    What goes into the encoder, and the gradients that go into the backward pass of extractor and encoder, are random,
    of the real shape.
    """

    def __init__(self, ours: OurStep, batch: SyntheticBatch) -> None:
        self._task, self._optimizer, self._batch = ours.task, ours.optimizer, batch
        self._has_graphs = ours.has_graphs
        self._count = distributed.sum_across_ranks(self._task.count_units([batch]), ours.device)
        self._losses()
        weights = list(self._task.model.parameters())
        self._gradients = [(weight, weight.grad.clone()) for weight in weights if weight.grad is not None]
        encoded: Encoded = self._task.model(batch.audio_BS, mask_BT=batch.mask_BT, wanted_R=batch.masked_R)
        self._encoded = Encoded(
            _leaf(encoded.x), _leaf(encoded.features_BTC), _leaf(encoded.conv_features_BTC), frame_lengths_B=None
        )
        self._context_gradient = torch.randn_like(encoded.x)
        self._conv_gradient = torch.randn_like(encoded.conv_features_BTC)
        self._embedded_BTD = _leaf(encoded.x.new_empty(*encoded.features_BTC.shape[:2], encoded.x.shape[-1]).normal_())
        self._forget()

    def time(self, stopwatch: Stopwatch, repeats: int) -> dict[str, float]:
        """Mean seconds of forward and backward pass of every part, and of the optimizer's work."""
        seconds = {
            "extractor": stopwatch.time(self._extractor, repeats, self._forget),
            "encoder": stopwatch.time(self._encoder, repeats, self._forget),
        }
        with self._fixed_trunk():
            seconds["quantizer_logits"] = stopwatch.time(self._losses, repeats, self._forget)
        seconds["optimizer"] = stopwatch.time(self._update, repeats, self._recall)  # the last: it leaves no gradients
        return seconds

    def _extractor(self) -> None:
        self._task.model.feature_extractor(self._batch.audio_BS).backward(self._conv_gradient)

    def _encoder(self) -> None:
        x_RD = self._task.model.encoder(self._embedded_BTD, wanted_R=self._batch.masked_R)
        x_RD.backward(self._context_gradient)

    def _losses(self) -> None:
        self._optimizer.backward(self._task(self._batch, self._count)[0])

    def _update(self) -> None:
        self._optimizer.clip_grad_norm(0.0)
        self._optimizer.step(lr=0.0)  # as much work as with any other, and the weights stay

    def _forget(self) -> None:
        if self._has_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the task does that only when it is called itself
        self._optimizer.zero_grad()
        encoded = self._encoded
        for leaf in (encoded.x, encoded.features_BTC, encoded.conv_features_BTC, self._embedded_BTD):
            leaf.grad = None

    def _recall(self) -> None:
        for weight, gradient in self._gradients:
            weight.grad = gradient.clone()  # the optimizer may scale it in place

    def _fixed_trunk(self) -> AbstractContextManager[Any]:
        """While this lasts, extractor and encoder hand out what they once gave, so that the losses stand alone."""
        return patch.object(self._task.model, "forward", lambda *args, **kwargs: self._encoded)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()  # a copy, because a CUDA graph writes its results anew
