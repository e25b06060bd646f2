"""The largest batch is tried before training, without a trace; what does not fit is refused or split."""

from __future__ import annotations

import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from equal import assert_same
from tiny import MODEL_FLAGS, corpus

import train
from common import checkpoint, distributed, memory
from common.entry import run_program
from common.errors import ConfigError, DataError
from wav2vec2 import memory_probe
from wav2vec2.arg_parser import parse_train
from wav2vec2.build import build_run
from wav2vec2.run import Run

QUICK = ("--num_workers", "0", "--device", "cpu", "--validate_frequency", "100")
EIGHT = ("--num_concat_batches", "8", "--max_update", "2")
PRETRAIN = ("--max_tokens", "20000", "--num_negatives", "10", "--mask_length", "3", "--lr", "0.002", "--clip_norm", "5")
MIB = 2**20


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"), number=24)


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("pretrained")
    train.main(pretrain(data, output, "--max_update", "1"))
    return checkpoint.update_path(output, 1)


def pretrain(data: Path, output: Path, *more: str) -> list[str]:
    return ["pretrain", "--data", str(data), "--output_dir", str(output), *MODEL_FLAGS, *QUICK, *PRETRAIN, *more]


def build(command: list[str]) -> Run:
    return build_run(parse_train(command), torch.device("cpu"), ["test"])


def everything(run: Run) -> dict[str, Any]:
    """All that training goes on with, copied."""
    state = {
        "saved": run.state_dict(run.train_loader.state_dict()),
        "model": run.task.state_dict(),
        "gradients": [parameter.grad for parameter in run.task.parameters()],
        "random": torch.get_rng_state(),
        "metrics": [vars(run.metrics)[name] for name in ("_numbers", "_tensors", "_counts")],
        "step": getattr(run.task, "step", None),
        "frozen": run.optimizer._frozen,
        "layers": getattr(run.task.model, "w2v", run.task.model).encoder.kept,
    }
    return deepcopy(state)


