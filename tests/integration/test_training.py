"""Whole runs of train.py on a tiny corpus: learning, resuming, precision, several processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from equal import assert_same
from tiny import MODEL_FLAGS, corpus

import train
from common import checkpoint
from common.errors import CheckpointError, ConfigError, DataError, TrainingError
from utils import make_shards
from wav2vec2.run import Run

QUICK = ("--num_workers", "0", "--device", "cpu", "--log_frequency", "5", "--validate_frequency", "100")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"), number=14)


def pretrain(data: Path, output: Path, *more: str, updates: int = 6) -> dict[str, Any]:
    """Pre-train and give the last checkpoint."""
    command = ["pretrain", "--data", str(data), "--output_dir", str(output), *MODEL_FLAGS, *QUICK]
    command += ["--max_tokens", "40000", "--num_negatives", "10", "--mask_length", "3", "--lr", "0.002"]
    command += ["--max_update", str(updates), "--encoder_layerdrop", "0.1", "--clip_norm", "5", *more]
    train.main(command)
    return checkpoint.load(checkpoint.update_path(output, updates))


def finetune(data: Path, output: Path, w2v: Path, *more: str, updates: int = 6) -> dict[str, Any]:
    """Fine-tune and give the last checkpoint."""
    command = ["finetune", "--data", str(data), "--output_dir", str(output), "--w2v_path", str(w2v), *QUICK]
    command += ["--max_tokens", "60000", "--lr", "0.003", "--max_update", str(updates), *more]
    if "--mask_prob" not in more:
        command += ["--mask_prob", "0.2", "--mask_length", "2"]
        command += ["--mask_channel_prob", "0.1", "--mask_channel_length", "2"]
    train.main(command)
    return checkpoint.load(checkpoint.update_path(output, updates))


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("pretrained")
    pretrain(data, output)
    return checkpoint.update_path(output, 6)


class Killed(Exception):
    """Stands for a killed process."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    """Make the run end abruptly behind some update."""
    after_update = Run.after_update

    def dying(run: Run, updated: bool) -> None:
        after_update(run, updated)
        if run.progress.step == updates:
            raise Killed

    monkeypatch.setattr(Run, "after_update", dying)


def state_of(checkpoint_state: dict[str, Any]) -> dict[str, Any]:
    """What a continued run must share with an uninterrupted one."""
    return {name: checkpoint_state[name] for name in ("model", "optimizer", "scaler", "ema", "loader", "progress")}


RESUMED = {
    "pretrain": ("--ema", "0.9", "--update_freq", "2"),
    "pretrain_workers": ("--num_workers", "2", "--num_concat_batches", "2"),
    "pretrain_fp16": ("--fp16",),
    "pretrain_overflow": ("--fp16", "--fp16_init_scale", "1e7"),  # the first updates are skipped
    "pretrain_bf16": ("--bf16", "--ema", "0.9"),
    "finetune": ("--freeze_finetune_updates", "2", "--final_dropout", "0.1"),
    "finetune_workers": ("--num_workers", "2", "--bf16"),
    "finetune_fp16": ("--fp16", "--ema", "0.9", "--update_freq", "2"),
    "pretrain_shards": ("--ema", "0.9", "--update_freq", "2"),
    "finetune_shards_workers": ("--num_workers", "2", "--fp16"),
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(data, pretrained, tmp_path, monkeypatch, name, stop):
    more = (*RESUMED[name], "--save_interval_updates", "1")
    if "shards" in name:
        make_shards.main([str(data / "train.tsv"), str(tmp_path / "shards"), "--num_shards", "3"])
        for file in ("valid.tsv", "valid.ltr", "dict.ltr.txt"):
            shutil.copy(data / file, tmp_path / "shards")
        data = tmp_path / "shards"
        more += ("--is_tarred", "--tarred_filepaths", str(data / "train-{000000..000002}.tar"))

    def run(output: Path, *extra: str) -> dict[str, Any]:
        if name.startswith("pretrain"):
            return pretrain(data, output, *more, *extra)
        return finetune(data, output, pretrained, *more, *extra)

    expected = run(tmp_path / "straight")
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop)
        with pytest.raises(Killed):
            run(tmp_path / "resumed")
    found = run(tmp_path / "resumed", "--resume")
    assert expected["progress"]["step"] == 6
    assert_same(state_of(found), state_of(expected))


def test_contrastive_accuracy_rises_on_few_utterances(data, tmp_path):
    pretrain(data, tmp_path, "--validate_interval_updates", "30", "--dropout", "0", "--lr", "0.005", updates=90)
    lines = [json.loads(line[5:]) for line in (tmp_path / "nvlog.json").read_text().splitlines()]
    accuracies = [line["data"]["val_accuracy"] for line in lines if "val_accuracy" in line.get("data", {})]
    assert accuracies[-1] > 0.25  # chance is 1 / 11
    assert accuracies[-1] > accuracies[0]


@pytest.mark.slow
def test_eight_utterances_are_learnt_by_heart(tmp_path):
    folder = corpus(tmp_path / "data", number=8, low=1.2, high=1.5)
    pretrain(folder, tmp_path / "pretrain", updates=2)
    more = ("--mask_prob", "0", "--dropout", "0", "--attention_dropout", "0")
    more += (
        "--validate_interval_updates",
        "50",
        "--clip_norm",
        "1",
        "--warmup_updates",
        "20",
        "--max_tokens",
        "300000",
    )
    state = finetune(
        folder,
        tmp_path / "finetune",
        checkpoint.update_path(tmp_path / "pretrain", 2),
        *more,
        "--lr",
        "0.01",
        updates=400,
    )
    lines = [json.loads(line[5:]) for line in (tmp_path / "finetune/nvlog.json").read_text().splitlines()]
    rates = [line["data"]["val_uer"] for line in lines if "val_uer" in line.get("data", {})]
    assert min(rates) == 0
    assert state["progress"]["best"] == 0


def test_validation_and_best_use_the_averaged_weights(data, tmp_path):
    more = ("--ema", "0.99999", "--validate_interval_updates", "3", "--lr", "0.1")
    state = pretrain(data, tmp_path / "average", *more)
    plain = pretrain(data, tmp_path / "plain", *more[2:])
    fresh = pretrain(data, tmp_path / "fresh", "--validate_interval_updates", "1", "--lr", "0", updates=1)
    best = {name: run["progress"]["best"] for name, run in (("average", state), ("plain", plain), ("fresh", fresh))}
    # with this decay the average hardly leaves the initial weights, while the trained ones are far off
    assert abs(best["average"] - best["fresh"]) < 0.1 * abs(best["plain"] - best["fresh"])


def test_frozen_updates_train_the_output_layer_only(data, pretrained, tmp_path):
    before = finetune(data, tmp_path / "a", pretrained, "--freeze_finetune_updates", "5", "--lr", "0", updates=6)[
        "model"
    ]
    more = (
        "--freeze_finetune_updates",
        "6",
        "--weight_decay",
        "0.1",
        "--save_interval_updates",
        "1",
        "--keep_milestones",
        "6",
    )
    finetune(data, tmp_path / "b", pretrained, *more, updates=7)
    after = checkpoint.load(checkpoint.update_path(tmp_path / "b", 6))["model"]
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == name.startswith("w2v."), name


@pytest.mark.parametrize("precision", ["--bf16", "--fp16"])
@pytest.mark.parametrize("amp", [(), ("--amp",)])
def test_half_precision_trains_and_saves_full_precision_weights(data, tmp_path, precision, amp):
    state = pretrain(data, tmp_path / "half", precision, *amp)
    full = pretrain(data, tmp_path / "full")
    assert {weight.dtype for weight in state["model"].values()} == {torch.float32}
    for name, weight in full["model"].items():
        assert (state["model"][name] - weight).abs().max() <= 0.1 * weight.abs().max() + 0.02, name


def test_a_run_whose_loss_scale_falls_to_the_minimum_stops(data, tmp_path, monkeypatch):
    import wav2vec2.criterion as criterion

    monkeypatch.setattr(criterion, "info_nce", lambda logits: (logits * torch.inf).sum())
    with pytest.raises(TrainingError, match="loss scale"):
        pretrain(data, tmp_path, "--fp16", updates=40)


def test_two_processes_reach_the_weights_of_one(data, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "train.py"),
    ]
    command += ["pretrain", "--data", str(data), "--output_dir", str(tmp_path / "two"), *MODEL_FLAGS, *QUICK]
    more = [
        "--max_tokens",
        "40000",
        "--num_negatives",
        "10",
        "--mask_length",
        "3",
        "--lr",
        "0.002",
        "--max_update",
        "4",
    ]
    more += ["--dropout", "0", "--attention_dropout", "0", "--encoder_layerdrop", "0.3"]
    done = subprocess.run(
        [*command, *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = tmp_path / "one"
    train.main(
        [
            "pretrain",
            "--data",
            str(data),
            "--output_dir",
            str(one),
            *MODEL_FLAGS,
            *QUICK,
            *more,
            "--num_concat_batches",
            "2",
        ]
    )
    found, expected = (
        checkpoint.load(checkpoint.update_path(folder, 4))["model"] for folder in (tmp_path / "two", one)
    )
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=2e-5, rtol=1e-4)


def test_the_run_folder_describes_the_run(data, tmp_path):
    pretrain(data, tmp_path, updates=2)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["config"]["data"]["max_tokens"] == 40000
    assert described["command"][0] == "train.py"
    assert described["versions"]["torch"] == str(torch.__version__)
    assert (tmp_path / "nvlog.json").read_text().startswith("DLLL ")
    assert list((tmp_path / "tensorboard").iterdir())


def test_checkpoints_are_kept_as_promised(data, tmp_path):
    pretrain(data, tmp_path, "--save_interval_updates", "1", "--validate_interval_updates", "4", updates=12)
    names = {path.name for path in tmp_path.glob("*.pt")}
    assert names == {f"wav2vec2_update{n}.pt" for n in (3, 6, 9, 11, 12)} | {"wav2vec2_best.pt"}


def test_a_folder_with_checkpoints_is_not_overwritten(data, tmp_path):
    pretrain(data, tmp_path, updates=2)
    with pytest.raises(ConfigError, match="--resume"):
        pretrain(data, tmp_path, updates=2)


def test_resuming_with_another_architecture_or_mode_is_refused(data, pretrained, tmp_path):
    pretrain(data, tmp_path, updates=2)
    with pytest.raises(CheckpointError, match="final_dim"):
        pretrain(data, tmp_path, "--resume", "--final_dim", "8", updates=4)
    with pytest.raises(CheckpointError, match="pretrain"):
        finetune(data, tmp_path, pretrained, "--resume")


def test_a_finished_run_can_be_resumed_without_doing_anything(data, tmp_path):
    expected = pretrain(data, tmp_path, updates=2)
    assert_same(pretrain(data, tmp_path, "--resume", updates=2), expected)


def test_a_symbol_outside_the_dictionary_is_named(data, pretrained, tmp_path):
    corpus(tmp_path / "data", number=4)
    lines = (tmp_path / "data/train.ltr").read_text().splitlines()
    lines[2] = "Q | " + lines[2]
    (tmp_path / "data/train.ltr").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"train\.ltr:3.*Q"):
        finetune(tmp_path / "data", tmp_path / "out", pretrained)
