"""The recipes as a user runs them, with small values: pre-train, fine-tune, word error rate."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tiny import SMALL, corpus

from common import checkpoint

HOURGLASS = {"HOURGLASS_CONFIG": "[1,(1,2),1]"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return corpus(tmp_path_factory.mktemp("data"), number=12, low=1.0, high=1.5)


def start(words: list[str], folder: Path, data: Path, **variables: str) -> subprocess.Popen[str]:
    """Start a script of scripts/ with the small values."""
    clean = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    return subprocess.Popen(
        ["bash", *(str(ROOT / "scripts" / word) for word in words)],
        env={**clean, **SMALL, "DATASET_DIR": str(data), **variables},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def recipe(name: str, folder: Path, data: Path, **variables: str) -> str:
    """Run a script of scripts/ and give its standard output."""
    process = start([name], folder, data, **variables)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output[-2000:] + errors[-3000:]
    return output


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory) -> dict[str, str]:
    """Pre-trained checkpoints of the Base and the Large recipe, by two processes and by one."""
    folder = tmp_path_factory.mktemp("pretrained")
    recipe("pretrain_base.sh", folder, data, OUTPUT_DIR="base", NUM_GPUS="2", **HOURGLASS)
    recipe("pretrain_large.sh", folder, data, OUTPUT_DIR="large")
    return {kind: str(folder / kind / "wav2vec2_update2.pt") for kind in ("base", "large")}


@pytest.mark.slow
def test_the_large_models_train_in_shards(data, tmp_path):
    recipe("pretrain_xlsr_2b.sh", tmp_path, data, OUTPUT_DIR="out", NUM_GPUS="2")
    assert (tmp_path / "out/wav2vec2_update2.pt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("finetune_base_1h.sh", "finetune_base_10h.sh", "finetune_base_100h.sh", "finetune_base_960h.sh"),
        *("finetune_vox_100h.sh", "finetune_vox_960h.sh", "finetune_vox_960h_cv.sh"),
    ],
)
def test_every_fine_tuning_recipe_trains(name, data, pretrained, tmp_path):
    start = pretrained["large" if "vox" in name else "base"]
    recipe(name, tmp_path, data, PRETRAINED_MODEL=start, OUTPUT_DIR="out")
    assert (tmp_path / "out/wav2vec2_update2.pt").is_file()
    assert (tmp_path / "out/wav2vec2_best.pt").is_file()


@pytest.mark.slow
def test_two_processes_fine_tune_and_score(data, pretrained, tmp_path):
    variables = {"PRETRAINED_MODEL": pretrained["base"], "NUM_GPUS": "2", "OUTPUT_DIR": "out"}
    recipe("finetune_base_960h.sh", tmp_path, data, **variables)
    output = recipe(
        "inference.sh", tmp_path, data, FINETUNED_MODEL="out/wav2vec2_best.pt", NUM_GPUS="2", OUTPUT_DIR="inference"
    )
    assert re.fullmatch(r"WER: \d+\.\d\d %", output.splitlines()[-1])
    predictions = (tmp_path / "inference/valid.predictions").read_text().splitlines()
    assert [line.split("\t")[0] for line in predictions] == [str(number) for number in range(12)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain_base_benchmark.sh", "finetune_base_benchmark.sh"])
def test_training_benchmarks_report_averages(name, data, pretrained, tmp_path):
    more = {"NUM_EPOCHS": "2", "NUM_WARMUP_EPOCHS": "1", "MAX_UPDATE": "100", "FREEZE_FINETUNE_UPDATES": "0"}
    recipe(name, tmp_path, data, OUTPUT_DIR="out", PRETRAINED_MODEL=pretrained["base"], **HOURGLASS, **more)
    lines = (tmp_path / "out/nvlog.json").read_text().splitlines()
    assert sum("benchmark_ntokens/s" in line and '"LOG"' in line for line in lines) == 1
    assert sum("epoch_ntokens/s" in line and '"LOG"' in line for line in lines) == 3


@pytest.mark.slow
def test_two_nodes_give_the_weights_of_two_processes(data, pretrained, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"NUM_NODES": "2", "NUM_GPUS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OUTPUT_DIR": "out"}
    nodes = [start(["multinode.sh", "pretrain_base.sh"], tmp_path, data, **shared, **HOURGLASS) for _ in range(2)]
    for node in nodes:
        output, errors = node.communicate(timeout=300)
        assert node.returncode == 0, output[-2000:] + errors[-3000:]
    found = checkpoint.load(tmp_path / "out/wav2vec2_update2.pt")["model"]
    expected = checkpoint.load(pretrained["base"])["model"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
