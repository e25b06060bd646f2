"""benchmarks/utterance.py: what it transcribes with, what it times, and the file that it writes."""

from __future__ import annotations

import json
import time

import pytest
import torch

from benchmarks import utterance
from common.checkpoint import save
from common.errors import ConfigError
from common.flags import to_dict
from wav2vec2.build import build_model
from wav2vec2.config import Config, PrecisionConfig, RunConfig
from wav2vec2.transcribe import load_recognizer

CPU = torch.device("cpu")
TINY = ["--size", "tiny", "--seconds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def settings_of_torch():
    """What the program sets for its whole process is set back."""
    threads = torch.get_num_threads()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


@pytest.mark.parametrize("half", ["", "fp16", "bf16"])
def test_the_recognizer_is_what_inference_loads_from_a_checkpoint_of_these_weights(half, tmp_path):
    precision = PrecisionConfig(**{half: True} if half else {})
    made = utterance.make_recognizer("tiny", precision, CPU)
    config = Config(mode="finetune", model=made.model, run=RunConfig(seed=utterance.SEED))
    model = build_model(config, made.dictionary)
    content = {"mode": "finetune", "config": to_dict(config), "labels": list(made.dictionary.symbols)}
    content |= {"sample_rate": 16000, "normalize": False, "model": model.state_dict(), "ema": None, "optimizer": None}
    content |= {"scaler": None, "loader": None, "progress": None, "origin": None}
    save(tmp_path / "model.pt", content)
    loaded = load_recognizer(
        str(tmp_path / "model.pt"), device=CPU, precision=precision, use_ema=True, reference_padding=False
    )
    batch = utterance.make_batch(made, 2, 16000)
    with torch.inference_mode():
        assert torch.equal(made.log_probs(batch), loaded.log_probs(batch))
    kinds = [{name: weight.dtype for name, weight in one.task.named_parameters()} for one in (made, loaded)]
    assert kinds[0] == kinds[1]
    assert not made.task.training
    assert len(made.dictionary) == len(set(made.dictionary.symbols)) == 32


def test_every_stage_is_timed_and_the_latency_is_their_sum(tmp_path, monkeypatch):
    seconds = {"log_probs": 0.02, "texts": 0.01}
    for name, pause in seconds.items():
        real = getattr(utterance.Recognizer, name)
        slow = lambda *args, real=real, pause=pause: (time.sleep(pause), real(*args))[1]  # noqa: E731
        monkeypatch.setattr(utterance.Recognizer, name, slow)
    out = tmp_path / "result.json"
    utterance.main([*TINY, "--repeats", "3", "--warmup", "0", "--json", str(out)])
    result = json.loads(out.read_text())
    assert set(result) == {"latency_ms", "stages_ms", "setting", "hardware", "versions", "commit", "command"}
    stages = result["stages_ms"]
    assert stages["model"]["avg"] > 20
    assert 10 < stages["text"]["avg"] < stages["model"]["avg"]
    assert stages["data"]["avg"] < 10
    assert result["latency_ms"]["avg"] == pytest.approx(sum(stage["avg"] for stage in stages.values()))
    assert result["setting"]["frames"] == 49  # 1 s at 16 kHz


def test_warm_up_does_not_count(monkeypatch):
    calls = []
    monkeypatch.setattr(utterance, "time_stages", lambda *args: calls.append(args[-1]) or {"model": [0.5] * args[-1]})
    result = utterance.measure(utterance.parse([*TINY, "--warmup", "4", "--repeats", "7", "--json", "-"]), CPU)
    assert calls == [4, 7]
    assert result["latency_ms"]["avg"] == pytest.approx(500)


def test_percentiles_are_shares_that_are_below():
    found = utterance.statistics([number / 1000 for number in range(101)])
    assert found == pytest.approx({"avg": 50, "90": 90, "95": 95, "99": 99})


@pytest.mark.parametrize("flags", [("--repeats", "0"), ("--size", "huge"), ("--precision", "int8"), ("--batch", "0")])
def test_mistakes_are_told_by_flag(flags):
    with pytest.raises(ConfigError, match=" ".join(flags)):
        utterance.parse([*flags, "--json", "-"])
