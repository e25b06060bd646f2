"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import threading

import pytest
import torch

from common import checkpoint
from common.checkpoint_writer import CheckpointWriter
from common.errors import CheckpointError, ConfigError


def state(value: float) -> dict:
    return {
        "mode": "pretrain",
        "config": {},
        "model": {"weight": torch.full((1000,), value)},
        "optimizer": {"weight": {"exp_avg": torch.full((1000,), value), "step": 3}},
    }


def test_what_changes_after_save_does_not_reach_the_file(tmp_path, monkeypatch):
    go_on, writer, kept = threading.Event(), CheckpointWriter(), state(1.0)
    real = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: go_on.wait(60) and real(*args))
    writer.save([tmp_path / "a.pt"], kept, lambda: None)  # returns while the write has not begun
    kept["model"]["weight"].fill_(2.0)
    kept["optimizer"]["weight"]["exp_avg"].fill_(2.0)
    assert not (tmp_path / "a.pt").exists()
    go_on.set()
    writer.wait()
    found = checkpoint.load(tmp_path / "a.pt")
    assert found["model"]["weight"].eq(1.0).all()
    assert found["optimizer"]["weight"]["exp_avg"].eq(1.0).all()


def test_the_next_save_waits_for_the_last(tmp_path, monkeypatch):
    order, writer, begun, go_on = [], CheckpointWriter(), threading.Event(), threading.Event()

    def slow(path, content):
        order.append(f"begin {path.name}")
        begun.set()
        go_on.wait(60)
        order.append(f"end {path.name}")

    monkeypatch.setattr(checkpoint, "save", slow)
    writer.save([tmp_path / "a", tmp_path / "b"], state(1.0), lambda: order.append("then"))
    assert begun.wait(60)
    threading.Timer(0.2, go_on.set).start()
    writer.save([tmp_path / "c"], state(1.0), lambda: None)
    writer.wait()
    assert order == ["begin a", "end a", "begin b", "end b", "then", "begin c", "end c"]


def test_a_failed_write_is_raised_by_the_next_call_and_once(tmp_path):
    writer, kept = CheckpointWriter(), []
    (tmp_path / "b.pt").mkdir()  # nothing can be renamed to it
    writer.save([tmp_path / "a.pt", tmp_path / "b.pt"], state(1.0), lambda: kept.append("pruned"))
    writer.join()
    with pytest.raises(ConfigError, match="cannot be written"):
        writer.check()
    writer.check()
    assert checkpoint.load(tmp_path / "a.pt")["mode"] == "pretrain"
    assert kept == []


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    writer = CheckpointWriter()
    writer.save([tmp_path / "a.pt"], state(1.0), lambda: None)
    writer.wait()
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=2**20 + 7999))
    with pytest.raises(CheckpointError, match="1.0 MiB left, and saving takes 0.0 MiB and 1.0 MiB to spare"):
        writer.save([tmp_path / "b.pt"], state(2.0), lambda: None)  # 2 x 1000 x 4 bytes
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=2**20 + 8000))
    writer.save([tmp_path / "b.pt"], state(2.0), lambda: None)
    writer.wait()


def test_the_size_of_a_state_is_that_of_its_file_but_for_the_table(tmp_path):
    big = {**state(1.0), "model": {"half": torch.zeros(50_000, dtype=torch.float16), "one": torch.zeros(30_001)}}
    checkpoint.save(tmp_path / "a.pt", big)
    size = (tmp_path / "a.pt").stat().st_size
    assert checkpoint.num_bytes(big) <= size <= checkpoint.num_bytes(big) + 10_000
