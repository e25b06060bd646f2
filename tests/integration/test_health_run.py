"""Runs that fall ill: a loss that is not finite, from real audio; collapse; what is kept, replayed and resumed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT
from equal import assert_same
from tiny import MODEL_FLAGS, corpus

import train
from common import checkpoint
from common.data.collate import Batch
from common.errors import CheckpointError, ConfigError, TrainingError
from common.labels import SPECIAL_SYMBOLS, Dictionary
from utils import make_shards, replay_batch
from wav2vec2 import bad_batch
from wav2vec2.arg_parser import parse_train
from wav2vec2.build import build_run
from wav2vec2.evaluate import score
from wav2vec2.logging import summarize
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.run import Run
from wav2vec2.task import PretrainTask

FLAGS = [
    *MODEL_FLAGS,
    *("--extractor_mode", "layer_norm"),  # the group norm of the other mode makes even such audio finite
    *("--num_workers", "0", "--device", "cpu", "--validate_frequency", "100", "--max_tokens", "20000"),
    *("--num_negatives", "10", "--mask_length", "3", "--lr", "0.002", "--encoder_layerdrop", "0.1"),
    *("--max_update", "12", "--log_frequency", "5", "--save_interval_updates", "3", "--keep_milestones", "6"),
]
BAD_UPDATE = 8  # of 12: found at the log line of update 9, before which update 6 was saved
MOST = 3e38  # finite, so audio of it is read; its square is not


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"), number=40, low=0.7)


def command(data: Path, output: Path, *more: str) -> list[str]:
    return ["pretrain", "--data", str(data), "--output_dir", str(output), *FLAGS, *more]


def utterances(data: Path, output: Path, *positions: int, more: Sequence[str] = ()) -> list[str]:
    """The first utterances of some updates of the first epoch."""
    run = build_run(parse_train(command(data, output, *more)), torch.device("cpu"), [])
    try:
        found = [run.train_loader.read_again(1, position) for position in positions]
        return [batches[0].ids[-1] for batches in found if batches]
    finally:
        run.close()


def poison(data: Path, folder: Path, names: Sequence[str]) -> Path:
    """A copy of the corpus in which some utterances of the training list are far too loud."""
    shutil.copytree(data, folder)
    lines = (folder / "train.tsv").read_text().splitlines()
    (folder / "train.tsv").write_text("\n".join([str(folder / "audio"), *lines[1:]]) + "\n")
    for name in names:
        path = folder / "audio" / f"{Path(name).stem}.wav"
        length = soundfile.info(path).frames
        signs = np.random.default_rng(0).choice([-1.0, 1.0], length)
        soundfile.write(path, (MOST * signs).astype(np.float32), 16000, subtype="FLOAT")
    return folder


@pytest.fixture(scope="module")
def poisoned(data, tmp_path_factory) -> tuple[Path, str]:
    """A corpus with one bad utterance, that of BAD_UPDATE; its name."""
    folder = tmp_path_factory.mktemp("poisoned")
    (name,) = utterances(data, folder / "plan", BAD_UPDATE - 1)
    return poison(data, folder / "data", [name]), name


def replayed(capsys: pytest.CaptureFixture[str], *paths: Path) -> str:
    capsys.readouterr()
    replay_batch.main(list(map(str, paths)))
    return capsys.readouterr().out


def last(output: Path) -> dict[str, Any]:
    return checkpoint.load(checkpoint.update_path(output, 12))


def learnt(state: dict[str, Any]) -> dict[str, Any]:
    return {name: state[name] for name in ("model", "optimizer", "scaler", "ema", "loader", "progress", "health")}


# ---- Not finite: stop ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(poisoned, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run that a bad batch has ended, and its message."""
    output = tmp_path_factory.mktemp("stopped")
    with pytest.raises(TrainingError) as error:
        train.main(command(poisoned[0], output))
    return output, str(error.value)


