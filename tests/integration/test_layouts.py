"""Any split of an update into ranks, joined batches and accumulation gives the same gradients."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tiny import MODEL_FLAGS, corpus
from tiny_model import HOURGLASS, NO_DROPOUT

from common import checkpoint
from common.data.loader import TrainLoader
from common.data.manifest import read_manifest
from common.data.masking import SpanMasking
from common.data.prepare import train_loader
from common.labels import Dictionary
from wav2vec2.config import ObjectiveConfig
from wav2vec2.model import Wav2Vec2Ctc, Wav2Vec2Model
from wav2vec2.task import FinetuneTask, PretrainTask

MODES = ("pretrain", "finetune", "frozen")  # frozen: only the output layer trains
# (processes, joined sub-batches, accumulated micro-batches)
ONE = [(1, concat, freq) for concat in (1, 2, 4) for freq in (1, 2, 4)]
TWO = [(2, concat, freq) for concat in (1, 2, 4) for freq in (1, 2, 4)]
# The same for layouts that share the 8 sub-batches of an update unevenly; in the last but one some passes are idle.
UNEVEN = [(1, 3, 3), (1, 5, 2), (2, 3, 2), (2, 7, 1), (3, 2, 2), (3, 1, 3), (3, 8, 1)]
EIGHT = 8


def parts(
    folder: Path, mode: str, layout: tuple[int, int, int], rank: int, world_batches: int = 0
) -> tuple[PretrainTask | FinetuneTask, TrainLoader]:
    """A task in float64, without dropout, and its data; LayerDrop is on, for its draw is shared."""
    world, concat, update_freq = layout
    torch.manual_seed(0)
    dictionary = Dictionary.read(folder / "dict.ltr.txt")
    if mode == "pretrain":
        model = Wav2Vec2Model(HOURGLASS, replace(NO_DROPOUT, feature_grad_mult=0.1))
        objective = ObjectiveConfig(num_negatives=10, cross_sample_negatives=3, codebook_negatives=2)
        task = PretrainTask(model.double(), objective, seed=3, layerdrop=0.4)
    else:
        model = Wav2Vec2Ctc(HOURGLASS, NO_DROPOUT, num_symbols=len(dictionary))
        task = FinetuneTask(model.double(), seed=3, layerdrop=0.4, freeze_updates=20 if mode == "frozen" else 0)
    trunk = getattr(model, "w2v", model)
    loader = train_loader(
        read_manifest(folder / "train.tsv", folder / "train.ltr" if mode != "pretrain" else None),
        sample_rate=16000,
        normalize=False,
        num_frames=trunk.num_frames,
        seed=3,
        max_tokens=20000,
        crop=mode == "pretrain",
        time_mask=SpanMasking(prob=0.5, length=3),
        encode=dictionary.encode if mode != "pretrain" else None,
        rank=rank,
        world=world,
        concat=concat,
        update_freq=update_freq,
        world_batches=world_batches,
    )
    task.set_step(11)
    return task, loader


def own_gradients(task: PretrainTask | FinetuneTask) -> dict[str, torch.Tensor]:
    assert not all(getattr(task.model, "w2v", task.model).encoder.kept)
    return {name: parameter.grad for name, parameter in task.model.named_parameters() if parameter.grad is not None}


def gradients(
    folder: Path, mode: str, layout: tuple[int, int, int], rank: int = 0, world_batches: int = 0
) -> dict[str, torch.Tensor]:
    """Gradients of one update, as this process has them in the end."""
    from common import distributed

    task, loader = parts(folder, mode, layout, rank, world_batches)
    engine = distributed.wrap(task, torch.device("cpu"))
    batches = loader.next_update()
    count = distributed.sum_across_ranks(task.count_units(batches), "cpu")
    for micro, batch in enumerate(batches):
        if micro < len(batches) - 1:
            with engine.no_sync():
                engine(replace(batch, audio_BS=batch.audio_BS.double()), count)[0].backward()
        else:
            engine(replace(batch, audio_BS=batch.audio_BS.double()), count)[0].backward()
    return own_gradients(task)


def added_up(folder: Path, mode: str, layout: tuple[int, int, int]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients and statistics of an update of EIGHT sub-batches, added up over processes that run one by one here."""
    task, _ = parts(folder, mode, layout, 0, EIGHT)
    updates = [parts(folder, mode, layout, rank, EIGHT)[1].next_update() for rank in range(layout[0])]
    count = torch.tensor(float(sum(map(task.count_units, updates))))
    sums: dict[str, float] = {}
    for batch in (batch for update in updates for batch in update):
        loss, stats = task(replace(batch, audio_BS=batch.audio_BS.double()), count)
        loss.backward()
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in stats.items()}
    return own_gradients(task), sums


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= 1e-6 * largest, name


