"""Any split of an update into ranks, joined batches and accumulation gives the same gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tiny import corpus
from tiny_model import HOURGLASS, NO_DROPOUT

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


def gradients(folder: Path, mode: str, layout: tuple[int, int, int], rank: int = 0) -> dict[str, torch.Tensor]:
    """Gradients of one update in float64, without dropout; LayerDrop is on, for its draw is shared."""
    from common import distributed

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
    )
    engine = distributed.wrap(task, torch.device("cpu"))
    task.set_step(11)
    batches = loader.next_update()
    count = distributed.sum_across_ranks(task.count_units(batches), "cpu")
    for micro, batch in enumerate(batches):
        if micro < len(batches) - 1:
            with engine.no_sync():
                engine(replace(batch, audio_BS=batch.audio_BS.double()), count)[0].backward()
        else:
            engine(replace(batch, audio_BS=batch.audio_BS.double()), count)[0].backward()
    assert not all(trunk.encoder.kept)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= 1e-6 * largest, name


def in_two_processes(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The same for every layout of two gloo processes and both modes."""
    output = folder / "gradients.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
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
    found = in_two_processes(tmp_path)
    for mode in MODES:
        for layout in TWO:
            expected = gradients(tmp_path, mode, (1, 1, layout[0] * layout[1] * layout[2]))
            assert_equal(found[f"{mode} {layout}"], expected)


def main() -> None:
    """One rank of in_two_processes()."""
    from common import distributed

    folder, output = map(Path, sys.argv[1:])
    with distributed.session("cpu"):
        rank = distributed.rank()
        found = {f"{mode} {layout}": gradients(folder, mode, layout, rank) for mode in MODES for layout in TWO}
        if distributed.is_main():
            torch.save(found, output)


if __name__ == "__main__":
    main()
