"""Checkpoints are whole or absent, those of others are told apart, and the right ones are kept."""

# SPDX-License-Identifier: Apache-2.0
import argparse
import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import hostile_files
import numpy as np
import pytest
import torch

from common import checkpoint
from common.checkpoint import Retention
from common.errors import CheckpointError, ConfigError
from common.torch_file import DamagedError, PickledCodeError

ROOT = Path(checkpoint.__file__).parents[1]


def newest_valid(folder):
    newest = checkpoint.load_newest(folder)
    return newest[0] if newest else None


def make_state(update=1, **changes):
    return {
        "mode": "pretrain",
        "config": {"model": {"conv": [[512, 10, 5]], "dropout": 0.1, "name": None}},
        "model": {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.full((3,), float(update))},
        "labels": ["<s>", "é"],
        "optimizer": {"state": {0: {"step": update, "exp_avg": torch.ones(2, dtype=torch.bfloat16)}}},
        "progress": {"step": update, "best": None},
        **changes,
    }


@pytest.fixture
def saved(tmp_path):
    path = checkpoint.update_path(tmp_path, 1)
    checkpoint.save(path, make_state())
    return path


# ---- what is saved comes back -------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was_saved(saved):
    state = checkpoint.load(saved)
    assert (state["format"], state["format_version"]) == (checkpoint.FORMAT, checkpoint.FORMAT_VERSION)
    expected = make_state()
    assert state["config"] == expected["config"]
    assert state["labels"] == expected["labels"]
    assert state["progress"] == expected["progress"]
    assert torch.equal(state["model"]["weight"], expected["model"]["weight"])
    moment = state["optimizer"]["state"][0]["exp_avg"]
    assert moment.dtype == torch.bfloat16
    assert torch.equal(moment, torch.ones(2, dtype=torch.bfloat16))
    assert sorted(saved.parent.iterdir()) == [saved]


def test_a_saved_file_is_read_by_torch_alone(saved):
    assert torch.load(saved, weights_only=True)["mode"] == "pretrain"


def test_parameters_are_stored_as_plain_tensors(tmp_path):
    module = torch.nn.Linear(2, 2)
    checkpoint.save(tmp_path / "a.pt", make_state(model=dict(module.named_parameters())))
    weight = checkpoint.load(tmp_path / "a.pt")["model"]["weight"]
    assert type(weight) is torch.Tensor
    assert not weight.requires_grad


@pytest.mark.parametrize("value", [np.float64(1.0), Path("a"), {1, 2}, b"bytes", argparse.Namespace(), {(1,): 2}])
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path, value):
    with pytest.raises(TypeError, match=r"state\['progress'\]\['best'\]"):
        checkpoint.save(tmp_path / "a.pt", make_state(progress={"best": value}))
    assert list(tmp_path.iterdir()) == []


# ---- interrupted and impossible saves -----------------------------------------------------------------------

KILLED = """
import os, signal, sys, torch
from common import checkpoint
from tests.common.test_checkpoint import make_state

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

moment, path = sys.argv[1:]
if moment == "writing":
    real = torch.save
    def half(content, file):
        real(content, file)
        file.truncate(file.tell() // 2)
        die()
    torch.save = half
elif moment == "syncing":
    os.fsync = die
else:
    checkpoint._sync_folder = die
checkpoint.save(path, make_state(2))
"""


