"""benchmarks/idle.py: its data, its arithmetic of intervals, and that its loop runs; a CPU has no profile of a GPU."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import idle
from benchmarks.workload import make_recipe
from utils import librispeech_lengths

TINY = [
    *("--size", "tiny", "--max_tokens", "250000", "--max_sample_size", "60000", "--num_concat_batches", "2"),
    *("--num_workers", "0", "--threads", "1"),
]


@pytest.fixture(autouse=True)
def settings_of_torch():
    """What the program sets for its whole process is set back."""
    threads = torch.get_num_threads()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


@pytest.mark.parametrize(
    ("intervals", "length"),
    [([], 0), ([(2, 5)], 3), ([(0, 2), (4, 7)], 5), ([(4, 7), (0, 5)], 7), ([(0, 9), (2, 3), (8, 10)], 10)],
)
def test_length_of_a_union(intervals, length):
    assert idle.union_length(intervals) == length


def test_length_of_a_union_is_the_number_of_points_that_are_covered():
    rng = np.random.default_rng(0)
    for number in range(1, 40):
        begins = rng.integers(0, 200, number)
        ends = begins + rng.integers(0, 30, number)
        covered = {point for begin, end in zip(begins, ends, strict=True) for point in range(begin, end)}
        assert idle.union_length(zip(begins, ends, strict=True)) == len(covered)


def test_work_is_what_the_device_computes():
    def event(name, begin, end, device=DeviceType.CUDA, annotation=False):
        times = SimpleNamespace(start=begin, end=end)
        return SimpleNamespace(name=name, time_range=times, device_type=device, is_user_annotation=annotation)

    events = [
        event("gemm", 1.0, 2.0),
        event("Memcpy HtoD (Pinned -> Device)", 2.0, 9.0),
        event("Memcpy DtoH (Device -> Pageable)", 2.0, 9.0),
        event("Memcpy DtoD (Device -> Device)", 4.0, 5.0),
        event("step", 0.0, 9.0, annotation=True),
        event("aten::mm", 0.0, 9.0, device=DeviceType.CPU),
    ]
    assert idle.work_intervals(events) == [(1.0, 2.0), (4.0, 5.0)]


def test_batches_are_those_of_the_recipe():
    options = idle.parse(["--num_workers", "0", "--json", "-"])
    loader = idle.noise_loader(options, make_recipe("tiny"))
    update = loader.next_update()
    (made,) = update
    assert len(made.sub_batches) == 8
    for part in made.sub_batches:
        assert part.samples <= 250_000
        assert part.rows * part.samples <= 1_400_000
        assert part.masked > 0
    assert 0.09 < float(made.audio_BS[made.audio_BS != 0].std()) < 0.11
    plan = loader._maker.sub_batches
    # every utterance is as long as its sub-batch: half are below LibriSpeech's median, none below the recipe's shortest
    seconds = np.repeat(plan.samples, plan.rows) / 16000
    assert seconds.min() >= 2
    assert np.median(seconds) == pytest.approx(13.9, abs=0.3)


def test_lengths_are_those_of_librispeech():
    drawn = librispeech_lengths.seconds_at(np.random.default_rng(0).random(50_000))
    assert 1.3 <= drawn.min() < drawn.max() <= 17.0
    assert drawn.mean() == pytest.approx(12.3, abs=0.1)
    assert np.median(drawn) == pytest.approx(13.9, abs=0.1)


def test_the_loop_runs_and_a_cpu_has_no_idle_share(tmp_path, monkeypatch):
    steps = []
    real = idle.train.train_step
    monkeypatch.setattr(idle.train, "train_step", lambda *args: steps.append(args[2]) or real(*args))
    out = tmp_path / "result.json"
    idle.main([*TINY, "--steps", "2", "--warmup", "1", "--json", str(out)])
    result = json.loads(out.read_text())
    assert steps == [0, 1, 2, 3, 4]
    assert result["idle"] is result["busy_s"] is None
    assert 0 < result["data_wait_s"] < result["profiled_s"]
    assert result["frames_per_s"] > 0
    assert {"hardware", "versions", "commit", "command", "setting"} < set(result)
