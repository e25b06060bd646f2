"""A training run: its parts, its progress, and what happens once in a while (log, validate, save)."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from common import checkpoint, distributed, flags, sharding
from common.checkpoint_writer import CheckpointWriter
from common.data.collate import Batch
from common.data.loader import UpdateLoader, ValidLoader
from common.ema import Ema
from common.errors import CheckpointError, Stopped, TrainingError, one_line
from common.labels import Dictionary
from common.lock import FolderLock
from common.logger import RunLogger, progress
from common.metrics import Metrics
from common.precision import MixedPrecisionOptimizer
from common.preemption import Preemption
from common.watchdog import Watchdog
from wav2vec2 import bad_batch
from wav2vec2.bad_batch import BadBatch
from wav2vec2.config import Config
from wav2vec2.culprits import Culprit, Faults, Tried, WentBack, not_finite
from wav2vec2.evaluate import evaluate
from wav2vec2.health_rules import make_health, training_figures, validation_figures
from wav2vec2.logging import REDUCTIONS, summarize, throughput
from wav2vec2.start import newest_checkpoint
from wav2vec2.task import FinetuneTask, PretrainTask

log = logging.getLogger(__name__)

_LAST_WRITE = 30.0  # seconds that a checkpoint under way has when the run must end; a dead disk never answers


@dataclass
class Progress:
    """How far a run has come; epoch and position belong to the loader."""

    step: int = 0  # finished updates
    best: float | None = None  # lowest WER, or loss in pre-training
    validation_due: bool = False  # a signal came before or during it, or an error


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
    preemption: Preemption = field(default_factory=Preemption)
    watchdog: Watchdog = field(default_factory=Watchdog)
    lock: FolderLock | None = None  # of process 0
    writer: CheckpointWriter = field(default_factory=CheckpointWriter)
    metrics: Metrics = field(default_factory=lambda: Metrics(REDUCTIONS))
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        """Start the clocks."""
        self.health, self.faults = make_health(self.config), Faults()
        self._since_validation = _Interval()
        self._epoch = _Interval()
        self._benchmark: list[dict[str, float]] = []
        self._unlogged = self._overflows = 0
        self._cause_of_waiting = ""
        self._stopping = self._is_best = False
        self._since_save = 0.0
        self._saved_step: int | None = None  # what the newest checkpoint of this process stands for
        self._clock = self._saved_at = time.perf_counter()
        self.watchdog.is_asked = lambda: self.preemption.asked is not None
        self.watchdog.before_end = lambda: self.writer.join(_LAST_WRITE)

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to do: the run is finished, or all processes agreed to stop."""
        return self.finished or self._stopping

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

    def begin(self) -> None:
        """Do what a signal kept the run before from doing."""
        if self.progress.validation_due:
            self.validate()
            self._save_due(True)

    def next_update(self) -> list[Batch]:
        """This process's micro-batches of the next update."""
        self.watchdog.at("waiting for the data", update=self.progress.step + 1)
        self._pass_by()
        batches = self.train_loader.next_update(self.device)
        self.faults.begin(self.progress.step, (self.train_loader.epoch, self.train_loader.position - 1), batches)
        return batches

    def in_turn(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """The micro-batches one by one, while the watchdog knows which."""
        for number, batch in enumerate(batches, start=1):
            self.watchdog.at(f"forward and backward of micro-batch {number} of {len(batches)}", ids=batch.ids)
            yield batch
        self.watchdog.at("update of the weights")

    def after_update(self, updated: bool) -> None:
        """Count the update, and do what is due after it."""
        self.writer.check()
        self.progress.step += int(updated)
        self._unlogged += 1
        self._overflows += int(not updated)
        self._stopping = self.preemption.agreed(self.device)
        self.faults.end(self.metrics)
        if not self.train_loader.at_epoch_end:
            self._pass_by()
        try:
            self.health.count(self.progress.step, skipped=not updated)
            self._do_what_is_due(updated)
        except WentBack:
            self._is_best = False

    def _do_what_is_due(self, updated: bool) -> None:
        config, step = self.config.run, self.progress.step
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
        milestone = updated and step in self.config.milestones()
        self._save_due(due(config.save_interval_updates, config.save_frequency) or milestone)

    def log(self) -> None:
        """Write the interval since the last line; the only place where training waits for the device."""
        if not self._unlogged:
            return
        work = self.train_loader.take_work()
        self.metrics.add({"data_wait": work.waited, "since_save": time.perf_counter() - self._saved_at})
        self.metrics.add({"weight_norm": self.optimizer.weight_norm()})
        sums = self.metrics.reduce(self.device)
        seconds = time.perf_counter() - self._clock
        for interval in (self._since_validation, self._epoch):
            interval.add({name: sums[name] for name in sums if REDUCTIONS[name] == "sum"}, self._unlogged, seconds)
        left = self.config.optim.max_update - self.progress.step
        self._check_sums(sums)
        self._since_save = sums["since_save"]  # the same in all processes, unlike their clocks
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
        if self._overflows:
            log.info(
                "%d of %d updates overflowed in fp16 and were skipped, the loss scale is %g now; a few are normal, "
                "%d in a row are not",
                *(self._overflows, self._unlogged, self.optimizer.loss_scale, self.config.health.max_overflows),
            )
        cause = work.cause_of_waiting(seconds, distributed.usable_cores() // distributed.local_processes())
        if cause and cause != self._cause_of_waiting:  # told once, not with every line
            log.warning("%.0f %% of the time is spent waiting for data: %s", 100 * work.waited / seconds, cause)
            self._cause_of_waiting = cause
        self._unlogged = self._overflows = 0
        self.faults.forget()
        self._clock = time.perf_counter()
        self.health.check(self.progress.step, training_figures(self.config, values))

    def validate(self) -> None:
        """Evaluate with the averaged weights (if there are any); put off if a signal asks to stop."""
        self.log()
        step = (self.train_loader.epoch, self.progress.step)
        average = self._since_validation
        if average.updates:
            self.logger.log("train_avg", step, self._values(average.sums, average.updates, average.seconds))
        self._since_validation = _Interval()
        self.progress.validation_due = True  # until it is done, also where an error ends it
        bar = progress(self.valid_loader, desc="validation", total=len(self.valid_loader), unit="batch")
        with self.ema.swapped_in(self.task.model):
            values = evaluate(self.task, self._until_asked(bar), self.device, self.dictionary)
        cut_short = distributed.sum_across_ranks(float(self._anyone_is_asked()), self.device)
        self.progress.validation_due = bool(cut_short)
        if self.progress.validation_due:
            self._stopping = True
        else:
            self.logger.log("val", step, values)
            self.health.check(self.progress.step, validation_figures(values))
            score = values.get("wer", values["loss"])
            self._is_best = math.isfinite(score) and (self.progress.best is None or score < self.progress.best)
            self.progress.best = score if self._is_best else self.progress.best
        self._clock = time.perf_counter()

    def save(self, *paths: Path) -> None:
        """Write a checkpoint, under one or several names, and remove those that are no longer wanted."""
        self.log()  # so that no checkpoint of a run that has gone wrong replaces a good one
        if self.config.run.save:
            self.watchdog.at("saving")
            if self._path in paths:
                self.health.saved(self.progress.step)
            kept = (*self.config.milestones(), *self.health.kept)
            position = self.train_loader.state_dict()  # a stream asks all processes for it
            state = sharding.gathered(self.state_dict(position))  # and so do shards
            if distributed.is_main():
                self.writer.save(paths, state, lambda: self._after_saving(paths, kept))
            if self._path in paths:
                self._saved_step = self.progress.step
        self._clock = self._saved_at = time.perf_counter()
        self._since_save = 0.0

    def rescue(self) -> None:
        """Save where a run of one process stands; several may no longer agree on where that is."""
        if self.progress.step != (self._saved_step or 0) and distributed.world_size() == 1:
            with suppress(WentBack):
                self.save(self._path)

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
            "health": {"rules": self.health.state_dict(), "faults": self.faults.state_dict()},
            "processes": distributed.world_size(),
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
        if state.get("health"):
            self.health.load_state_dict(state["health"]["rules"])
            self.faults.load_state_dict(state["health"]["faults"])
        elif path == self._path:
            self.health.saved(self.progress.step)
        before, now = state.get("processes"), distributed.world_size()
        position = (state.get("loader") or {}).get("position", self.train_loader.position)
        if before not in (None, now) and self.train_loader.position == position:  # else it has told what is different
            log.info(
                "%s was written by %d processes, this run has %d: the same data in the same order; sums over processes "
                "are rounded differently",
                path,
                before,
                now,
            )

    def end(self) -> None:
        """Write what is left. Raises Stopped where the run was asked to stop before its last update."""
        self.watchdog.at("waiting for the last checkpoint")
        self.writer.wait()
        distributed.barrier()  # while all are watched: the others must not leave a process 0 that could not write
        if self.progress.validation_due or not self.finished:
            kept = f"{self._path} is saved" if self.config.run.save else "--no_save: nothing is saved"
            asked = self.preemption.asked.name if self.preemption.asked else "a signal to another process"
            raise Stopped(
                f"{asked}, after update {self.progress.step} of {self.config.optim.max_update}; {kept}, and the same "
                "command (with --resume) goes on from there",
                self.config.run.preempt_exit_code,
            )
        measured = self._benchmark[self.config.run.num_warmup_epochs :]
        if measured:
            means = {name: sum(epoch[name] for epoch in measured) / len(measured) for name in measured[0]}
            self.logger.log("benchmark", (), means)
        elif self.config.run.num_epochs:
            log.warning("--max_update ended the run before an epoch could be measured; raise it")

    def close(self) -> None:
        """Stop workers and threads, and let go of the files; after an error, too."""
        self.train_loader.close()
        self.writer.join()
        failed = self.writer.take_error()
        if failed is not None:  # the run ends for another reason, which is told as well
            log.error("the last checkpoint is not saved: %s", one_line(failed))
        self.logger.close()
        if self.lock is not None:
            self.lock.release()

    def checkpoint_bytes(self) -> int:
        """About how large a checkpoint is."""
        trained = sum(weight.numel() for weight in self.optimizer.master_weights().values())
        averages = 1 if self.ema.active else 0
        return 4 * (trained * (3 + averages) + sum(weight.numel() for weight in self.frozen_weights.values()))

    @property
    def _path(self) -> Path:
        return checkpoint.update_path(self.config.run.output_dir, self.progress.step)

    def _save_due(self, due: bool = False) -> None:
        """Save if that is due: by updates, by the clock, because the result is the best, or because the run stops."""
        minutes = self.config.run.save_interval_minutes
        by_clock = minutes > 0 and self._since_save >= 60 * minutes
        paths = [checkpoint.best_path(self.config.run.output_dir)] if self._is_best else []
        if due or by_clock or (self._stopping and self._saved_step != self.progress.step):
            paths.append(self._path)
        self._is_best = False
        if paths:
            self.save(*paths)

    def _after_saving(self, paths: Sequence[Path], kept: tuple[int, ...]) -> None:
        """In the thread of the writer."""
        keep = checkpoint.Retention(milestones=kept)
        keep.prune(self.config.run.output_dir, final=self.config.optim.max_update)
        for path in paths:
            log.info("saved %s", path)

    def _until_asked(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches of validation, while no signal asks to stop."""
        for batch in batches:
            if self._anyone_is_asked():
                return
            self.watchdog.at("validation", ids=batch.ids)
            yield batch

    def _anyone_is_asked(self) -> bool:
        """Whether this process, or as far as it has heard another one, was asked to stop."""
        return self.preemption.asked is not None or self.watchdog.others_are_asked

    def _check_sums(self, sums: Mapping[str, float]) -> None:
        """Refuse what cannot be logged or learnt from; every rank sees the same sums."""
        if not sums["ntokens"]:
            raise TrainingError(
                "no frame was masked, so there is nothing to learn; lower --mask_length, or drop --no_mask_overlap"
                if isinstance(self.task, PretrainTask)
                else "all transcripts are empty, so there is nothing to learn; check the label file"
            )
        broken = not_finite(sums, fp16=self.config.precision.fp16)
        if broken:
            self._go_back_or_end(broken)

    def _go_back_or_end(self, broken: Sequence[str]) -> NoReturn:
        """Something is not finite: go on from the newest checkpoint without the update that did it, once, or end."""
        culprit, again = self.faults.culprit(broken), self.faults.left_out is not None
        what = f"{', '.join(broken)} not finite " + (
            f"in {culprit.text}" if culprit else f"by update {self.progress.step}"
        )
        rollback = self.config.health.on_nan == "rollback"
        if culprit and rollback and not again:
            self.writer.wait()
            newest = newest_checkpoint(Path(self.config.run.output_dir))
            if newest:
                self._go_back(*newest, culprit.update)
                log.warning("%s; goes on from %s without this update", what, newest[0])
                raise WentBack
        written = self._record_culprit(culprit) if culprit else ""
        remedies = ["a lower --lr or a smaller --clip_norm", "--bf16 instead of --fp16"]
        if culprit and self.health.kept and not rollback:
            remedies.insert(0, "--resume --on_nan rollback")
        remedies += ["data without these utterances"] if culprit else []
        raise TrainingError(
            f"{what}{', although a rollback left out another update before' if again else ''}{written}; "
            f"{self.health.last_healthy}; try {', '.join(remedies)}"
        )

    def _record_culprit(self, culprit: Culprit) -> str:
        """Write the batches of the update that went wrong; where they are, for a message."""
        folder, update = self.config.run.output_dir, culprit.update
        batches = self.train_loader.read_again(update.epoch, update.position)
        if batches is None:
            return "; a stream cannot be read again, so its batch is not written"
        self._record(update, batches)
        names = ", ".join(bad_batch.file_name(update.step, rank) for rank in culprit.ranks)
        return f"; its batch is in {folder}: {names}, for utils/replay_batch.py"

    def _go_back(self, path: Path, state: Mapping[str, Any], bad: Tried) -> None:
        """Stand where a checkpoint stands, and write it anew with what is left out from now on."""
        self.watchdog.at("going back to a checkpoint")
        self.optimizer.load_master(state["model"])
        self.load_state_dict(state, path)
        self.progress.validation_due = False
        self.faults.left_out = (bad.epoch, bad.position)
        self._since_validation, self._epoch = _Interval(), _Interval()
        self._unlogged = self._overflows = 0
        self.save(path)

    def _pass_by(self) -> None:
        """Take the update that is left out from the loader when its turn has come, and write its batch to a file."""
        place = self.train_loader.next_place
        if place == self.faults.left_out:
            batches = self.train_loader.next_update(self.device)
            self._record(Tried(self.progress.step, *place, ids=()), batches)
            name = bad_batch.file_name(self.progress.step, distributed.rank())
            log.warning("leaves out update %d of epoch %d, written to %s", place[1] + 1, place[0], name)

    def _record(self, update: Tried, batches: Sequence[Batch]) -> None:
        """Write this process's share of an update to a file; all ranks call it together."""
        count = distributed.sum_across_ranks(self.task.count_units(batches), self.device).item()
        BadBatch(
            mode=self.config.mode,
            step=update.step,
            epoch=update.epoch,
            position=update.position,
            seed=self.config.run.seed,
            rank=distributed.rank(),
            world=distributed.world_size(),
            count=count,
            batches=tuple(batches),
        ).write(self.config.run.output_dir)

    def _end_benchmark_epoch(self, epoch: int) -> None:
        values = self._values(self._epoch.sums, self._epoch.updates, self._epoch.seconds)
        self._benchmark.append(values)
        self._epoch = _Interval()
        self.logger.log("epoch", (epoch, self.progress.step), values)

    def _values(self, sums: Mapping[str, float], updates: int, seconds: float) -> dict[str, float]:
        rate = self.config.model.sample_rate
        speed = throughput(sums, updates=updates, seconds=seconds, sample_rate=rate)
        return summarize(sums, self.config.mode) | speed