KINDS = {
    "pretrain": ("--ema", "0.9", "--update_freq", "2", "--encoder_layerdrop", "0.5"),
    "fp16": ("--fp16", "--num_concat_batches", "4"),
    "bf16": ("--bf16", "--ema", "0.9", "--num_concat_batches", "2"),
    "finetune": ("--freeze_finetune_updates", "5", "--encoder_layerdrop", "0.5", "--mask_length", "2"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_trying_leaves_no_trace(data, pretrained, tmp_path, caplog, kind):
    command = pretrain(data, tmp_path, *KINDS[kind], "--max_update", "9", "--no_probe_memory")
    if kind == "finetune":
        command = [
            "finetune",
            "--data",
            str(data),
            "--output_dir",
            str(tmp_path),
            "--w2v_path",
            str(pretrained),
            *QUICK,
        ]
        command += ["--max_tokens", "60000", "--max_update", "9", "--no_probe_memory", *KINDS[kind]]
    run = build(command)
    for step in range(2):
        run.progress.step += train.train_step(run, run.next_update(), step)
    run.set_step(run.progress.step)
    before = everything(run)
    run.config = replace(run.config, run=replace(run.config.run, probe_memory=True))
    backwards: list[bool] = []
    backward = run.optimizer.backward
    run.optimizer.backward = lambda loss: (backwards.append(loss.requires_grad), backward(loss))
    before["saved"]["config"]["run"]["probe_memory"] = True
    with caplog.at_level(logging.INFO):
        memory_probe.probe(run)
    assert all(backwards)
    assert len(backwards) == min(run.config.data.num_concat_batches, 3)
    assert re.search(r"memory: the largest batch \(\d sub-batches, 0\.\d M samples\) takes \d", caplog.text)
    assert_same(everything(run), before)


def test_a_run_that_tried_has_the_weights_of_one_that_did_not(data, tmp_path):
    found = []
    for more in ((), ("--no_probe_memory",)):
        output = tmp_path / f"run{len(more)}"
        train.main(
            pretrain(data, output, "--num_concat_batches", "3", "--max_update", "3", "--num_workers", "1", *more)
        )
        found.append(checkpoint.load(checkpoint.update_path(output, 3)))
    for name in ("model", "optimizer", "loader", "progress"):
        assert_same(found[0][name], found[1][name], name)


# ---- What does not fit -----------------------------------------------------------------------------------------------

FIXED, MORE = 4, 27.2  # GiB of a made machine: a batch of `whole` samples takes 31.2


def made_peak(whole: int) -> Callable[..., int | None]:
    def peak(run: Run, largest: Any, place: int, most: int, *, accumulates: bool) -> int | None:
        need = int((FIXED + MORE * largest.batches[place].audio_BS.numel() / whole) * memory.GIB)
        return need if need <= most else None

    return peak


def make_machine(monkeypatch: pytest.MonkeyPatch, gib: float, whole: int) -> None:
    monkeypatch.setattr(memory_probe, "_peak", made_peak(whole))
    monkeypatch.setattr(memory, "available", lambda device, sharing: int(gib * memory.GIB))
    monkeypatch.setattr(memory_probe, "_gradient_bytes", lambda run: 0)


@pytest.fixture(scope="module")
def samples(data, tmp_path_factory) -> dict[int, int]:
    """Samples of the first so many sub-batches of the largest batch of 8."""
    loader = build(pretrain(data, tmp_path_factory.mktemp("plan"), *EIGHT, "--no_probe_memory")).train_loader
    (planned,) = loader.largest(1)
    return {joined: loader.read(planned[:joined]).audio_BS.numel() for joined in range(1, 9)}


@pytest.mark.parametrize("gib", [31.5, 29.0, 24.0, 12.5, 9.0])
def test_the_message_names_the_most_that_fits(data, tmp_path, monkeypatch, caplog, samples, gib):
    make_machine(monkeypatch, gib, samples[8])
    needs = {joined: FIXED + MORE * samples[joined] / samples[8] for joined in samples}
    foretold = (4,)  # the others are tried
    expected = max(joined for joined in (8, 4, 2, 1) if needs[joined] <= (0.95 if joined in foretold else 1) * gib)
    with caplog.at_level(logging.INFO):
        if expected == 8:
            build(pretrain(data, tmp_path, *EIGHT))
            assert f"takes 31.2 GiB at its peak, {gib} GiB are there (1 % free)" in caplog.text
            return
        with pytest.raises(ConfigError) as caught:
            build(pretrain(data, tmp_path, *EIGHT))
    start, rest = str(caught.value).split(f"NUM_CONCAT_BATCHES={expected} UPDATE_FREQ={8 // expected} would fit (")
    predicted = re.match(
        r"--num_concat_batches 8 --update_freq 1: the largest batch needs ([\d.]+) GiB and (.*) GiB ", start
    )
    assert predicted is not None
    assert float(predicted[1]) == pytest.approx(31.2, abs=0.1)
    assert float(predicted[2]) == gib
    assert float(rest.split()[0]) == pytest.approx(needs[expected], abs=0.1)
    assert rest.endswith("GiB): set them, or add --auto_batch")


@pytest.mark.parametrize("more", [(), ("--bf16",)])
def test_where_not_even_one_sub_batch_fits_the_message_says_what_to_try_first(
    data, tmp_path, monkeypatch, samples, more
):
    make_machine(monkeypatch, 5.0, samples[8])
    for joined in ("8", "1"):
        with pytest.raises(ConfigError) as caught:
            build(pretrain(data, tmp_path, *EIGHT, "--num_concat_batches", joined, "--auto_batch", *more))
        assert "--max_tokens 20000: not even one sub-batch fits" in str(caught.value)
        assert ("--bf16" in str(caught.value)) == (more == ())
        assert "--checkpoint_activations before --max_tokens, which is part of the recipe" in str(caught.value)


@pytest.mark.parametrize(("layout", "by_hand"), [((), ("4", "2")), (("--world_batches", "8"), ("5", "2"))])
def test_auto_batch_trains_to_the_weights_of_the_layout_given_by_hand(
    data, tmp_path, monkeypatch, caplog, samples, layout, by_hand
):
    concat, passes = by_hand
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        make_machine(patch, 22.0, samples[8])
        train.main(pretrain(data, tmp_path / "auto", *EIGHT, *layout, "--auto_batch", "--fp16"))
    assert f"goes on with --num_concat_batches {concat} --update_freq {passes}, the same 8 sub-batches" in caplog.text
    layout = ("--num_concat_batches", concat, *(layout or ("--update_freq", passes)))
    train.main(pretrain(data, tmp_path / "hand", *EIGHT, *layout, "--fp16"))
    found, expected = (checkpoint.load(checkpoint.update_path(tmp_path / name, 2)) for name in ("auto", "hand"))
    for name in ("model", "optimizer", "scaler", "loader", "progress"):
        assert_same(found[name], expected[name], name)
    assert found["config"]["data"] == expected["config"]["data"]


def test_the_loss_scale_grows_as_in_the_layout_given_by_hand(data, tmp_path, monkeypatch, samples):
    make_machine(monkeypatch, 22.0, samples[8])
    run = build(pretrain(data, tmp_path, *EIGHT, "--auto_batch", "--fp16"))
    assert run.optimizer.scaler.window == 2**14 // 2


def test_files_that_cannot_be_read_are_no_matter_of_memory(tmp_path, caplog):
    folder = corpus(tmp_path / "data", number=24)
    command = pretrain(folder, tmp_path / "run", *EIGHT, "--num_concat_batches", "1")
    loader = build(command).train_loader
    largest = loader.read(loader.largest(1)[0]).ids
    for name in largest:
        (folder / "audio" / f"{name}.wav").write_bytes(b"RIFF")
    with caplog.at_level(logging.INFO):
        build(command)
    assert "memory: the largest batch (1 sub-batches" in caplog.text
    for path in (folder / "audio").iterdir():
        path.write_bytes(b"RIFF")
    with caplog.at_level(logging.INFO):
        run = build(command)
    assert "memory: the largest batches cannot be read" in caplog.text
    with closing(run), pytest.raises(DataError, match=r"\.wav"):
        train.train(run)


def test_a_stream_is_not_tried(data, tmp_path, caplog):
    run = build(pretrain(data, tmp_path, "--no_probe_memory"))
    run.config = replace(run.config, run=replace(run.config.run, probe_memory=True))
    run.train_loader = object()
    run.progress.step = 0
    Run.finished, finished = property(lambda run: False), Run.finished
    try:
        with caplog.at_level(logging.INFO):
            memory_probe.probe(run)
    finally:
        Run.finished = finished
    assert "memory: a stream does not tell its largest batch" in caplog.text


# ---- In processes of their own ---------------------------------------------------------------------------------------


def start(what: str, command: list[str], *, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """A run of train.py in the surroundings of `what` (see main)."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, __file__, what, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit address space")
def test_under_a_real_limit_a_run_ends_with_the_layout_that_fits_and_auto_batch_trains_with_it(tmp_path):
    data = corpus(tmp_path / "data", number=16, low=14.5, high=15.0)
    command = pretrain(data, tmp_path / "run", *EIGHT, "--max_update", "1", "--max_tokens", "480000")
    refused = start("limited", command)
    assert refused.returncode == 2, refused.stderr[-3000:]
    offered = re.search(r"NUM_CONCAT_BATCHES=(\d) UPDATE_FREQ=(\d) would fit .* or add --auto_batch", refused.stderr)
    assert offered is not None, refused.stderr
    assert int(offered[1]) * int(offered[2]) == 8 > int(offered[1])
    shutil.rmtree(tmp_path / "run")
    done = start("limited", [*command, "--auto_batch"])
    assert done.returncode == 0, done.stderr[-3000:]
    used = re.findall(r"goes on with --num_concat_batches (\d) --update_freq (\d)", done.stdout + done.stderr)[-1]
    found = checkpoint.load(checkpoint.update_path(tmp_path / "run", 1))
    by_hand = ["--num_concat_batches", used[0], "--update_freq", used[1], "--output_dir", str(tmp_path / "hand")]
    assert start("free", [*command, *by_hand]).returncode == 0
    assert_same(found["model"], checkpoint.load(checkpoint.update_path(tmp_path / "hand", 1))["model"])


@pytest.mark.slow
def test_processes_agree_where_one_has_less_memory(data, tmp_path, samples):
    command = pretrain(data, tmp_path / "auto", *EIGHT)
    command += ["--update_freq", "1"]
    what = f"one_is_small {samples[8]}"
    refused = start(what, command, processes=2)
    assert refused.returncode != 0
    assert "NUM_CONCAT_BATCHES=4 UPDATE_FREQ=2 would fit" in refused.stderr
    done = start(what, [*command, "--auto_batch"], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    by_hand = ["--num_concat_batches", "4", "--update_freq", "2", "--output_dir", str(tmp_path / "hand")]
    assert start("free", [*command, *by_hand], processes=2).returncode == 0
    found, expected = (checkpoint.load(checkpoint.update_path(tmp_path / name, 2)) for name in ("auto", "hand"))
    assert_same(found["model"], expected["model"])


def limited() -> None:
    """600 MiB more address space than the imports took."""
    size = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
    assert size is not None
    resource.setrlimit(resource.RLIMIT_AS, (int(size[1]) * 1024 + 600 * MIB, resource.RLIM_INFINITY))


def one_is_small(whole: str) -> None:
    """Process 1 has less memory than process 0."""
    memory_probe._peak = made_peak(int(whole))
    memory_probe._gradient_bytes = lambda run: 0
    memory.available = lambda device, sharing: (100 - 78 * distributed.rank()) * memory.GIB


if __name__ == "__main__":
    surroundings: dict[str, Callable[..., None]] = {
        "free": lambda: None,
        "limited": limited,
        "one_is_small": one_is_small,
    }
    name, *values = sys.argv[1].split()
    surroundings[name](*values)
    run_program(train.main, sys.argv[2:], rank=distributed.launched_rank())
