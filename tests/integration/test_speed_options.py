"""Options that make a step faster or smaller must not change it."""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import MODEL_FLAGS, corpus

import train
from common import distributed, host_memory
from common.errors import ConfigError
from wav2vec2.arg_parser import parse_train
from wav2vec2.build import build_run
from wav2vec2.run import Run

FLAGS = [
    *MODEL_FLAGS,
    *("--num_workers", "0", "--max_tokens", "40000", "--num_negatives", "10", "--mask_length", "3"),
    *("--max_update", "20", "--lr", "0.001", "--clip_norm", "1"),
]
NO_DROPOUT = ("--dropout", "0", "--attention_dropout", "0")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"), number=14)


def build(data: Path, output: Path, *more: str) -> Run:
    config = parse_train(
        ["pretrain", "--data", str(data), "--output_dir", str(output), "--device", "cpu", *FLAGS, *more]
    )
    return build_run(config, torch.device("cpu"), ["test"])


def updates(run: Run, number: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = []
    for step in range(number):
        assert train.train_step(run, run.train_loader.next_update(), step)
        losses.append(run.metrics.reduce("cpu")["loss"])
    return losses, {name: weight.clone() for name, weight in run.optimizer.master_weights().items()}


@pytest.mark.parametrize("more", [(), ("--hourglass_transformer", "[1,(1,3),1]"), ("--encoder_layerdrop", "0.5")])
def test_checkpointed_activations_give_the_same_run_bit_for_bit(data, tmp_path, more):
    """With dropout on: what is computed again is dropped at the same places."""
    plain = updates(build(data, tmp_path / "a", *more), 4)
    saved = updates(build(data, tmp_path / "b", *more, "--checkpoint_activations"), 4)
    assert plain[0] == saved[0]
    for name, weight in plain[1].items():
        assert torch.equal(weight, saved[1][name]), name


def test_checkpointed_activations_keep_less_for_backward(data, tmp_path):
    def kept(run: Run) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = run.train_loader.next_update()[0]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = run.engine(batch, torch.ones(()))
            loss.backward()
        return sum(sizes.values())

    deep = ("--hourglass_transformer", "[4,(1,2),4]")
    plain = kept(build(data, tmp_path / "a", *deep))
    assert kept(build(data, tmp_path / "b", *deep, "--checkpoint_activations")) < 0.6 * plain


@pytest.mark.slow
def test_compiled_parts_stay_whole_with_dropout_and_in_validation(data, tmp_path, monkeypatch, caplog):
    """Batches of one row and of several, padded and not, with gradients and without: all run as compiled code."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    run = build(data, tmp_path, "--compile", "--encoder_layerdrop", "0.2", "--max_tokens", "20000")
    torch._dynamo.utils.counters.clear()
    updates(run, 6)
    run.validate()
    updates(run, 2)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert "recompile_limit" not in caplog.text


@pytest.mark.slow
def test_compiled_parts_give_the_same_run_with_few_compilations(data, tmp_path, monkeypatch):
    """Batches of several lengths share their compiled code. Traced and differentiated as ever, but not made C++."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain_losses, plain = updates(build(data, tmp_path / "a", *NO_DROPOUT), 6)
    torch._dynamo.utils.counters.clear()
    run = build(data, tmp_path / "b", *NO_DROPOUT, "--compile")
    compiled_losses, compiled = updates(run, 6)
    assert compiled_losses == pytest.approx(plain_losses, rel=1e-4)
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, atol=2e-4, rtol=1e-3)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    compilations = counters["stats"]["unique_graphs"]
    updates(run, 6)
    assert counters["stats"]["unique_graphs"] == compilations > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cuda_graphs",), "--cuda_graphs: needs --compile"),
        (("--parallel", "fsdp", "--compile"), "--parallel fsdp --compile: .* drop one"),
        (("--parallel", "fsdp", "--bucket_cap_mb", "5"), "--bucket_cap_mb: .* --parallel ddp"),
        (("--cuda_graphs", "--compile"), "--cuda_graphs: needs a GPU"),
    ],
)
def test_options_that_cannot_work_are_refused(data, tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        build(data, tmp_path, *flags)


def test_layerdrop_and_cuda_graphs_exclude_each_other(data, tmp_path):
    flags = ["--data", str(data), "--output_dir", str(tmp_path), "--encoder_layerdrop", "0.1"]
    with pytest.raises(ConfigError, match="set --encoder_layerdrop 0"):
        parse_train(["pretrain", *flags, "--compile", "--cuda_graphs"])


def test_the_allocator_keeps_what_is_freed_on_a_cpu_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(distributed, "keep_freed_memory", lambda: calls.append(1))
    with distributed.session("cpu"):
        assert calls == [1]


def test_only_glibc_is_told_to_keep_freed_memory(monkeypatch):
    class Libc:
        calls: list[tuple[int, int]] = []

        def mallopt(self, option: int, value: int) -> int:
            self.calls.append((option, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Libc())
    monkeypatch.setattr(host_memory.platform, "libc_ver", lambda: ("", ""))
    host_memory.keep_freed_memory()
    assert Libc.calls == []
    monkeypatch.setattr(host_memory.platform, "libc_ver", lambda: ("glibc", "2.36"))
    host_memory.keep_freed_memory()
    assert dict(Libc.calls) == {-3: 2**25, -1: -1}
