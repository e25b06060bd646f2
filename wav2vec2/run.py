"""A training run: its parts, its progress, and what happens once in a while (log, validate, save)."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from common import checkpoint, distributed, flags
from common.data.loader import UpdateLoader, ValidLoader
from common.ema import Ema
from common.errors import CheckpointError, TrainingError
from common.labels import Dictionary
from common.logger import RunLogger, progress
from common.metrics import Metrics
from common.precision import MixedPrecisionOptimizer
from wav2vec2.config import Config
from wav2vec2.evaluate import evaluate
from wav2vec2.logging import REDUCTIONS, summarize, throughput
from wav2vec2.task import FinetuneTask, PretrainTask

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come; epoch and position belong to the loader."""

    step: int = 0  # finished updates
    best: float | None = None  # lowest WER, or loss in pre-training


@dataclass
class _Interval:
    """Sums, updates and seconds of training since some point."""

    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    updates: int = 0
    seconds: float = 0.0

    def add(self, sums: Mapping[str, float], updates: int, seconds: float) -> None:
        for name, value in sums.items():
            self.sums[name] += value
        self.updates += updates
        self.seconds += seconds


@dataclass
class Run:
    """Everything that train.py needs, put together by build.py."""

    config: Config
    device: torch.device
    task: PretrainTask | FinetuneTask
    engine: DistributedDataParallel | distributed.SingleProcess
    optimizer: MixedPrecisionOptimizer
    schedule: Callable[[int], float]
    ema: Ema
    train_loader: UpdateLoader
    valid_loader: ValidLoader
    dictionary: Dictionary | None
    logger: RunLogger
    frozen_weights: dict[str, Tensor]  # fp32 weights that are not trained
    metrics: Metrics = field(default_factory=lambda: Metrics(REDUCTIONS))
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        """Start the clocks."""
        self._since_validation = _Interval()
        self._epoch = _Interval()
        self._benchmark: list[dict[str, float]] = []
        self._unlogged = 0
        self._cause_of_waiting = ""
        self._clock = time.perf_counter()

    @property
    def finished(self) -> bool:
        """Whether the last update (or the last epoch of a benchmark) is done."""
        epochs = self.config.run.num_epochs
        loader = self.train_loader
        done = epochs > 0 and (loader.epoch > epochs or (loader.epoch == epochs and loader.at_epoch_end))
        return done or self.progress.step >= self.config.optim.max_update

    def set_step(self, step: int) -> None:
        """Set all that is scheduled by the number of finished updates."""
        self.task.set_step(step)
        self.optimizer.freeze(self.task.frozen_groups)

    def after_update(self, updated: bool) -> None:
        """Count the update, and do what is due after it."""
        config, step = self.config.run, self.progress.step + int(updated)
        self.progress.step = step
        self._unlogged += 1
        epoch, epoch_ends = self.train_loader.epoch, self.train_loader.at_epoch_end

        def due(updates: int, epochs: int) -> bool:
            by_updates = updated and updates > 0 and step % updates == 0
            return self.finished or by_updates or (epoch_ends and epochs > 0 and epoch % epochs == 0)

        if due(config.log_frequency, 0) or (epoch_ends and config.num_epochs):
            self.log()
        if epoch_ends and config.num_epochs:
            self._end_benchmark_epoch(epoch)
        if due(config.validate_interval_updates, config.validate_frequency):
            self.validate()
        if due(config.save_interval_updates, config.save_frequency) or (updated and step in self.config.milestones()):
            self.save(checkpoint.update_path(config.output_dir, step))

    def log(self) -> None:
        """Write the interval since the last line; the only place where training waits for the device."""
        if not self._unlogged:
            return
        work = self.train_loader.take_work()
        self.metrics.add({"data_wait": work.waited})
        sums = self.metrics.reduce(self.device)
        seconds = time.perf_counter() - self._clock
        for interval in (self._since_validation, self._epoch):
            interval.add({name: sums[name] for name in sums if REDUCTIONS[name] == "sum"}, self._unlogged, seconds)
        left = self.config.optim.max_update - self.progress.step
        self._refuse_collapse(sums)
        values = self._values(sums, self._unlogged, seconds) | {
            "eta": left * seconds / self._unlogged,
            "data_wait": 100 * sums["data_wait"] / seconds,
            "lr": self.schedule(max(self.progress.step - 1, 0)),
        }
        if "grad_norm" in sums:
            values["grad_norm"] = sums["grad_norm"]
        if self.config.precision.fp16:
            values |= {"loss_scale": self.optimizer.loss_scale, "skipped": float(self.optimizer.num_skipped)}
        if isinstance(self.task, PretrainTask) and self.task.model.quantizer is not None:
            values["temperature"] = self.task.model.quantizer.temperature
        self.logger.log("train", (self.train_loader.epoch, self.progress.step), values)
        cause = work.cause_of_waiting(seconds, distributed.usable_cores() // distributed.local_processes())
        if cause and cause != self._cause_of_waiting:  # told once, not with every line
            log.warning("%.0f %% of the time is spent waiting for data: %s", 100 * work.waited / seconds, cause)
            self._cause_of_waiting = cause
        self._unlogged = 0
        self._clock = time.perf_counter()

    def validate(self) -> None:
        """Evaluate with the averaged weights (if there are any) and keep the best."""
        self.log()
        step = (self.train_loader.epoch, self.progress.step)
        average = self._since_validation
        if average.updates:
            self.logger.log("train_avg", step, self._values(average.sums, average.updates, average.seconds))
        self._since_validation = _Interval()
        bar = progress(self.valid_loader, desc="validation", total=len(self.valid_loader), unit="batch")
        with self.ema.swapped_in(self.task.model):
            values = evaluate(self.task, bar, self.device, self.dictionary)
        self.logger.log("val", step, values)
        score = values.get("wer", values["loss"])
        if math.isfinite(score) and (self.progress.best is None or score < self.progress.best):
            self.progress.best = score
            self.save(checkpoint.best_path(self.config.run.output_dir))
        self._clock = time.perf_counter()

    def save(self, path: Path) -> None:
        """Write a checkpoint, and remove those that are no longer wanted."""
        self.log()  # so that no checkpoint of a run that has gone wrong replaces a good one
        if self.config.run.save:
            position = self.train_loader.state_dict()  # a stream asks all ranks for it
            if distributed.is_main():
                checkpoint.save(path, self.state_dict(position))
                keep = checkpoint.Retention(milestones=self.config.milestones())
                keep.prune(self.config.run.output_dir, final=self.config.optim.max_update)
                log.info("saved %s", path)
        self._clock = time.perf_counter()

    def rescue(self) -> None:
        """Save where a run of one process stands; several may no longer agree on where that is."""
        if self.progress.step and distributed.world_size() == 1:
            self.save(checkpoint.update_path(self.config.run.output_dir, self.progress.step))

    def state_dict(self, position: Mapping[str, Any]) -> dict[str, Any]:
        """All that a checkpoint holds; `position`: the loader's."""
        config, scaler = self.config, self.optimizer.scaler
        return {
            "mode": config.mode,
            "config": flags.to_dict(config),
            "model": {**self.frozen_weights, **self.optimizer.master_weights()},
            "labels": list(self.dictionary.symbols) if self.dictionary else None,
            "sample_rate": config.model.sample_rate,
            "normalize": config.model.normalize,
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "ema": self.ema.state_dict(),
            "loader": position,
            "progress": vars(self.progress).copy(),
            "origin": None,
        }

    def load_state_dict(self, state: Mapping[str, Any], path: Path) -> None:
        """Go on where a checkpoint stands; its weights are in the model already."""
        missing = [name for name in ("optimizer", "progress") if state.get(name) is None]
        if missing:
            raise CheckpointError(
                f"{path}: cannot be resumed, it has no {' and no '.join(missing)}; start a new run from its weights, "
                "with --init_from or --w2v_path and another --output_dir"
            )
        moments, average = state["optimizer"], state.get("ema")
        if state.get("origin"):  # other programs keep moments and averages of weights that do not train here, too
            trained = self.optimizer.master_weights()
            moments, average = ({n: table[n] for n in trained if n in table} for table in (moments, average or {}))
        self.optimizer.load_state_dict(moments)
        if self.optimizer.scaler and state.get("scaler"):
            self.optimizer.scaler.load_state_dict(state["scaler"])
        self.ema.load_state_dict(average or None)
        if state.get("loader"):
            self.train_loader.load_state_dict(state["loader"])
        self.progress = Progress(**state["progress"])

    def close(self) -> None:
        """Write what is left and stop the workers."""
        measured = self._benchmark[self.config.run.num_warmup_epochs :]
        if measured:
            means = {name: sum(epoch[name] for epoch in measured) / len(measured) for name in measured[0]}
            self.logger.log("benchmark", (), means)
        elif self.config.run.num_epochs:
            log.warning("--max_update ended the run before an epoch could be measured; raise it")
        self.train_loader.close()
        self.logger.close()

    def _refuse_collapse(self, sums: Mapping[str, float]) -> None:
        """Stop where going on cannot help; every rank sees the same sums."""
        folder, step = self.config.run.output_dir, self.progress.step
        if not sums["ntokens"]:
            raise TrainingError(
                "no frame was masked, so there is nothing to learn; lower --mask_length, or drop --no_mask_overlap"
                if isinstance(self.task, PretrainTask)
                else "all transcripts are empty, so there is nothing to learn; check the label file"
            )
        broken = [name for name in ("loss", "grad_norm") if not math.isfinite(sums.get(name, 0.0))]
        if broken and not self.config.precision.fp16:  # in fp16 the loss scaler skips such updates, or gives up
            raise TrainingError(
                f"{' and '.join(broken)} not finite by update {step}; the last checkpoint in {folder} is of before; "
                "go on from it with --resume and a lower --lr"
            )

    def _end_benchmark_epoch(self, epoch: int) -> None:
        values = self._values(self._epoch.sums, self._epoch.updates, self._epoch.seconds)
        self._benchmark.append(values)
        self._epoch = _Interval()
        self.logger.log("epoch", (epoch, self.progress.step), values)

    def _values(self, sums: Mapping[str, float], updates: int, seconds: float) -> dict[str, float]:
        rate = self.config.model.sample_rate
        speed = throughput(sums, updates=updates, seconds=seconds, sample_rate=rate)
        return summarize(sums, self.config.mode) | speed
