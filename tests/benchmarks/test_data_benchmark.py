"""benchmarks/data.py: what it makes, the arithmetic of waste and memory, and how bars are told."""

from __future__ import annotations

import gc
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from benchmarks import data, data_made, data_parts
from common.data.manifest import read_manifest
from common.errors import ConfigError, TrainingError
from utils import librispeech_lengths

TINY = data.Sizes(((300, 1e3),), 2, 400, 0.03, 2, 3000, 40, data_parts.MAX_TOKENS, 2)


# ---- What is made ---------------------------------------------------------------------------------------------------


def test_lengths_are_those_of_librispeech():
    lengths = data_made.draw_lengths(50_000)
    assert (lengths % 80 == 0).all()
    for share, seconds in zip(librispeech_lengths.QUANTILES, librispeech_lengths.SECONDS, strict=True):
        assert np.quantile(lengths, share) / 16000 == pytest.approx(seconds, abs=0.1)


def test_a_list_is_read_as_it_was_drawn(tmp_path):
    path_bytes = data_made.write_list(tmp_path / "x.tsv", 500)
    manifest = read_manifest(tmp_path / "x.tsv")
    assert np.array_equal(manifest.num_samples, data_made.draw_lengths(500))
    paths = [line.split("\t")[0] for line in (tmp_path / "x.tsv").read_text().splitlines()[1:]]
    assert len(set(paths)) == 500
    assert path_bytes == sum(len(path.encode()) for path in paths)
    for path in (paths[0], paths[-1]):
        subset, speaker, chapter, name = path.split("/")
        assert (subset, name.split("-")[:2]) == ("train-other-500", [speaker, chapter])


def test_noise_compresses_about_as_speech_does(tmp_path):
    """LibriSpeech's FLAC files take about half of their samples' bytes; white noise takes all of them."""
    wave = data_made.noise_like_speech(10 * 16000, np.random.default_rng(0))
    soundfile.write(tmp_path / "x.flac", wave, 16000, subtype="PCM_16")
    assert 0.4 < (tmp_path / "x.flac").stat().st_size / (2 * len(wave)) < 0.75
    assert np.abs(wave).max() == pytest.approx(0.5)


def test_clips_are_files_of_the_listed_lengths(tmp_path, monkeypatch):
    monkeypatch.setattr(data_made, "DIFFERENT_CLIPS", 3)
    for linked in (True, False):
        if not linked:
            monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
        listed = data_made.write_clips(tmp_path / "clips", 1005)  # over what was there
        files = data_parts.listed_files(listed)
        assert len({path for path, _ in files}) == 1005
        assert len({samples for _, samples in files}) == 3
        for path, samples in files[::100]:
            assert soundfile.info(path).frames == samples
            assert 0.25 * 16000 <= samples <= 0.5 * 16000
            assert (path.stat().st_nlink > 1) == linked


# ---- Arithmetic -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("crop", "concat", "update_freq"), [(True, 1, 4), (True, 4, 2), (False, 1, 1), (False, 4, 1)])
def test_waste_is_that_of_the_batches_that_training_gets(crop, concat, update_freq, tmp_path, monkeypatch):
    """Brute force: all batches of an epoch are made, and their numbers counted."""
    recipe = {"MAX_TOKENS": 60_000, "MIN_SAMPLE_SIZE": 2_000, "MAX_SAMPLE_SIZE": 9_000, "MULTIPLE": 4}
    for name, value in recipe.items():
        monkeypatch.setattr(data_parts, name, value)
    lengths = np.random.default_rng(3).integers(1_000, 12_000, 401)
    lines = [".", *(f"{number}.flac\t{samples}" for number, samples in enumerate(lengths))]
    (tmp_path / "x.tsv").write_text("\n".join(lines))
    monkeypatch.setattr("common.data.dataset.read_audio", lambda *_, frames, **__: np.ones(frames, np.float32))

    def epoch(concat, update_freq):
        loader = data_parts.base_loader(
            read_manifest(tmp_path / "x.tsv"), crop=crop, concat=concat, update_freq=update_freq
        )
        batches = [batch for _ in range(loader.updates_per_epoch) for batch in loader.next_update()]
        loader.close()
        return loader, batches

    loader, batches = epoch(concat, update_freq)
    numbers = sum(batch.audio_BS.numel() for batch in batches)
    speech = sum(int((batch.audio_BS != 0).sum()) for batch in batches)
    _, every_one = epoch(1, 1)  # nothing sits out
    kept = lengths[lengths >= 2_000].sum()
    used = sum(int((batch.audio_BS != 0).sum()) for batch in every_one)
    found = data_parts.waste(lengths, crop=crop, concat=concat, update_freq=update_freq)
    assert found["padded"] == pytest.approx(1 - speech / numbers)
    assert found["cropped"] == pytest.approx(1 - used / kept)
    assert found["too_short"] == pytest.approx(1 - kept / lengths.sum())
    assert found["left_over"] == loader._sampler.left_over_share
    assert (found["padded"] > 0) == (concat > 1 or not crop)
    assert found["cropped"] > 0


