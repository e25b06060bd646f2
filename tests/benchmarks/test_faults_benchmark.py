"""benchmarks/faults.py: what it compares, what it counts as lost, hung and skipped, its file and its table."""

from __future__ import annotations

import copy
import json
import signal
import sys
import time

import pytest
import torch

from benchmarks import fault_files, fault_kills, fault_runs, faults, faults_made
from benchmarks.fault_kills import Try
from benchmarks.fault_runs import Event, HungError, SkippedError, Training, WrongError
from common import checkpoint
from common.errors import ConfigError, TrainingError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches files and processes as Linux does")


def state(update=3, value=1.0):
    parts = dict.fromkeys(("scaler", "ema", "loader"))
    model = {"weight": torch.tensor([value, float("nan"), 0.0])}
    return {"mode": "pretrain", "config": {}, "model": model, "optimizer": {0: torch.ones(2)}, **parts} | {
        "progress": {"step": update, "best": None}
    }


@pytest.fixture
def reference(tmp_path):
    """Stands for a run that nothing interrupted."""
    folder = tmp_path / "reference"
    for update in (3, 6):
        checkpoint.save(checkpoint.update_path(folder, update), state(update))
    size = checkpoint.update_path(folder, 6).stat().st_size
    return faults_made.Reference(folder, dict.fromkeys(faults_made.PHASES, 0.01), size)


class OneReference:
    """A bench that has nothing but a reference."""

    seed = 0

    def __init__(self, reference, folder):
        self._reference, self._folder, self._number = reference, folder, 0

    def reference(self, recipe):
        return self._reference

    def new_folder(self):
        self._number += 1
        folder = self._folder / str(self._number)
        folder.mkdir()
        return folder


# ---- Comparing ------------------------------------------------------------------------------------------------------


def test_states_are_the_same_bit_for_bit_or_the_place_is_told():
    assert faults_made.difference(state(), copy.deepcopy(state())) == ""
    for change, place in (
        (lambda s: s["model"]["weight"].mul_(1 + 2**-23), "/model/weight"),
        (lambda s: s["model"].update(weight=-s["model"]["weight"]), "/model/weight"),  # -0
        (lambda s: s["optimizer"].update({0: torch.ones(2, dtype=torch.bfloat16)}), "/optimizer/0"),
        (lambda s: s["progress"].update(step=4), "/progress/step"),
        (lambda s: s["progress"].update(best=0.0), "/progress/best"),
        (lambda s: s["progress"].pop("best"), "/progress"),
    ):
        other = copy.deepcopy(state())
        change(other)
        assert faults_made.difference(other, state()) == place


def test_a_run_has_reached_the_highest_update_that_is_as_it_should_be(reference, tmp_path):
    folder = tmp_path / "run"
    checkpoint.save(checkpoint.update_path(folder, 3), state(3))
    assert reference.reached(folder) == 3
    checkpoint.save(checkpoint.update_path(folder, 6), state(6, value=1.5))
    assert reference.reached(folder) == 3
    checkpoint.save(checkpoint.update_path(folder, 6), state(6))
    assert reference.reached(folder) == 6
    checkpoint.update_path(folder, 6).write_bytes(b"")
    assert reference.reached(folder) == 3
    checkpoint.update_path(folder, 3).unlink()
    assert reference.reached(folder) == 0


def test_a_comparison_that_fails_is_a_loss(reference, tmp_path, monkeypatch):
    """A reader that takes damaged files for whole ones is found out, and so is one that takes another state."""
    bench = OneReference(reference, tmp_path)
    monkeypatch.setattr(fault_files, "NEWEST", 6)
    monkeypatch.setattr(fault_files, "BEFORE", 3)
    assert [one.wrong for one in fault_files.flipped(bench, runs=0, read=20)] == [""] * 20
    monkeypatch.setattr(checkpoint, "load", lambda path: state(6, value=2.0))
    found = faults.judged(faults.Fault("g", "n", lambda b: fault_files.flipped(b, runs=0, read=20)), bench)
    assert (found["tried"], found["survived"], found["lost"]) == (20, 0, 20)
    assert {one["wrong"] for one in found["tries"]} == {"was read, and differs in /model/weight"}


# ---- Runs -----------------------------------------------------------------------------------------------------------

PROGRAM = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
print("begun", flush=True)
(folder / ".x.tmp").write_text("x")
(folder / ".x.tmp").rename(folder / "x")
(folder / "x").unlink()
if len(sys.argv) > 2:
    if os.fork() == 0:
        os.setsid()
    print("forked", flush=True)
    time.sleep(1000)
