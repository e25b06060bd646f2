"""A run that is asked to stop, at every point where that can happen, and what is saved when."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from equal import assert_same
from tiny import MODEL_FLAGS, corpus

import train
from common import checkpoint
from common.checkpoint_writer import CheckpointWriter
from common.data import workers
from common.errors import CheckpointError, DataError, Stopped
from common.preemption import Preemption
from common.watchdog import Watchdog
from wav2vec2 import run as run_module
from wav2vec2.run import Run

FLAGS = [*MODEL_FLAGS, "--num_workers", "0", "--device", "cpu", "--max_tokens", "40000", "--num_negatives", "10"]
FLAGS += ["--mask_length", "3", "--lr", "0.002", "--max_update", "6", "--ema", "0.5", "--resume"]
# nothing is validated, and only the end is saved
RARELY = ("--validate_frequency", "1000", "--save_frequency", "1000", "--keep_milestones", "100")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"), number=14)


def run(data: Path, output: Path, *more: str) -> None:
    train.main(["pretrain", "--data", str(data), "--output_dir", str(output), *FLAGS, *more])


def ask_to_stop(monkeypatch, name: str, at: int) -> None:
    """Send SIGTERM while Run's method `name` does its work for the update `at`."""
    real = getattr(Run, name)

    def asked(self: Run, *args, **kwargs):
        if self.progress.step == at:
            os.kill(os.getpid(), signal.SIGTERM)
            while self.preemption.asked is None:
                time.sleep(0.001)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Run, name, asked)


def everything(folder: Path, name: str = "wav2vec2_update6.pt") -> dict:
    return checkpoint.load(folder / name)


def assert_same_state(found: dict, expected: dict) -> None:
    for name in ("model", "ema", "optimizer", "loader", "progress"):
        assert_same(found[name], expected[name], name)


# Updates 4 and 6 are validated here; 6 is the last
@pytest.mark.parametrize(
    ("method", "at", "stands_at"),
    [("set_step", 2, 3), ("next_update", 3, 4), ("validate", 4, 4), ("validate", 6, 6), ("save", 5, 6)],
)
def test_it_stops_after_the_update_and_goes_on_as_if_nothing_had_been(
    data, tmp_path, monkeypatch, method, at, stands_at
):
    often = ("--validate_interval_updates", "4", "--validate_frequency", "1000", "--save_interval_updates", "5")
    run(data, tmp_path / "straight", *often)
    ended = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        ask_to_stop(patch, method, at)
        message = f"SIGTERM, after update {stands_at} of 6; .*update{stands_at}.pt is saved"
        with pytest.raises(Stopped, match=message) as told:  # at 6 it lacks the validation
            run(data, ended, *often)
        assert told.value.exit_status == 75
    assert checkpoint.update_paths(ended)[0].name == f"wav2vec2_update{stands_at}.pt"
    run(data, ended, *often)
    assert_same_state(everything(ended), everything(tmp_path / "straight"))
    best = [everything(folder, "wav2vec2_best.pt") for folder in (ended, tmp_path / "straight")]
    assert best[0]["progress"]["best"] == best[1]["progress"]["best"]
    assert all(torch.equal(best[0]["ema"][name], value) for name, value in best[1]["ema"].items())


def test_a_signal_to_another_process_ends_a_validation_too(data, tmp_path, monkeypatch):
    often = ("--validate_interval_updates", "4", "--validate_frequency", "1000")
    asked = property(lambda dog: dog._place[0] == "validation")  # heard of after its first batch
    monkeypatch.setattr(Watchdog, "others_are_asked", asked)
    with pytest.raises(Stopped, match="a signal to another process, after update 4 of 6"):
        run(data, tmp_path, *often)
    state = everything(tmp_path, "wav2vec2_update4.pt")["progress"]
    assert (state["validation_due"], state["best"]) == (True, None)