def test_ratios_are_medians_over_the_rounds():
    sides = ("soundfile", "files", "shards", "cropped")
    rounds = [dict(zip(sides, times, strict=True)) for times in [(1, 2, 2, 4), (2, 2, 4, 4), (4, 20, 30, 8)]]
    found = data_parts.compared({"soundfile": 1, "files": 1, "shards": 1, "cropped": 0.5}, rounds)
    assert found["files_over_soundfile"]["median"] == 2  # of 2, 1 and 5
    assert found["shards_over_files"]["median"] == 1.5  # of 1, 2 and 1.5
    assert found["hours_per_hour"] == {"soundfile": 1800, "files": 1800, "shards": 900, "cropped": 450}


def _child(array, write, pipe):
    pipe.send(data_parts.unique_bytes())
    if write:
        array += 1
    else:
        array.sum()
    pipe.send(data_parts.unique_bytes())
    pipe.recv()


def test_unique_bytes_are_what_a_process_does_not_share():
    size = 256 << 20  # beside which what the tests before have left does not count
    gc.collect()
    before = data_parts.trimmed_bytes()
    array = np.ones(size, np.uint8)
    assert data_parts.trimmed_bytes() - before == pytest.approx(size, rel=0.1)
    for write, expected in ((False, 0), (True, size)):
        here, there = multiprocessing.get_context("fork").Pipe()
        child = multiprocessing.get_context("fork").Process(target=_child, args=(array, write, there))
        child.start()
        first, last = here.recv(), here.recv()
        assert last - first == pytest.approx(expected, abs=0.1 * size)
        assert child.pid in data_parts.workers()
        assert data_parts.settled_bytes([child.pid])[0] == pytest.approx(last, abs=0.1 * size)
        here.send(None)
        child.join()


# ---- Bars and results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "at_least", "met"), [(1.9, False, True), (2.0, False, True), (2.1, False, False), (1.9, True, False)]
)
def test_a_bar_is_met_or_not(value, at_least, met):
    figure = data.Figure("time", value, "s", 2.0, at_least)
    assert figure.met is met
    told = data.judged([figure, data.Figure("without a bar", 1e9)], {"raw": 1})
    assert told["met"] is met
    assert told["bar"] == {"time": "at least 2 s" if at_least else "at most 2 s"}
    assert [one["met"] for one in told["figures"]] == [met, None]
    first, second = data.table("start", [figure, data.Figure("without a bar", 1e9)]).splitlines()
    assert first.endswith("  NOT MET") is not met
    assert first.endswith("  met") is met
    assert "met" not in second.lower()


def test_results_that_miss_their_bars_are_told_as_such(tmp_path, monkeypatch, capsys):
    good, bad = data.Figure("a", 1, "s", 2), data.Figure("b", 0.5, "%", 0.03)
    made = {"start": [good], "waste": [good, bad]}
    monkeypatch.setattr(data, "PARTS", {name: lambda *_, of=of: (of, {"raw": 1}) for name, of in made.items()})
    out = tmp_path / "new" / "out.json"
    data.main(["--quick", "--parts", "start", "waste", "start", "--json", str(out)])
    result = json.loads(out.read_text())
    assert list(out.parent.iterdir()) == [out]
    assert (result["start"]["met"], result["waste"]["met"]) == (True, False)
    assert result["waste"]["bar"] == {"a": "at most 2 s", "b": "at most 3.00%"}
    assert result["waste"]["figures"][1] == {
        "figure": "b", "value": 0.5, "unit": "%", "bar": 0.03, "at_least": False, "met": False
    }  # fmt: skip
    assert {"sizes", "hardware", "versions", "commit", "command"} <= set(result)
    assert result["sizes"]["clips"] == data.QUICK.clips
    said = capsys.readouterr().out
    assert said.count("NOT MET") == 1
    assert "50.00%" in said