def test_a_loss_that_is_not_finite_names_update_utterances_file_and_checkpoint(poisoned, stopped):
    output, message = stopped
    for part in ("loss, grad_norm", f"update {BAD_UPDATE} (epoch 1", poisoned[1], "wav2vec2_update6.pt"):
        assert part in message
    assert f"bad_batch_update{BAD_UPDATE}_rank0.pt" in message
    assert "\n" not in message
    assert {path.name for path in output.glob("*.pt")} == {
        *("wav2vec2_update3.pt", "wav2vec2_update6.pt"),
        f"bad_batch_update{BAD_UPDATE}_rank0.pt",
    }


def test_the_recorded_batch_is_plain_and_whole(stopped):
    path = stopped[0] / f"bad_batch_update{BAD_UPDATE}_rank0.pt"
    content = torch.load(path, weights_only=True)
    assert (content["update"], content["epoch"], content["position"]) == (BAD_UPDATE, 1, BAD_UPDATE - 1)
    (batch,) = content["batches"]
    assert batch["audio_BS"].abs().max() == torch.tensor(MOST)
    recorded = bad_batch.read(path)
    assert recorded.count == recorded.batches[0].num_masked == int(batch["mask_BT"].sum())


# ---- Not finite: rollback --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rolled_back(poisoned, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("rolled_back")
    train.main(command(poisoned[0], output, "--on_nan", "rollback", "--ema", "0.9"))
    return output


def test_after_a_rollback_the_run_is_that_of_data_without_the_bad_update(poisoned, rolled_back, tmp_path, monkeypatch):
    def next_update(run: Run) -> Any:
        batches = run.train_loader.next_update(run.device)
        return next_update(run) if any(poisoned[1] in batch.ids for batch in batches) else batches

    monkeypatch.setattr(Run, "next_update", next_update)
    train.main(command(poisoned[0], tmp_path, "--ema", "0.9"))
    expected, found = last(tmp_path), last(rolled_back)
    for name in ("model", "optimizer", "ema", "loader", "progress"):
        assert_same(found[name], expected[name], name)
    assert found["loader"]["position"] == 13  # counted, not trained on
    recorded = bad_batch.read(rolled_back / f"bad_batch_update{BAD_UPDATE}_rank0.pt")
    assert poisoned[1] in recorded.batches[0].ids
    assert recorded.step == BAD_UPDATE - 1
    assert found["health"]["faults"]["left_out"] == [1, BAD_UPDATE - 1]


class Killed(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("tried", [8, 9, 11])  # call 9 goes back to update 6, call 10 meets the bad update again
def test_a_rollback_a_kill_and_a_resume_equal_the_rollback_alone(poisoned, rolled_back, tmp_path, monkeypatch, tried):
    more = ("--on_nan", "rollback", "--ema", "0.9")
    after_update, count = Run.after_update, 0

    def dying(run: Run, updated: bool) -> None:
        nonlocal count
        after_update(run, updated)
        count += 1
        if count == tried:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "after_update", dying)
        with pytest.raises(Killed):
            train.main(command(poisoned[0], tmp_path, *more))
    knows = tried >= 9  # which update is left out: the checkpoint does, so nothing needs to go back again
    train.main(command(poisoned[0], tmp_path, *(more[2:] if knows else more), "--resume"))
    assert_same(learnt(last(tmp_path)), learnt(last(rolled_back)))


def test_a_second_fault_ends_the_run(data, tmp_path):
    names = utterances(data, tmp_path / "plan", 7, 10)
    folder = poison(data, tmp_path / "data", names)
    with pytest.raises(TrainingError, match=r"update 10 \(epoch 1.*left out another.*wav2vec2_update9\.pt") as error:
        train.main(command(folder, tmp_path / "out", "--on_nan", "rollback"))
    assert names[1] in str(error.value)
    # the same position in the data as planned: the update that was left out is the one that has no number
    assert bad_batch.read(tmp_path / "out/bad_batch_update10_rank0.pt").position == 10


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(poisoned, tmp_path):
    more = ("--on_nan", "rollback", "--save_interval_updates", "0", "--keep_milestones", "12")
    with pytest.raises(TrainingError, match="no healthy checkpoint"):
        train.main(command(poisoned[0], tmp_path, *more))