print("done", flush=True)
sys.exit(7)
"""


def test_lines_files_and_the_end_of_a_run_are_told_as_they_come(tmp_path):
    with Training([sys.executable, "-c", PROGRAM, str(tmp_path)], tmp_path) as run:
        found = list(run.events())
    files = [(event.kind, event.text) for event in found if event.kind not in ("line", "end")]
    assert files == [("create", ".x.tmp"), ("close", ".x.tmp"), ("rename", "x"), ("delete", "x")]
    assert [event.text for event in found if event.kind == "line"] == ["begun", "done"] == run.lines
    assert found[-1] == Event("end")
    assert run.status == 7


def test_a_run_that_ends_early_is_wrong_and_one_that_does_not_end_is_hung(tmp_path):
    with Training([sys.executable, "-c", PROGRAM, str(tmp_path)], tmp_path) as run:
        with pytest.raises(WrongError, match="ended with status 7 before line never: begun / done") as caught:
            run.until("line", "never")
        assert not isinstance(caught.value, HungError)
    with Training([sys.executable, "-c", PROGRAM, str(tmp_path), "stay"], tmp_path) as run:
        run.until("line", "forked")
        with pytest.raises(HungError, match="did not end"):
            run.end(0.1)
        with pytest.raises(HungError, match="no line never"):
            run.until("line", "never", 0.1)


def test_every_process_of_a_run_ends_with_it_and_no_other(tmp_path):
    with Training([sys.executable, "-c", PROGRAM, str(tmp_path), "stay"], tmp_path) as other:
        other.until("line", "forked")
        with Training([sys.executable, "-c", PROGRAM, str(tmp_path), "stay"], tmp_path) as run:
            run.until("line", "forked")
            assert len(run.members()) == 2  # one of them in a session of its own
            run.signal(signal.SIGTERM, other.process.pid)  # not its own
        assert run.members() == []
        assert len(other.members()) == 2


# ---- Kills ----------------------------------------------------------------------------------------------------------


def test_points_are_drawn_by_seed_over_all_phases():
    points = fault_kills.draw_points(faults.FULL.kills, "0 a")
    assert points == fault_kills.draw_points(faults.FULL.kills, "0 a")
    assert points != fault_kills.draw_points(faults.FULL.kills, "1 a")
    assert len(set(points)) == len(points) >= 25
    assert {point.phase for point in points} == set(faults_made.PHASES)
    assert {point.phase for point in fault_kills.draw_points(faults.QUICK.kills, "1 a")} == set(faults_made.PHASES)
    assert all(0 <= point.share <= 1 for point in points)


def test_phases_are_timed_from_their_first_event_to_their_last():
    line = "train     | epoch 1 | update  {}/18 | eta"
    found = faults_made.durations(
        [
            (1.0, "line", line.format(3)),
            (1.25, "create", ".wav2vec2_update3.pt.tmp"),
            (1.5, "create", ".wav2vec2_best.pt.tmp"),
            (3.25, "close", ".wav2vec2_update3.pt.tmp"),
            (3.5, "rename", "wav2vec2_update3.pt"),
            (4.0, "line", line.format(4)),
            (4.0, "line", "train_avg | epoch 1 | update  4/18 | loss"),
            (6.0, "line", "val       | epoch 1 | update  4/18 | loss"),
        ]
    )
    expected = {"updates": 3.0, "copy": 0.25, "write": 2.0, "rename": 0.25, "prune": 0.5, "validation": 2.0}
    assert found == expected


# ---- Counting and telling -------------------------------------------------------------------------------------------


def raising(*items):
    """A fault whose tries are given, or raised."""

    def tries(bench):
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item

    return tries


def test_what_was_not_survived_is_counted_and_ends_with_status_1(tmp_path, monkeypatch, capsys):
    made = [
        faults.Fault("a", "fine", raising(Try(repeated=2, seconds_to_end=1.5), Try(repeated=1, seconds_to_end=2.5))),
        faults.Fault("a", "half", raising(Try(), Try(wrong="the result differs", updates_lost=3))),
        faults.Fault("b", "hangs", raising(Try(), HungError("did not end"))),
        faults.Fault("b", "breaks", raising(WrongError("ended before"))),
        faults.Fault("b", "cannot", raising(SkippedError("not permitted"))),
    ]
    monkeypatch.setattr(faults, "faults", lambda sizes: made)
    monkeypatch.setattr(faults, "Bench", lambda folder, seed: None)
    out = tmp_path / "new" / "out.json"
    with pytest.raises(TrainingError, match="3 tries were lost, 1 of them hung"):
        faults.main(["--quick", "--jobs", "2", "--json", str(out)])
    result = json.loads(out.read_text())
    assert (result["lost"], result["hung"], result["skipped"]) == (3, 1, 1)
    assert {"setting", "hardware", "versions", "commit", "command"} <= set(result)
    assert str(tmp_path) not in out.read_text()
    rows = {one["name"]: one for one in result["faults"]}
    assert [(one["tried"], one["survived"], one["hung"]) for one in rows.values()] == [
        (2, 2, 0), (2, 1, 0), (2, 1, 1), (1, 0, 0), (0, 0, 0)
    ]  # fmt: skip
    assert (rows["fine"]["repeated"], rows["fine"]["seconds_to_end"], rows["fine"]["updates_lost"]) == (2, 2.5, 0)
    assert rows["half"]["updates_lost"] == 3
    assert rows["cannot"]["skipped"] == "not permitted"
    said = capsys.readouterr().out
    assert "| a: fine | 2 | 2 | 0 | 2 | 2.5 |" in said
    assert "| b: cannot | skipped: not permitted |" in said
    assert "LOST: : ended before" in said
    assert "| **all** | **7** | **4** | lost: 3 | hung: 1 | |" in said


def test_results_name_no_place_of_the_machine(monkeypatch):
    monkeypatch.setattr(faults.socket, "gethostname", lambda: "vm")
    told = f"process 1 (host vm, pid 7) in /tmp/xyz/run3: {faults.ROOT}/train.py and vmstat"
    assert faults.without_places(told, "/tmp/xyz") == "process 1 (host HOST, pid 7) in WORK/run3: train.py and vmstat"
    assert faults.command(["--quick", "--json", "/home/me/out.json"]) == ["--quick", "--json", "out.json"]


def test_nothing_lost_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "faults", lambda sizes: [faults.Fault("a", "fine", raising(Try()))])
    monkeypatch.setattr(faults, "Bench", lambda folder, seed: None)
    faults.main(["--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["lost"], result["hung"], result["faults"][0]["survived"]) == (0, 0, 1)


def test_quick_has_every_kind():
    names = [[f"{one.group}: {one.name}" for one in faults.faults(sizes)] for sizes in (faults.QUICK, faults.FULL)]
    assert names[0] == names[1]
    assert len(set(names[0])) == len(names[0])
    assert {"kill -9", "checkpoints", "disk", "signals", "lock", "processes", "data"} == {
        name.split(":")[0] for name in names[0]
    }


def test_mistakes_are_told_by_flag_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "Bench", lambda *_: pytest.fail("has begun"))
    out = str(tmp_path / "out.json")
    cases = [
        ((), "--json"),
        (("--json", str(tmp_path)), "--json .*folder"),
        (("--json", out, "--only", "earthquakes"), "--only earthquakes"),
        (("--json", out, "--jobs", "-1"), "--jobs -1"),
    ]
    for given, message in cases:
        with pytest.raises(ConfigError, match=message) as error:
            faults.main(given)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_another_system_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="Linux"):
        faults.main(["--json", str(tmp_path / "out.json")])


def test_a_kill_is_lost_when_the_checkpoint_it_leaves_is_another_one(reference, tmp_path, monkeypatch):
    """A toolkit whose checkpoints come out wrong: written by a run that does not go on where it should."""

    class Wrong(OneReference):
        def training(self, recipe, folder):
            program = (
                "import time; from common import checkpoint; from tests.benchmarks import test_faults_benchmark as t;"
                f"checkpoint.save(checkpoint.update_path({str(folder)!r}, 3), t.state(3, value=1.25));"
                "print('train | epoch 1 | update 3/6 | eta', flush=True); time.sleep(1000)"
            )
            return Training([sys.executable, "-c", program], folder)

    monkeypatch.setattr(fault_kills, "finish", lambda *_, **__: ("", 3))
    point = fault_kills.Point("updates", 0.5, 3)
    monkeypatch.setattr(fault_kills, "draw_points", lambda number, seed: [point])
    begun = time.monotonic()
    (found,) = fault_kills.killed_at_points(Wrong(reference, tmp_path), faults_made.PRETRAIN, 1)
    assert found.wrong == "wav2vec2_update3.pt differs in /model/weight"
    assert time.monotonic() - begun < fault_runs.DEADLINE