def test_the_bars_are_those_that_were_set():
    assert data.FULL.start == ((280_000, 2), (10_000_000, 60))
    assert (data.FULL.clips, data.FULL.epochs, data.FULL.longest) == (100_000, 10, 10_000_000)
    assert (data.BESIDE_PATHS, data.HOURS_PER_HOUR, data.OVER_SOUNDFILE) == (40, 400, 1.3)
    assert (data.SHARE_OF_WORKERS, data.PADDED, data.GROWTH) == (0.1, 0.03, 0.05)


def test_memory_is_judged_beside_the_paths_and_the_few(tmp_path, monkeypatch):
    """Figures by hand: 10 utterances, 1,000 bytes held for list and plan, workers 40 bytes above those of few."""
    answers = {"held_memory": {"list": 800, "list_and_plan": 1000, "peak": 3000}}

    def measured(measurement, *, listed, **_):
        workers = {"workers": 540 if listed.endswith("/10.tsv") else 500, "asked": 7}
        return answers.get(measurement.__name__, workers)

    monkeypatch.setattr(data_parts, "in_fresh_process", measured)
    figures, raw = data.memory(replace(TINY, start=((10, 1.0),)), tmp_path)
    assert [figure.value for figure in figures] == [100, 80, 300, 0.05]
    assert figures[0].bar == 40 + raw["path_bytes"] / 10
    assert [figure.met for figure in figures] == [figures[0].bar >= 100, None, None, True]


def test_mistakes_are_told_by_flag_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PARTS", {name: lambda *_: pytest.fail("was measured") for name in data.PARTS})
    (tmp_path / "file").touch()
    out = str(tmp_path / "out.json")
    cases = [
        ((), "--json"),
        (("--json", str(tmp_path)), "--json .*folder"),
        (("--json", out, "--parts", "disk"), "--parts disk"),
        (("--json", out, "--work", str(tmp_path / "file")), "file.*cannot be written"),
    ]
    for given, message in cases:
        with pytest.raises(ConfigError, match=message) as error:
            data.main(given)
        assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_all_parts_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "QUICK", TINY)
    monkeypatch.setattr(
        "utils.espeak.check_installed", lambda: (_ for _ in ()).throw(ConfigError("eSpeak NG: not installed"))
    )
    out, work = tmp_path / "data.json", tmp_path / "work"
    data.main(["--quick", "--json", str(out), "--work", str(work)])
    result = json.loads(out.read_text())
    names = ("start", "memory", "decode", "waste", "soak")
    assert [name for name in result if name in names] == list(names)
    for name in names:
        part = result[name]
        assert set(part) == {"bar", "met", "figures", "measured"}
        assert part["met"] == all(figure["met"] is not False for figure in part["figures"])
    decoded = result["decode"]["measured"]
    listed = sum(samples for _, samples in data_parts.listed_files(work / "noise_0.03h.tsv")) / 16000 / 3600
    assert decoded["corpus"] == "noise"
    assert listed == pytest.approx(0.03, rel=0.5)
    for side in ("soundfile", "files", "shards"):
        assert decoded["hours"][side] == pytest.approx(listed)
    assert 0 < decoded["hours"]["cropped"] <= listed
    assert len(decoded["rounds"]) == 2
    assert min(result["memory"]["measured"]["bytes"].values()) > 0
    assert [set(epoch) for epoch in result["soak"]["measured"]["epochs"]] == [{"main", "workers"}] * 2
    assert len(capsys.readouterr().out.splitlines()) >= sum(len(result[name]["figures"]) for name in names)
    with pytest.raises(TrainingError, match="status 1"):
        data_parts.in_fresh_process(data_parts.start, listed=str(tmp_path / "absent.tsv"))