def test_a_write_that_fails_last_is_told(data, tmp_path, monkeypatch, caplog):
    """A bad file ends the run, which saves what it has; that the disk is full then must not be a secret."""

    def fail(*_: object) -> None:
        monkeypatch.setattr(checkpoint, "save", full)
        raise DataError("dev.tsv:2: a.wav: is gone")

    def full(path: Path, content: dict) -> None:
        raise CheckpointError(f"{path}: could not be written (No space left on device)")

    monkeypatch.setattr(run_module, "evaluate", fail)
    with pytest.raises(DataError, match="is gone"):
        run(data, tmp_path, "--validate_interval_updates", "2", "--keep_milestones", "100", "--save_frequency", "1000")
    assert "the last checkpoint is not saved: " in caplog.text
    assert "update2.pt: could not be written" in caplog.text


def test_a_validation_that_a_bad_file_has_ended_is_made_up_for(data, tmp_path, monkeypatch):
    often = ("--validate_interval_updates", "3", "--validate_frequency", "1000", "--save_frequency", "1000")
    run(data, tmp_path / "straight", *often)

    def fail(*_: object) -> None:
        raise DataError("dev.tsv:2: a.wav: is gone")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "evaluate", fail)
        with pytest.raises(DataError, match="is gone"):
            run(data, tmp_path / "ended", *often)
    assert checkpoint.update_paths(tmp_path / "ended")[0].name == "wav2vec2_update3.pt"
    run(data, tmp_path / "ended", *often)
    assert_same_state(everything(tmp_path / "ended"), everything(tmp_path / "straight"))
    best = [everything(tmp_path / name, "wav2vec2_best.pt")["progress"] for name in ("ended", "straight")]
    assert best[0] == best[1]


def test_the_best_checkpoint_does_not_stand_for_that_of_the_update(data, tmp_path, monkeypatch):
    """Update 2 is validated and is the best; the try after it overflows in fp16, and a signal comes: 2 is saved."""
    tried = []
    real = Run.after_update

    def after(self: Run, updated: bool) -> None:
        tried.append(updated)
        if len(tried) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            while self.preemption.asked is None:
                time.sleep(0.001)
        real(self, updated and len(tried) != 3)

    monkeypatch.setattr(Run, "after_update", after)
    with pytest.raises(Stopped, match="after update 2 of 6; .*wav2vec2_update2.pt is saved"):
        run(data, tmp_path, *RARELY, "--validate_interval_updates", "2")
    assert (tmp_path / "wav2vec2_update2.pt").exists()


def test_how_a_process_ends_is_told_before_its_last_write_is_waited_for(data, tmp_path, monkeypatch):
    """Other processes would wait as long for the reason. Where they end this one, a write that hangs is left behind."""
    told = threading.Event()
    real_write, real_exit = CheckpointWriter._write, Watchdog.__exit__

    def write(self: CheckpointWriter, *job) -> None:
        assert told.wait(30)
        real_write(self, *job)

    def tell(self: Watchdog, *error) -> None:
        real_exit(self, *error)
        told.set()

    def fail(self: Run, step: int) -> None:
        if step == 3:
            self.watchdog.before_end()
            raise ValueError("a defect")

    monkeypatch.setattr(run_module, "_LAST_WRITE", 0.1)
    monkeypatch.setattr(CheckpointWriter, "_write", write)
    monkeypatch.setattr(Watchdog, "__exit__", tell)
    monkeypatch.setattr(Run, "set_step", fail)
    with pytest.raises(ValueError, match="a defect"):
        run(data, tmp_path, *RARELY, "--save_interval_updates", "3")
    assert (tmp_path / "wav2vec2_update3.pt").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_a_signal_to_the_whole_job_while_a_worker_starts_costs_nothing(data, tmp_path, monkeypatch):
    """The worker gets it before it is ready for it; it outlives that, and the parent stops in order."""
    one = ("--num_workers", "1", *RARELY)
    run(data, tmp_path / "straight", *one)
    real = workers.shield_worker

    def shield() -> None:
        for pid in (os.getpid(), os.getppid()):
            os.kill(pid, signal.SIGTERM)
        real()

    with monkeypatch.context() as patch:
        patch.setattr(workers, "shield_worker", shield)
        with pytest.raises(Stopped, match="SIGTERM, after update 1 of 6"):
            run(data, tmp_path / "stopped", *one)
    run(data, tmp_path / "stopped", *one)
    assert_same_state(everything(tmp_path / "stopped"), everything(tmp_path / "straight"))


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_a_worker_that_dies_during_an_update_costs_nothing(data, tmp_path, monkeypatch):
    """The update is finished, and saved; the same command comes to the weights of a run without the death."""
    one = ("--num_workers", "1", *RARELY)
    run(data, tmp_path / "straight", *one)
    real = Run.set_step

    def killed(self: Run, step: int) -> None:
        if step == 3:
            worker = min(child.pid for child in multiprocessing.active_children())
            os.kill(worker, signal.SIGKILL)
            os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
        real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "set_step", killed)
        with pytest.raises(DataError, match="a process that reads audio was killed"):
            run(data, tmp_path / "killed", *one)
    assert [path.name for path in checkpoint.update_paths(tmp_path / "killed")] == ["wav2vec2_update4.pt"]
    run(data, tmp_path / "killed", *one)
    assert_same_state(everything(tmp_path / "killed"), everything(tmp_path / "straight"))