def two_processes(data: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launcher, str(ROOT / "train.py"), *command(data, output, *more)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def poisoned_for_two(data, tmp_path_factory) -> tuple[Path, str]:
    """One bad utterance in the share of process 1: the second, shorter sub-batch of BAD_UPDATE."""
    folder = tmp_path_factory.mktemp("poisoned_for_two")
    (name,) = utterances(data, folder / "plan", BAD_UPDATE - 1, more=("--num_concat_batches", "2"))
    return poison(data, folder / "data", [name]), name


def test_two_processes_stop_together_and_name_the_one_that_had_the_batch(poisoned_for_two, tmp_path):
    folder, name = poisoned_for_two
    done = two_processes(folder, tmp_path)
    assert done.returncode != 0
    line = next(line for line in done.stderr.splitlines() if "not finite" in line)
    for part in (f"update {BAD_UPDATE} (epoch 1, process 1, utterances {name}", "wav2vec2_update6.pt"):
        assert part in line, line
    assert f"{tmp_path}: bad_batch_update{BAD_UPDATE}_rank1.pt" in line
    assert name in bad_batch.read(tmp_path / f"bad_batch_update{BAD_UPDATE}_rank1.pt").batches[0].ids


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_roll_back_together(poisoned_for_two, tmp_path, parallel):
    folder, name = poisoned_for_two
    more = ("--on_nan", "rollback", "--dropout", "0", "--attention_dropout", "0", "--parallel", parallel)
    done = two_processes(folder, tmp_path, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    found = last(tmp_path)
    assert found["loader"]["position"] == 13
    recorded = bad_batch.read(tmp_path / f"bad_batch_update{BAD_UPDATE}_rank1.pt")
    assert name in recorded.batches[0].ids
    one = tmp_path / "one"
    more = ("--num_concat_batches", "2", "--dropout", "0", "--attention_dropout", "0", "--on_nan", "rollback")
    train.main(command(folder, one, *more))
    for name, weight in last(one)["model"].items():
        torch.testing.assert_close(found["model"][name], weight, atol=2e-5, rtol=1e-4)


def test_a_stream_rolls_back_too_and_hands_out_the_same_batch_again(data, tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    shards = tmp_path / "shards"
    make_shards.main([str(data / "train.tsv"), str(shards), "--num_shards", "4", "--workers", "1"])
    shutil.copy(data / "valid.tsv", shards)
    pattern = str(shards / "train-{000000..000003}.tar")
    more = ("--streaming", "--tarred_filepaths", pattern, "--epoch_size", "20", "--shuffle_n", "4")
    losses, bad = PretrainTask.losses, []

    def broken(task: PretrainTask, batch: Any, *args: Any) -> Any:
        total, stats, results = losses(task, batch, *args)
        if task.training and (list(batch.ids) == bad or (task.step == BAD_UPDATE - 1 and not bad)):
            bad[:] = batch.ids
            total, stats = total * torch.nan, {**stats, "loss": stats["loss"] * torch.nan}
        return total, stats, results

    monkeypatch.setattr(PretrainTask, "losses", broken)
    with pytest.raises(TrainingError, match="a stream cannot be read again") as error:
        train.main(command(shards, tmp_path / "stop", *more))
    assert bad[0] in str(error.value)
    bad.clear()
    train.main(command(shards, tmp_path / "out", *more, "--on_nan", "rollback"))
    recorded = bad_batch.read(tmp_path / "out" / f"bad_batch_update{BAD_UPDATE}_rank0.pt")
    assert list(recorded.batches[0].ids) == bad
    assert last(tmp_path / "out")["loader"]["position"] == 13


# ---- Fine-tuning -----------------------------------------------------------------------------------------------------


def finetuning(data: Path, output: Path, start: Path, *more: str) -> list[str]:
    command = ["finetune", "--data", str(data), "--output_dir", str(output), "--w2v_path", str(start)]
    command += ["--num_workers", "0", "--device", "cpu", "--max_tokens", "20000", "--mask_length", "2"]
    return [*command, "--save_interval_updates", "2", "--log_frequency", "3", *more]


def test_fine_tuning_in_half_precision_rolls_back_and_is_replayed(poisoned, stopped, tmp_path, monkeypatch, capsys):
    folder, name = poisoned
    start = stopped[0] / "wav2vec2_update6.pt"
    more = ["--bf16", "--update_freq", "2", "--max_update", "20"]
    run = build_run(parse_train(finetuning(folder, tmp_path / "plan", start, *more)), torch.device("cpu"), [])
    updates = (run.train_loader.read_again(1, position) or [] for position in range(20))
    bad = next(place for place, batches in enumerate(updates) if any(name in batch.ids for batch in batches))
    run.close()
    assert bad >= 2  # or there is no checkpoint to go back to
    more[-1] = str(bad + 2)
    train.main(finetuning(folder, tmp_path / "out", start, *more, "--on_nan", "rollback"))
    found = checkpoint.load(checkpoint.update_path(tmp_path / "out", bad + 2))
    file = tmp_path / "out" / f"bad_batch_update{bad + 1}_rank0.pt"
    assert any(name in batch.ids for batch in bad_batch.read(file).batches)
    text = replayed(capsys, checkpoint.update_path(tmp_path / "out", bad + 2), file)
    assert "bfloat16" in text
    assert "model.w2v.feature_extractor" in text

    def next_update(run: Run) -> Any:
        batches = run.train_loader.next_update(run.device)
        return next_update(run) if any(name in batch.ids for batch in batches) else batches

    monkeypatch.setattr(Run, "next_update", next_update)
    train.main(finetuning(folder, tmp_path / "expected", start, *more))
    expected = checkpoint.load(checkpoint.update_path(tmp_path / "expected", bad + 2))
    for part in ("model", "optimizer", "loader"):
        assert_same(found[part], expected[part], part)


def test_blank_output_ends_fine_tuning(data, stopped, tmp_path):
    more = ("--validate_interval_updates", "2", "--health_patience", "0", "--max_update", "9")
    with pytest.raises(
        TrainingError, match=r"blank plateau.*at update 2: val_blank_share 1 .*val_length_ratio 0 .*wer"
    ):
        train.main(
            finetuning(data, tmp_path, stopped[0] / "wav2vec2_update6.pt", *more, "--lr", "0", "--blank_weight", "99")
        )


def test_the_length_ratio_is_letters_written_over_letters_of_the_reference():
    dictionary = Dictionary([*SPECIAL_SYMBOLS, "|", "A", "B"])
    lengths = {"label_lengths": (3, 4), "labels_BL": torch.tensor([[5, 6, 4, 1], [5, 5, 6, 4]])}
    nothing = torch.zeros(2, 1)
    made = Batch(("a", "b"), nothing, torch.ones(2), False, (), 2, (9, 11), **lengths)
    sums = score(made, [[5, 6], [6, 4, 5]], dictionary)
    values = summarize(
        {**sums, "loss": 1.0, "ntokens": 7.0, "nsentences": 2.0, "nframes": 20.0, "blank_frames": 5.0}, "finetune"
    )
    assert values["length_ratio"] == 5 / 7
    assert values["blank_share"] == 5 / 20


# ---- Replay ----------------------------------------------------------------------------------------------------------


def test_the_replay_names_the_first_operation(poisoned, stopped, capsys):
    text = replayed(capsys, stopped[0] / "wav2vec2_update6.pt", stopped[0] / f"bad_batch_update{BAD_UPDATE}_rank0.pt")
    assert f"largest sample: 3e+38, in {poisoned[1]}" in text
    first = text.split("the first operation that is not finite:\n")[1].splitlines()
    assert first[0].startswith("forward, aten.")
    assert "model.feature_extractor" in first[0]
    assert "wav2vec2/convolutions.py:" in first[0]
    assert "has" in first[1]
    assert first[2].startswith("  input")
    assert first[2].endswith("finite")


@pytest.fixture(scope="module")
def sound(stopped, tmp_path_factory) -> Path:
    """The recorded update with audio that is not too loud."""
    content = torch.load(stopped[0] / f"bad_batch_update{BAD_UPDATE}_rank0.pt", weights_only=True)
    audio = content["batches"][0]["audio_BS"]
    audio.copy_(torch.randn(audio.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    path = tmp_path_factory.mktemp("sound") / "batch.pt"
    torch.save(content, path)
    return path


def test_the_replay_says_when_everything_is_finite(stopped, sound, capsys):
    assert "everything is finite" in replayed(capsys, stopped[0] / "wav2vec2_update6.pt", sound)


@pytest.mark.parametrize("precision", [(), ("--fp16",)])
def test_the_replay_makes_the_very_update_of_the_run(data, tmp_path, capsys, monkeypatch, precision):
    more = ("--keep_milestones", "6", "7", "--update_freq", "2", "--clip_norm", "1", *precision)
    run = build_run(parse_train(command(data, tmp_path / "plan", *more)), torch.device("cpu"), [])
    batches = tuple(run.train_loader.read_again(1, 6) or ())
    run.close()
    train.main(command(data, tmp_path, *more))
    count = float(sum(batch.num_masked for batch in batches))
    for world in (1, 2):  # twice the frames among two processes: each has the same share of the mean
        (tmp_path / str(world)).mkdir()
        bad_batch.BadBatch("pretrain", 6, 1, 6, 1, 0, world, count * world, batches).write(tmp_path / str(world))
    rebuild, optimizers = replay_batch.rebuild, []

    def rebuilt(*args: Any) -> Any:
        task, optimizer = rebuild(*args)
        optimizers.append(optimizer)
        return task, optimizer

    monkeypatch.setattr(replay_batch, "rebuild", rebuilt)
    for world in (1, 2):
        file = tmp_path / str(world) / "bad_batch_update7_rank0.pt"
        assert "everything is finite" in replayed(capsys, checkpoint.update_path(tmp_path, 6), file)
        expected = checkpoint.load(checkpoint.update_path(tmp_path, 7))["model"]
        assert_same(optimizers[-1].master_weights(), expected)


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return (gradients[0].abs() * 0 - 1).log()


PLANTED = {
    "forward, aten.log in model.final_proj": lambda x: (x * 0 - 1).log() + x,
    "forward, aten.exp in model.final_proj": lambda x: (x * 0 + 1000).exp() + x,
    "backward, aten.log in BadGradientBackward in model.final_proj": BadGradient.apply,
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_replay_finds_what_is_planted(stopped, sound, capsys, monkeypatch, name):
    init = Wav2Vec2Model.__init__

    def planted(model: Wav2Vec2Model, *args: Any, **kwargs: Any) -> None:
        init(model, *args, **kwargs)
        forward = model.final_proj.forward
        model.final_proj.forward = lambda x: PLANTED[name](forward(x))

    monkeypatch.setattr(Wav2Vec2Model, "__init__", planted)
    text = replayed(capsys, stopped[0] / "wav2vec2_update6.pt", sound)
    assert f"not finite:\n{name}" in text


def test_files_that_cannot_be_replayed_are_refused_in_one_line(stopped, tmp_path):
    good = stopped[0] / "wav2vec2_update6.pt"
    batch = stopped[0] / f"bad_batch_update{BAD_UPDATE}_rank0.pt"
    torch.save({**torch.load(batch, weights_only=True), "mode": "finetune"}, tmp_path / "mode.pt")
    torch.save({**torch.load(batch, weights_only=True), "batches": [{"ids": []}]}, tmp_path / "part.pt")
    (tmp_path / "half.pt").write_bytes(batch.read_bytes()[:1000])
    for paths, message in (
        ((good, good), "holds no recorded batch"),
        ((batch, batch), "checkpoint"),
        ((good, tmp_path / "none.pt"), "no such file"),
        ((good, tmp_path / "mode.pt"), "of finetune"),
        ((good, tmp_path / "part.pt"), "is damaged"),
        ((good, tmp_path / "half.pt"), "damaged"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            replay_batch.main(list(map(str, paths)))
        assert "\n" not in str(error.value)


# ---- Rules -----------------------------------------------------------------------------------------------------------

# a high rate without the diversity term: few codes are left after some updates
COLLAPSE = ("--lr", "0.3", "--loss_weights", "0", "0", "--latent_temp", "0.5", "0.5", "1", "--max_update", "200")


def test_a_collapsed_run_ends_as_a_program_with_a_cause_and_a_checkpoint(data, tmp_path):
    more = ("--health_patience", "40", "--health_grace", "0", "--log_frequency", "2", *COLLAPSE)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *command(data, tmp_path, *more)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    line = done.stderr.strip().splitlines()[-1]
    assert re.match(r"error: (codebook collapse|trivial contrastive task|vanishing gradients).* at update \d+: ", line)
    assert "1. " in line
    assert "WARNING: health: codebook collapse" in done.stdout


SICK = ("--min_code_share", "1", "--health_grace", "5", "--health_patience", "20", "--log_frequency", "1")


def test_the_last_healthy_checkpoint_outlives_the_warning(data, tmp_path):
    more = ("--save_interval_updates", "1", "--keep_milestones", "1", "--health", "warn", *SICK)
    train.main(command(data, tmp_path, *more))
    kept = {checkpoint.update_number(path) for path in checkpoint.update_paths(tmp_path)}
    assert kept == {1, 5, 11, 12}


@pytest.mark.parametrize("killed", [4, 7, 9])
def test_a_resumed_run_is_ended_where_the_uninterrupted_one_is(data, tmp_path, monkeypatch, killed):
    more = ("--save_interval_updates", "1", *SICK)
    with pytest.raises(TrainingError) as expected:
        train.main(command(data, tmp_path / "straight", *more))
    after_update = Run.after_update

    def dying(run: Run, updated: bool) -> None:
        after_update(run, updated)
        if run.progress.step == killed:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "after_update", dying)
        with pytest.raises(Killed):
            train.main(command(data, tmp_path / "resumed", *more))
    with pytest.raises(TrainingError) as found:
        train.main(command(data, tmp_path / "resumed", *more, "--resume"))
    assert "codebook collapse at update 11" in str(expected.value)
    assert "wav2vec2_update5.pt" in str(expected.value)
    assert str(found.value) == str(expected.value).replace("straight", "resumed")


def test_a_checkpoint_from_before_there_were_rules_is_resumed(data, tmp_path):
    train.main(command(data, tmp_path, "--max_update", "6"))
    path = checkpoint.update_path(tmp_path, 6)
    state = {name: value for name, value in checkpoint.load(path).items() if name != "health"}
    state["config"] = {name: value for name, value in state["config"].items() if name != "health"}
    checkpoint.save(path, state)
    train.main(command(data, tmp_path, "--resume"))
    assert last(tmp_path)["progress"]["step"] == 12


def test_options_of_health_without_effect_are_refused(data, tmp_path):
    for more in (
        ("--health", "off", "--chance_margin", "0.1"),
        ("--max_overflows", "3"),
        ("--no_quantize_targets", "--min_code_share", "0.1"),
        ("--max_blank_share", "0.9"),
        ("--no_save", "--on_nan", "rollback"),
    ):
        with pytest.raises(ConfigError, match=more[-2]):
            parse_train(["pretrain", "--data", str(data), "--output_dir", str(tmp_path), *more])