def in_processes(folder: Path, number: int = 2) -> dict[str, dict[str, torch.Tensor]]:
    """The same for the layouts of two or three gloo processes and all modes."""
    output = folder / "gradients.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [*command, __file__, str(folder), str(output)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output, weights_only=True)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_do_not_depend_on_joining_and_accumulation(tmp_path, mode):
    corpus(tmp_path, number=24)
    expected = {}
    for layout in ONE:
        product = layout[1] * layout[2]
        found = gradients(tmp_path, mode, layout)
        assert_equal(found, expected.setdefault(product, found))
    assert len(expected) == 5


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_number_of_processes(tmp_path):
    corpus(tmp_path, number=24)
    found = in_processes(tmp_path)
    for mode in MODES:
        for layout in TWO:
            expected = gradients(tmp_path, mode, (1, 1, layout[0] * layout[1] * layout[2]))
            assert_equal(found[f"{mode} {layout}"], expected)


@pytest.mark.parametrize("mode", MODES)
def test_an_update_that_processes_cannot_share_evenly_is_still_the_same(tmp_path, mode):
    corpus(tmp_path, number=24)
    expected, sums = added_up(tmp_path, mode, (1, 1, EIGHT))
    assert sums["nsentences"] > EIGHT
    for layout in UNEVEN:
        found, others = added_up(tmp_path, mode, layout)
        assert_equal(found, expected)
        assert others == pytest.approx(sums)


@pytest.mark.slow
def test_three_processes_have_the_gradients_of_one(tmp_path):
    corpus(tmp_path, number=24)
    found = in_processes(tmp_path, 3)
    for mode in MODES:
        expected = gradients(tmp_path, mode, (1, 1, EIGHT))
        for layout in UNEVEN[-3:]:
            assert_equal(found[f"{mode} {layout}"], expected)


def train_in(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """A run of train.py in so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "train.py"), *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def logged(output: Path) -> dict[int, dict[str, float]]:
    """What was logged of every update."""
    lines = [json.loads(line[5:]) for line in (output / "nvlog.json").read_text().splitlines()]
    found = [line for line in lines if "train_loss" in line.get("data", {})]
    return {line["step"][1]: line["data"] for line in found}


@pytest.mark.slow
def test_a_run_goes_on_with_a_number_of_processes_that_does_not_divide_an_update(tmp_path):
    data = corpus(tmp_path / "data", number=40)
    command = ["pretrain", "--data", str(data), *MODEL_FLAGS, "--device", "cpu", "--num_workers", "0", "--resume"]
    command += ["--max_tokens", "20000", "--mask_length", "3", "--dropout", "0", "--attention_dropout", "0"]
    command += ["--world_batches", "8", "--num_concat_batches", "4", "--max_update", "5", "--log_frequency", "1"]
    command += ["--save_interval_updates", "1", "--keep_milestones", "2", "--validate_frequency", "100"]
    straight, split = tmp_path / "straight", tmp_path / "split"
    train_in(1, *command, "--output_dir", str(straight))
    split.mkdir()
    shutil.copy(checkpoint.update_path(straight, 2), split)
    done = train_in(3, *command, "--output_dir", str(split), "--num_concat_batches", "1")
    assert "starts again" not in done.stderr
    assert (
        "3 processes x 1 concatenated batches x 3 accumulated for 8 sub-batches per update" in done.stdout + done.stderr
    )
    found, expected = logged(split), logged(straight)
    assert sorted(found) == [3, 4, 5]
    for step in found:
        assert found[step]["train_ntokens"] == expected[step]["train_ntokens"]
        for name in ("train_loss", "train_grad_norm", "train_accuracy"):
            assert found[step][name] == pytest.approx(expected[step][name], rel=1e-3), (step, name)
    loaders = [checkpoint.load(checkpoint.update_path(output, 5))["loader"] for output in (straight, split)]
    assert loaders[0] == loaders[1]


def main() -> None:
    """One rank of in_processes()."""
    from common import distributed

    folder, output = map(Path, sys.argv[1:])
    with distributed.session("cpu"):
        rank = distributed.rank()
        wanted = [(layout, 0) for layout in TWO] if distributed.world_size() == 2 else [(u, EIGHT) for u in UNEVEN[-3:]]
        found = {
            f"{mode} {layout}": gradients(folder, mode, layout, rank, number)
            for mode in MODES
            for layout, number in wanted
        }
        if distributed.is_main():
            torch.save(found, output)


if __name__ == "__main__":
    main()