@pytest.mark.parametrize(("moment", "update"), [("writing", 1), ("syncing", 1), ("replaced", 2)])
def test_a_kill_during_save_leaves_a_whole_checkpoint(saved, moment, update):
    run = subprocess.run(
        [sys.executable, "-c", KILLED, moment, str(saved)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        check=False,
    )
    assert run.returncode == -signal.SIGKILL
    assert checkpoint.load(saved)["progress"]["step"] == update
    assert newest_valid(saved.parent) == saved
    Retention().prune(saved.parent, final=1)
    assert sorted(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(saved, monkeypatch, code):
    def full(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"could not be written .*free some space and go on with --resume"):
        checkpoint.save(saved, make_state(2))
    assert sorted(saved.parent.iterdir()) == [saved]
    assert checkpoint.load(saved)["progress"]["step"] == 1


def test_a_disk_that_fills_up_inside_torch_save_is_reported_as_such(saved):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written") as caught:
            checkpoint.save(saved, make_state(2, model={"weight": torch.zeros(2**18)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert sorted(saved.parent.iterdir()) == [saved]
    assert checkpoint.load(saved)["progress"]["step"] == 1


def test_an_output_folder_that_cannot_be_written_names_the_flag(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output_dir .*file/run: cannot be written"):
        checkpoint.save(tmp_path / "file" / "run" / "a.pt", make_state())

    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"--output_dir .*: cannot be written \(Permission denied\); choose"):
        checkpoint.save(tmp_path / "a.pt", make_state())


# ---- files of others ----------------------------------------------------------------------------------------


def refused(path, message, kind=CheckpointError):
    error = hostile_files.outcome(path, checkpoint.load)
    assert isinstance(error, kind), error
    with pytest.raises(kind, match=message):
        raise error
    assert len(str(error)) < 250 + len(str(path))


def test_a_folder_is_no_checkpoint(tmp_path):
    refused(tmp_path, "is a folder; name a file in it")
    refused(tmp_path / "none.pt", "there is no such file")


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04"])
def test_garbage_is_damaged(tmp_path, content):
    """What test_torch_file.py finds in every detail arrives here."""
    (tmp_path / "a.pt").write_bytes(content)
    refused(tmp_path / "a.pt", "use another checkpoint", DamagedError)


def test_pickled_code_is_refused_in_every_layout(tmp_path):
    path, mark = tmp_path / "a.pt", tmp_path / "executed"
    call = hostile_files.Call(os.system, f"touch {mark}")
    for old in (False, True):
        hostile_files.save({**make_state(), "format": "wav2vec2", "model": call}, path, old=old)
        refused(path, "holds pickled code .* never executed", PickledCodeError)
    assert not mark.exists()


def test_files_of_other_programs_are_refused_with_the_way_in(tmp_path):
    path = tmp_path / "a.pt"
    contents = [
        {"args": None, "cfg": {"model": {}}, "model": {}, "task_state": {}},
        {"args": {"mode": "finetune"}, "model": {}, "train_state": {}},
        {"wav2vec2.encoder.layer_norm.weight": torch.ones(1)},
        {"weights": torch.ones(1)},
    ]
    for content in contents:
        torch.save(content, path)
        refused(path, r"is no checkpoint of this toolkit; .*utils/convert_checkpoint\.py IN OUT --to native")
    for content in (argparse.Namespace(arch="wav2vec2"), np.float64(1)):
        torch.save({"args": content, "model": {}}, path)
        refused(path, "holds pickled code", PickledCodeError)
    torch.save([torch.ones(1)], path)
    refused(path, "holds a list, not a checkpoint")


def test_newer_older_and_incomplete_formats(tmp_path):
    path = tmp_path / "a.pt"
    state = {**make_state(), "format": "wav2vec2"}
    torch.save({**state, "format_version": 3}, path)
    refused(path, "has format version 3, this toolkit reads up to 2; update the toolkit")
    for version in ("x", 0, None, torch.ones(3), [[1]] * 10**5, "\n\x1b" * 10**6):
        torch.save({**state, "format_version": version}, path)
        refused(path, "has the format version ", DamagedError)
    torch.save({"format": "wav2vec2", "format_version": 1, "mode": "pretrain"}, path)
    refused(path, "lacks config, model", DamagedError)
    for key in ("mode", "config", "model"):
        for nonsense in (None, [], 7, torch.ones(3)):
            torch.save({**state, "format_version": 2, key: nonsense}, path)
            refused(path, f"lacks {key}; use another", DamagedError)


def test_a_file_of_version_1_is_brought_up_to_date(tmp_path):
    state = {**make_state(), "format": "wav2vec2", "format_version": 1}
    torch.save(state, tmp_path / "a.pt")
    found = checkpoint.load(tmp_path / "a.pt")
    assert (found["format_version"], found["origin"]) == (2, None)
    assert {key: found[key] for key in ("mode", "config", "labels", "progress")} == {
        key: state[key] for key in ("mode", "config", "labels", "progress")
    }
    checkpoint.save(tmp_path / "b.pt", found)
    assert torch.load(tmp_path / "b.pt", weights_only=True)["format_version"] == checkpoint.FORMAT_VERSION


# ---- the newest and the kept ones ---------------------------------------------------------------------------


def test_the_newest_goes_by_update_and_not_by_name_or_date(tmp_path):
    for update in (1000, 9, 200):
        checkpoint.save(checkpoint.update_path(tmp_path, update), make_state(update))
    checkpoint.save(checkpoint.best_path(tmp_path), make_state(5000))
    checkpoint.save(tmp_path / "wav2vec2_update9999_copy.pt", make_state(9999))
    assert [checkpoint.update_number(path) for path in checkpoint.update_paths(tmp_path)] == [1000, 200, 9]
    path, state = checkpoint.load_newest(tmp_path)
    assert path == newest_valid(tmp_path) == tmp_path / "wav2vec2_update1000.pt"
    assert state["progress"]["step"] == 1000


def test_no_checkpoint_is_none(tmp_path):
    assert newest_valid(tmp_path) is None
    assert newest_valid(tmp_path / "none") is None


def test_a_damaged_newest_one_is_reported_and_the_one_before_is_used(tmp_path, caplog):
    for update in (1, 2, 3):
        checkpoint.save(checkpoint.update_path(tmp_path, update), make_state(update))
    checkpoint.update_path(tmp_path, 3).write_bytes(b"")
    broken = checkpoint.update_path(tmp_path, 2)
    broken.write_bytes(broken.read_bytes()[:500])
    assert newest_valid(tmp_path) == checkpoint.update_path(tmp_path, 1)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "wav2vec2_update3.pt: is empty" in caplog.text


def test_a_run_is_never_silently_started_anew(tmp_path):
    path = checkpoint.update_path(tmp_path, 7)
    checkpoint.save(path, make_state(7))
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints can be read; remove them"):
        newest_valid(tmp_path)
    checkpoint.best_path(tmp_path).write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"can be read; go on with --resume_from .*wav2vec2_best\.pt"):
        newest_valid(tmp_path)
    checkpoint.best_path(tmp_path).write_bytes(whole[:400])
    with pytest.raises(CheckpointError, match="can be read; remove them"):
        newest_valid(tmp_path)
    path.write_bytes(whole)
    torch.save({**make_state(), "format": "wav2vec2", "format_version": 99}, tmp_path / "wav2vec2_update8.pt")
    with pytest.raises(CheckpointError, match="update the toolkit"):
        newest_valid(tmp_path)


def simulate(tmp_path, updates, retention, final):
    """File names after a run that saves at each of `updates` and prunes after each."""
    for update in updates:
        checkpoint.update_path(tmp_path, update).write_bytes(b"x")
        retention.prune(tmp_path, final)
    return sorted(checkpoint.update_number(path) for path in checkpoint.update_paths(tmp_path))


def test_the_last_two_and_the_milestones_stay(tmp_path):
    checkpoint.best_path(tmp_path).write_bytes(b"x")
    (tmp_path / "wav2vec2_update10.pt.bak").write_bytes(b"x")
    milestones = checkpoint.default_milestones(100)
    assert simulate(tmp_path, range(5, 105, 5), Retention(2, milestones), 100) == [25, 50, 75, 95, 100]
    assert checkpoint.best_path(tmp_path).exists()
    assert (tmp_path / "wav2vec2_update10.pt.bak").exists()


def test_the_final_update_is_never_removed(tmp_path):
    checkpoint.update_path(tmp_path, 10).write_bytes(b"x")
    assert simulate(tmp_path, (20, 30, 40, 50), Retention(1), 10) == [10, 50]


def test_prune_tells_what_it_removed_and_sorts_by_number(tmp_path):
    for update in (9, 10, 100):
        checkpoint.update_path(tmp_path, update).write_bytes(b"x")
    assert Retention().prune(tmp_path, final=500) == [tmp_path / "wav2vec2_update9.pt"]


@pytest.mark.parametrize(
    ("last", "expected"), [(400000, (100000, 200000, 300000, 400000)), (10, (2, 5, 7, 10)), (2, (1, 2)), (1, (1,))]
)
def test_default_milestones_are_every_quarter(last, expected):
    assert checkpoint.default_milestones(last) == expected
