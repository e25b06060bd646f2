"""Pre-train wav2vec 2.0 on audio, or fine-tune it with CTC on transcripts: the algorithm on one screen."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext

from common import distributed, rng
from common.data.collate import Batch
from common.entry import run_program
from common.errors import DataError
from common.logger import setup_console
from common.preemption import Preemption
from common.watchdog import Watchdog
from wav2vec2.arg_parser import parse_train
from wav2vec2.build import build_run
from wav2vec2.run import Run


def main(argv: Sequence[str]) -> None:
    """Train as the command line says."""
    config = parse_train(argv)
    with Preemption() as preemption, distributed.session(config.run.device) as device, ExitStack() as at_last:
        setup_console(is_main=distributed.is_main())
        with Watchdog(**config.run.watched()) as watchdog:
            run = build_run(config, device, ["train.py", *argv], preemption=preemption, watchdog=watchdog)
            at_last.callback(run.close)  # once all processes know how this one ends, however long it takes
            train(run)


def train(run: Run) -> None:
    """Train from wherever the run stands to its last update, or until it is asked to stop."""
    try:
        run.begin()
        while not run.ended:
            updated = train_step(run, run.next_update(), run.progress.step)
            run.after_update(updated)
        run.end()
    except DataError:
        run.rescue()  # a bad file must not cost what was learnt before it
        raise


def train_step(run: Run, batches: Sequence[Batch], step: int) -> bool:
    """Make one update from update_freq micro-batches; False if fp16 overflowed and it was skipped."""
    run.set_step(step)  # Gumbel temperature, LayerDrop, freezing
    count = distributed.sum_across_ranks(run.task.count_units(batches), run.device)
    for micro, batch in enumerate(run.in_turn(batches)):
        rng.seed_all(run.config.run.seed, "dropout", step, micro, distributed.rank())
        last = micro == len(batches) - 1
        with nullcontext() if last else run.engine.no_sync():
            loss, stats = run.engine(batch, count)
            run.optimizer.backward(loss)  # scales the loss in fp16
        run.metrics.add(stats)  # stays on the device
    grad_norm = run.optimizer.clip_grad_norm(run.config.optim.clip_norm)
    updated = run.optimizer.step(lr=run.schedule(step))  # and forgets the gradients
    if updated:
        run.metrics.add({"grad_norm": grad_norm})
        run.ema.update(run.optimizer.master_weights())
    return updated


if __name__ == "__main__":
    run_program(main, sys.argv[1:], rank=distributed.launched_rank(), local_rank=distributed.local_rank())