def test_a_run_that_does_not_save_says_so(data, tmp_path, monkeypatch):
    ask_to_stop(monkeypatch, "set_step", 2)
    with pytest.raises(Stopped, match="--no_save: nothing is saved") as told:
        train.main(["pretrain", "--data", str(data), "--output_dir", str(tmp_path), *FLAGS[:-1], "--no_save",
                    "--preempt_exit_code", "9"])  # fmt: skip
    assert told.value.exit_status == 9


def test_minutes_between_checkpoints_count_from_the_last_one(data, tmp_path, monkeypatch):
    """With a clock of 40 s per update and one minute, every second update is saved: at 2 and 4; 6 is the last."""
    now, saved = [0.0], []
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: now[0])
    real_update, real_save = Run.after_update, Run.save

    def slow(self: Run, updated: bool) -> None:
        now[0] += 40
        real_update(self, updated)

    def noted(self: Run, *paths: Path) -> None:
        saved.append((self.progress.step, [path.name for path in paths]))
        real_save(self, *paths)

    monkeypatch.setattr(Run, "after_update", slow)
    monkeypatch.setattr(Run, "save", noted)
    rare = ("--validate_frequency", "1000", "--save_frequency", "1000", "--keep_milestones", "100")
    run(data, tmp_path, *rare, "--log_frequency", "1", "--save_interval_minutes", "1")
    steps = [step for step, _ in saved]
    assert steps == [2, 4, 6]
    assert saved[-1][1] == ["wav2vec2_best.pt", "wav2vec2_update6.pt"]  # one copy of the state for both


def test_all_that_is_due_at_once_is_copied_once(data, tmp_path, monkeypatch):
    copies, real = [], checkpoint.snapshot
    monkeypatch.setattr(checkpoint, "snapshot", lambda state: copies.append(1) or real(state))
    run(data, tmp_path, "--validate_frequency", "1000", "--save_frequency", "1000", "--keep_milestones", "100")
    assert len(copies) == 1
    assert {path.name for path in tmp_path.glob("*.pt")} == {"wav2vec2_best.pt", "wav2vec2_update6.pt"}


def test_training_does_not_wait_for_the_disk(data, tmp_path, monkeypatch):
    """While a checkpoint is being written updates go on; the next one waits."""
    seen, steps = [], []
    real_save, real_step = checkpoint.save, Run.set_step

    def slow(path, content):
        start = len(steps)
        deadline = time.monotonic() + 30
        while len(steps) == start and content["progress"]["step"] < 6 and time.monotonic() < deadline:
            time.sleep(0.001)
        seen.append((content["progress"]["step"], len(steps) - start))
        real_save(path, content)

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr(Run, "set_step", lambda self, step: steps.append(step) or real_step(self, step))
    run(data, tmp_path, "--validate_frequency", "1000", "--save_frequency", "1000", "--keep_milestones", "2", "4")
    assert [step for step, _ in seen if step < 6] == [2, 4]
    assert all(updates >= 1 for step, updates in seen if step < 6)


def test_a_preemption_that_is_not_entered_notices_nothing():
    assert not Preemption().agreed(torch.device("cpu"))
