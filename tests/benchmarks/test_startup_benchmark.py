"""benchmarks/startup.py: when the clock stops, what is measured apart, the corpus, its file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from statistics import median

import pytest
import soundfile
from conftest import ROOT

from benchmarks import startup
from common.errors import ConfigError, TrainingError


@pytest.fixture
def data(tmp_path):
    """A small corpus of noise."""
    folder = tmp_path / "lists"
    folder.mkdir()
    for name, clips in (("train", 24), ("dev", 2)):
        startup.write_noise(folder, name, clips)
    return folder


def test_nothing_imports_torch_before_the_first_repetition():
    code = "import sys; import benchmarks.startup; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_clock_stops_at_the_line_and_not_at_the_end():
    code = (
        "import time; print('a', flush=True); time.sleep(0.3); print('hit', flush=True); time.sleep(1.5); print('hit')"
    )
    seconds = startup.seconds_to_line([sys.executable, "-c", code], re.compile("hit"))
    assert 0.3 <= seconds < 1.5


@pytest.mark.parametrize(("code", "message"), [("print('a')", "no line"), ("print('a'); 1 / 0", "status 1")])
def test_a_training_that_fails_is_told_with_its_last_lines(code, message, capsys):
    with pytest.raises(TrainingError, match=message) as error:
        startup.seconds_to_line([sys.executable, "-c", code], re.compile("hit"))
    assert "\n" not in str(error.value)
    said = capsys.readouterr().err
    assert "a" in said.splitlines()
    assert ("ZeroDivisionError" in said) == ("1 / 0" in code)


def test_the_noise_is_what_the_list_says(data):
    for name, clips in (("train", 24), ("dev", 2)):
        root, *lines = (data / f"{name}.tsv").read_text().splitlines()
        assert len(lines) == clips
        for line in lines:
            path, samples = line.split("\t")
            found = soundfile.info(data / root / path)
            assert (found.frames, found.samplerate, found.channels) == (int(samples), 16000, 1)
            assert 16000 <= found.frames <= 32000


def test_the_first_repetition_is_told_apart():
    times = [9.0, 4.0, 2.0, 3.0]
    repetitions = [{"seconds": seconds, "rest": seconds - 1} for seconds in times]
    options = startup.parse(["--device", "cpu", "--json", "-"])
    result = startup.report(options, repetitions)
    assert (result["seconds"]["median"], result["first_seconds"]) == (3.0, 9.0)
    assert result["parts"]["rest"]["median"] == 2.0
    assert result["repetitions"] == repetitions
    assert startup.report(options, repetitions[:1])["seconds"]["median"] == 9.0


def test_mistakes_are_told_by_flag_before_anything_starts(tmp_path, monkeypatch, data):
    monkeypatch.setattr(startup, "repetition", lambda *_: pytest.fail("was measured"))
    out = str(tmp_path / "out.json")
    cases = [
        ((), "--json"),
        (("--json", str(tmp_path)), "--json .*folder"),
        (("--json", out, "--data", str(tmp_path)), "--data .*train.tsv"),
        (("--json", out, "--device", "tpu"), "--device tpu"),
        (("--json", out, "--repeats", "0"), "--repeats 0"),
    ]
    for given, message in cases:
        with pytest.raises(ConfigError, match=message) as error:
            startup.main(given)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.slow
def test_the_quickstarts_pretraining_makes_its_first_update(tmp_path, data, capsys):
    out = tmp_path / "new" / "startup.json"
    startup.main(["--device", "cpu", "--data", str(data), "--repeats", "1", "--json", str(out)])
    result = json.loads(out.read_text())
    assert list(out.parent.iterdir()) == [out]
    (found,) = result["repetitions"]
    assert result["seconds"]["median"] == median([found["seconds"]]) == result["first_seconds"]
    assert tuple(result["parts"]) == ("shell", "interpreter", "torch", "toolkit", "rest")
    assert sum(part["median"] for part in result["parts"].values()) == pytest.approx(found["seconds"])
    assert min(part["median"] for name, part in result["parts"].items() if name != "rest") > 0
    assert {"hardware", "versions", "commit", "command", "setting"} <= set(result)
    assert f"{found['seconds']:.2f} s" in capsys.readouterr().out
