"""What is said before a long job: every fault once and at its place, nothing about good data, and a clean list."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from common.data.audio import read_audio
from common.data.manifest import read_manifest
from common.errors import ConfigError, DataError
from utils import check_data, list_checks, list_report
from utils.list_checks import KINDS, Settings
from utils.list_report import Limit
from wav2vec2.model import num_frames

PROGRAM = Path(check_data.__file__)
STANDARD = [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2
RATE = 16000


def noise(number, samples=8000, peak=0.3):
    """Samples that no other number has."""
    return (np.random.default_rng(number).uniform(-peak, peak, samples) * 32768).astype(np.int16)


def write(path, wave, rate=RATE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, **options)


def write_list(tsv, root, rows, labels=True):
    """Rows are (path, samples, label line)."""
    tsv.write_text("\n".join([str(root), *(f"{path}\t{samples}" for path, samples, _ in rows)]) + "\n")
    if labels:
        tsv.with_suffix(".ltr").write_text("".join(f"{line}\n" for _, _, line in rows))
    (tsv.parent / "dict.ltr.txt").write_text("| 9\nA 8\nB 7\n")


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.fixture
def faulty(tmp_path):
    """A list with every fault, and the kinds that each line (counted from 2) must be reported for."""
    root = tmp_path / "audio"
    rows, kinds = [], []

    def add(name, wave, *expected, listed=None, text="A B |", **options):
        if wave is not None:
            write(root / name, wave, **options)
        rows.append((name, listed or (8000 if wave is None else len(wave)), text))
        kinds.append(set(expected))

    add("good.wav", noise(0))
    add("missing.wav", None, "missing")
    (root / "zero.wav").write_bytes(b"")
    add("zero.wav", None, "unreadable")
    (root / "page.flac").write_text("<html>not here</html>")
    add("page.flac", None, "unreadable")
    add("cut.wav", noise(1), "damaged")
    cut(root / "cut.wav", 0.5)
    add("cut.flac", noise(2), "damaged")
    cut(root / "cut.flac", 0.6)
    for name, value in (("nan.wav", np.nan), ("inf.wav", -np.inf)):
        wave = noise(3) / np.float32(32768)
        wave[4321] = value
        add(name, wave, "nan", subtype="FLOAT")
    add("longer.wav", noise(4), "length", listed=7000)
    add("shorter.wav", noise(5), "length", listed=9000)
    add("399.wav", noise(6, 399), "short")
    add("400.wav", noise(7, 400), text="A")
    add("silent.wav", np.zeros(8000, np.int16), "silent")
    add("constant.wav", np.full(8000, 5000, np.int16), "silent")
    add("silence.wav", np.zeros(8000, np.int16), "empty", text="")
    add("speech.wav", noise(8), "empty", text=" ")
    add("strange.wav", noise(9), "unknown", text="A É | B |")
    add("4_frames.wav", noise(10, 1400), text="A B A |")  # (1400 - 400) // 320 + 1 frames
    add("crowded.wav", noise(11, 1400), "infeasible", text="A A B |")
    add("clipped.wav", np.tile(np.repeat(np.array([32767, -32768, 100, 7], np.int16), 50), 40), "clipped")
    add("copy.flac", noise(0), "repeated")
    add("deep/more.wav", noise(13))
    add("good.wav", noise(0), "repeated")
    tsv = tmp_path / "train.tsv"
    write_list(tsv, root, rows)
    return tsv, {line: found for line, found in enumerate(kinds, start=2) if found}


def check(*arguments, fails=False):
    """The JSON report of a run, of which the status is as expected."""
    out = Path(str(arguments[0])).with_name("report.json")
    command = [*map(str, arguments), "--json", str(out)]
    if fails:
        with pytest.raises(DataError):
            check_data.main(command)
    else:
        check_data.main(command)
    report = json.loads(out.read_text())
    assert report["status"] == int(fails)
    return report


def clips(path):
    """Where the audio of a list is."""
    manifest = read_manifest(path)
    return [manifest[index].clip for index in range(len(manifest))]


def found_in(report, position=0):
    """Line -> kinds."""
    found = {}
    for finding in report["lists"][position]["findings"]:
        assert finding["utterances"] == len(finding["lines"]) == len(set(finding["lines"]))
        for line in finding["lines"]:
            found.setdefault(line, set()).add(finding["kind"])
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_every_fault_is_found_once_and_at_its_place(faulty, workers):
    tsv, expected = faulty
    report = check(tsv, "--workers", workers, fails=True)
    assert found_in(report) == expected
    assert {kind for kinds in expected.values() for kind in kinds} == {kind.name for kind in KINDS} - {"shared"}
    lines = tsv.read_text().splitlines()
    for finding in report["lists"][0]["findings"]:
        for offender in finding["first"]:
            name, _, line = offender["where"].rpartition(":")
            if name.endswith(".ltr"):
                line = int(line) + 1
            assert offender["path"].endswith(lines[int(line) - 1].split("\t")[0])
            assert finding["kind"] in expected[int(line)]


def test_results_do_not_depend_on_the_number_of_workers(faulty):
    tsv, _ = faulty
    reports = [check(tsv, "--workers", workers, fails=True) for workers in (1, 2, 5)]
    assert reports[0] == reports[1] == reports[2]


def test_headers_show_what_headers_can_and_nothing_is_decoded(faulty, monkeypatch):
    monkeypatch.setattr(list_checks, "read_audio", None)
    tsv, expected = faulty
    names = [line.split("\t")[0] for line in tsv.read_text().splitlines()]
    hidden = {"nan", "silent", "clipped"}
    shown = {line: kinds - hidden for line, kinds in expected.items() if names[line - 1] != "cut.flac"}
    del shown[names.index("copy.flac") + 1]  # the same samples in another file
    report = check(tsv, "--headers_only", "--workers", 1, fails=True)
    assert found_in(report) == {line: kinds for line, kinds in shown.items() if kinds}


@pytest.fixture
def clean(tmp_path):
    """A list, labels and a dictionary without any fault."""
    rows = []
    for number in range(8):
        write(tmp_path / f"audio/{number % 2}/{number}.flac", noise(100 + number, 8000 + 100 * number))
        rows.append((f"{number % 2}/{number}.flac", 8000 + 100 * number, "A B | A |"))
    write_list(tmp_path / "clean.tsv", tmp_path / "audio", rows)
    return tmp_path / "clean.tsv"


def test_nothing_is_found_in_good_data(clean, capsys):
    report = check(clean)
    assert found_in(report) == {}
    assert report["lists"][0]["labels_fault"] == ""
    assert report["lists"][0]["labels"] == str(clean.with_suffix(".ltr"))
    out = capsys.readouterr().out
    assert "error" not in out
    assert "remark" not in out
    assert out.endswith("nothing found that would stop or spoil a run\n")


def test_the_fixed_list_passes_and_keeps_every_good_utterance_with_its_labels(faulty, tmp_path, capsys):
    tsv, expected = faulty
    errors = {kind.name for kind in KINDS if kind.is_error}
    out = tmp_path / "elsewhere/fixed.tsv"
    tsv.with_suffix(".wrd").write_text(tsv.with_suffix(".ltr").read_text())
    check(tsv, "--fix", out, fails=True)
    before, after = (read_manifest(path, path.with_suffix(".ltr")) for path in (tsv, out))
    keep = [i for i in range(len(before)) if not expected.get(i + 2, set()) & errors]
    assert [(u.clip, u.num_samples, u.text) for u in (before[i] for i in keep)] == [
        (u.clip, u.num_samples, u.text) for u in (after[i] for i in range(len(after)))
    ]
    assert out.with_suffix(".wrd").read_text() == out.with_suffix(".ltr").read_text()
    assert f"{len(before) - len(keep)} are left out (1 missing, 2 unreadable" in capsys.readouterr().out
    assert {kind for kinds in found_in(check(out)).values() for kind in kinds} == {"repeated", "clipped", "empty"}


def test_remarks_are_left_out_of_the_fixed_list_when_asked(faulty, tmp_path):
    tsv, expected = faulty
    out = tmp_path / "fixed.tsv"
    check(tsv, "--fix", out, "--drop", "repeated", "clipped", "empty", fails=True)
    assert found_in(check(out)) == {}
    assert len(read_manifest(out)) == len(read_manifest(tsv)) - len(expected)


def test_no_input_is_overwritten(clean, tmp_path):
    (tmp_path / "link.tsv").symlink_to(clean)
    (tmp_path / "other.ltr").symlink_to(clean.with_suffix(".ltr"))
    contents = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    for arguments, message in (
        (["--fix", clean], "would overwrite"),
        (["--fix", tmp_path / "link.tsv"], "would overwrite"),
        (["--fix", tmp_path / "other.tsv"], "other.ltr, which is an input"),
        (["--fix", tmp_path / "x.json"], "end in .tsv"),
        (["--json", clean.with_suffix(".ltr")], "is one of the files read"),
        (["--fix", tmp_path / "x.tsv", "--png", tmp_path / "x.tsv"], "is one of the files read"),
        (["--drop", "empty"], "give --fix"),
        (["--workers", "0"], "1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_data.main([str(clean), *map(str, arguments)])
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == contents


def test_labels_that_do_not_pair_are_an_error_and_the_rest_is_checked(faulty, tmp_path):
    tsv, expected = faulty
    labels = tsv.with_suffix(".ltr")
    labels.write_text(labels.read_text() + "A |\n")
    report = check(tsv, fails=True)
    number = len(read_manifest(tsv))
    assert f"{number + 1} lines of labels for {number} utterances" in report["lists"][0]["labels_fault"]
    of_labels = {"unknown", "infeasible", "empty"}
    of_audio = {line: kinds - of_labels for line, kinds in expected.items() if kinds - of_labels}
    assert {line: kinds for line, kinds in found_in(report).items() if kinds != {"silent"}} == {
        line: kinds for line, kinds in of_audio.items() if kinds != {"silent"}
    }
    with pytest.raises(DataError, match="nothing was written"):
        check_data.main([str(tsv), "--fix", str(tmp_path / "fixed.tsv")])
    assert not (tmp_path / "fixed.tsv").exists()


def test_the_dictionary_may_lie_elsewhere_and_its_own_symbols_are_no_labels(clean, tmp_path, capsys):
    dictionary = tmp_path / "elsewhere.txt"
    dictionary.write_text("| 1\nA 1\n")
    report = check(clean, "--dictionary", dictionary, fails=True)
    assert found_in(report) == {line: {"unknown"} for line in range(2, 10)}
    assert report["lists"][0]["unknown_symbols"] == {"B": 8}
    assert "'B' (U+0042) 8 times" in capsys.readouterr().out
    clean.with_suffix(".ltr").write_text("A <unk> |\n" * 8)
    assert found_in(check(clean, fails=True)) == {line: {"unknown"} for line in range(2, 10)}


def test_audio_of_an_earlier_list_is_an_error_however_it_got_there(clean, tmp_path):
    audio = tmp_path / "audio"
    (audio / "2").mkdir()
    (audio / "2/link.flac").symlink_to(audio / "0/0.flac")
    (audio / "2/copy.flac").write_bytes((audio / "1/1.flac").read_bytes())
    write(audio / "2/recoded.wav", soundfile.read(audio / "0/2.flac", dtype="int16")[0])
    write(audio / "2/own.wav", noise(999))
    names = {"1/3.flac": 8300, "2/link.flac": 8000, "2/copy.flac": 8100, "2/recoded.wav": 8200, "2/own.wav": 8000}
    write_list(tmp_path / "valid.tsv", audio, [(name, size, "A |") for name, size in names.items()])
    report = check(clean, tmp_path / "valid.tsv", fails=True)
    assert found_in(report, 0) == {}
    assert found_in(report, 1) == {line: {"shared"} for line in (2, 3, 4, 5)}
    told = [offender["detail"] for offender in report["lists"][1]["findings"][0]["first"]]
    assert [detail.partition(str(tmp_path))[2] for detail in told] == [f"/clean.tsv:{line}" for line in (5, 2, 3, 4)]
    assert report["folders_in_both"][0]["folders"] == 1
    assert report["together"]["utterances"] == 13
    check(clean, tmp_path / "valid.tsv", "--fix", tmp_path / "clean_valid.tsv", fails=True)
    assert [clip.path.name for clip in clips(tmp_path / "clean_valid.tsv")] == ["own.wav"]
    check(clean, tmp_path / "clean_valid.tsv")


def test_only_the_first_ten_are_named_and_all_are_counted(tmp_path, capsys):
    write(tmp_path / "audio/0.wav", noise(0))
    rows = [("0.wav", 8000, "")] + [(f"gone{number}.wav", 8000, "") for number in range(150)]
    write_list(tmp_path / "x.tsv", tmp_path / "audio", rows, labels=False)
    report = check(tmp_path / "x.tsv", "--workers", 2, fails=True)
    assert found_in(report) == {line: {"missing"} for line in range(3, 153)}
    assert len(report["lists"][0]["findings"][0]["first"]) == 10
    out = capsys.readouterr().out
    assert [f"x.tsv:{line}: " in out for line in (2, 3, 12, 13)] == [False, True, True, False]
    assert "and 140 more" in out


# ---- Other lists and other audio ------------------------------------------------------------------------------------


def write_json(path, entries):
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")


@pytest.fixture
def manifest(tmp_path):
    """A JSON list of pieces of one recording, silent from its second 2 on, and of other files."""
    wave = noise(0, 4 * RATE)
    wave[2 * RATE :] = 0
    write(tmp_path / "audio/talk.flac", wave)
    write(tmp_path / "audio/tälk.wav", noise(1, 12_345))
    entries = [
        {"audio_filepath": "audio/talk.flac", "offset": 0.5, "duration": 1.0, "text": "a b"},
        {"audio_filepath": "audio/talk.flac", "offset": 2.5, "duration": 1.0, "text": "a"},
        {"audio_filepath": "audio/talk.flac", "offset": 3.5, "duration": 1.0, "text": "a"},
        {"audio_filepath": "audio/tälk.wav", "duration": round(12_345 / RATE, 2), "text": "b"},
        {"audio_filepath": "audio/tälk.wav", "duration": 1.0, "text": "b"},
        {"audio_filepath": "audio/talk.flac", "offset": 0.5, "duration": 1.0, "text": "ab"},
        {"audio_filepath": "audio/gone.wav", "duration": 1.0, "text": ""},
    ]
    (tmp_path / "dict.ltr.txt").write_text("| 9\na 8\nb 7\n")
    write_json(tmp_path / "train.json", entries)
    return tmp_path / "train.json"


def test_pieces_of_recordings_are_checked_and_cleaned_on_their_own(manifest, tmp_path):
    out = tmp_path / "elsewhere/clean.json"
    found = found_in(check(manifest, "--fix", out, fails=True))
    repeats = {5: {"length", "repeated"}, 6: {"repeated"}}  # of the file, and of the piece
    assert found == {2: {"silent"}, 3: {"length"}, **repeats, 7: {"missing", "empty"}}
    before, after = read_manifest(manifest, text=True), read_manifest(out, text=True)
    assert [(after[i].clip, after[i].text) for i in range(len(after))] == [
        (before[i].clip, before[i].text) for i in (0, 3, 5)
    ]
    assert found_in(check(out, "--dictionary", tmp_path / "dict.ltr.txt")) == {3: {"repeated"}}


def test_json_lists_without_text_have_no_labels_and_a_gap_among_texts_is_an_error(manifest):
    entries = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    good = [entries[0], entries[3]]
    write_json(manifest, good)
    assert check(manifest)["lists"][0]["labels"] == str(manifest)
    del good[1]["text"]
    write_json(manifest, good)
    assert "train.json:2" in check(manifest, fails=True)["lists"][0]["labels_fault"]
    del good[0]["text"]
    write_json(manifest, good)
    assert check(manifest)["lists"][0]["labels"] == ""


def test_members_of_shards_are_checked_like_files(tmp_path):
    members = {"good.flac": noise(0), "nan.wav": np.full(8000, np.nan, np.float32), "copy.flac": noise(0)}
    rows = []
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, wave in members.items():
            write(tmp_path / name, wave, **({"subtype": "FLOAT"} if "nan" in name else {}))
            tar.add(tmp_path / name, name)
    with tarfile.open(tmp_path / "0.tar") as tar:
        for member in tar:
            rows.append((f"0.tar:{member.offset_data}:{member.size}:{member.name}", 8000, ""))
    rows.append((f"0.tar:{rows[0][0].split(':')[1]}:0:empty.flac", 8000, ""))
    write_list(tmp_path / "x.tsv", tmp_path, rows, labels=False)
    report = check(tmp_path / "x.tsv", fails=True)
    assert found_in(report) == {3: {"nan"}, 4: {"repeated"}, 5: {"unreadable"}}
    told = {finding["kind"]: finding["first"][0]["detail"] for finding in report["lists"][0]["findings"]}
    assert told["unreadable"] == "zero bytes"


def test_other_rates_and_channels_are_counted_and_measured_as_they_are_read(tmp_path):
    rng = np.random.default_rng(0)
    stereo = rng.uniform(-0.3, 0.3, (22_051, 2))
    write(tmp_path / "stereo.wav", stereo, 44_100)
    write(tmp_path / "cancels.wav", np.stack([stereo[:, 0], -stereo[:, 0]], 1), 44_100, subtype="FLOAT")
    write(tmp_path / "phone.wav", rng.uniform(-0.3, 0.3, 4001), 8000)
    write(tmp_path / "own_rate.wav", rng.uniform(-0.3, 0.3, 4001), 8000)
    samples = -(-22_051 * 160 // 441)
    rows = [("stereo.wav", samples), ("cancels.wav", samples), ("phone.wav", 8002), ("own_rate.wav", 4001)]
    write_list(tmp_path / "x.tsv", tmp_path, [(*row, "") for row in rows], labels=False)
    report = check(tmp_path / "x.tsv", fails=True)
    assert found_in(report) == {3: {"silent"}, 5: {"length"}}
    assert [
        (source["audio"], source["is_converted"], source["utterances"]) for source in report["together"]["sources"]
    ] == [
        ("8 kHz mono", True, 2),
        ("44.1 kHz stereo", True, 1),
        ("44.1 kHz stereo", True, 1),
    ]


# ---- Single measures ------------------------------------------------------------------------------------------------


def test_clipped_samples_are_those_in_flat_runs_at_full_scale():
    rng = np.random.default_rng(0)
    for _ in range(200):
        wave = rng.choice(
            np.array([1, 0.99, 0.97, -1, -0.985, 0], np.float32), int(rng.integers(1, 60)), p=[0.5] + [0.1] * 5
        )
        runs = [list(group) for _, group in itertools.groupby(wave.tolist())]
        expected = sum(len(run) for run in runs if abs(run[0]) >= 0.98 and len(run) >= 3)
        assert list_checks.clipped_samples(wave) == expected


def test_clipping_is_told_from_loudness():
    time_S = np.arange(16000) / RATE
    sine = np.sin(2 * np.pi * 200 * time_S)
    for wave, share in ((sine, 0.0), (3 * sine, 0.0), (np.clip(2 * sine, -1, 1), 2 / 3)):
        level = list_checks.measure([wave.astype(np.float32)])
        assert level.clipped == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("offset", [0, 8000])
@pytest.mark.parametrize(("steps", "silent"), [(0, True), (3, True), (4, False), (300, False)])
def test_silence_is_what_moves_by_less_than_80_db(tmp_path, offset, steps, silent):
    """Steps of 16 bits: 3 / 32768 is -80.8 dB of full scale, 4 / 32768 is -78.3 dB."""
    wave = (np.random.default_rng(0).integers(-steps, steps + 1, 4000) + offset).astype(np.int16)
    write(tmp_path / "x.wav", wave)
    write_list(tmp_path / "x.tsv", tmp_path, [("x.wav", 4000, "")], labels=False)
    assert (20 * np.log10(max(np.ptp(wave) / 2 / 32768, 1e-9)) < -80) == silent
    assert found_in(check(tmp_path / "x.tsv", fails=silent)) == ({2: {"silent"}} if silent else {})


def test_long_recordings_are_measured_in_blocks_like_short_ones(tmp_path, monkeypatch):
    write(tmp_path / "x.flac", noise(5, 10_000, peak=1))
    wave = read_audio(tmp_path / "x.flac", sample_rate=RATE)
    expected = list_checks.measure([wave])
    assert (expected.low, expected.high) == (wave.min(), wave.max())
    clip = list_checks.Clip(tmp_path / "x.flac")
    monkeypatch.setattr(list_checks, "BLOCK", 999)
    blocks = list(list_checks._blocks(list_checks.read_info(clip), clip))
    assert [len(block) for block in blocks] == [999] * 10 + [10]
    assert list_checks.measure(blocks) == expected


def test_frames_are_those_of_the_model():
    lengths = np.arange(400, 5000)
    assert [Settings().num_frames(n) for n in lengths.tolist()] == num_frames(lengths, STANDARD).tolist()


def can_align(labels, frames):
    """Whether some path of blanks and labels becomes the labels: repeats fall together, then blanks fall out."""
    return any(
        [symbol for symbol, _ in itertools.groupby(path) if symbol] == labels
        for path in itertools.product(["", *sorted(set(labels))], repeat=frames)
    )


def test_infeasible_targets_are_those_without_any_path():
    checker = list_checks.Checker(None, Settings())
    for length in range(1, 5):
        for labels in itertools.product("AB", repeat=length):
            for frames in range(1, 8):
                num_samples = 400 + 320 * (frames - 1)
                found = dict(checker._faults_of_labels(list(labels), num_samples, None))
                assert ("infeasible" in found) == (not can_align(list(labels), frames)), (labels, frames)


@pytest.mark.parametrize(
    ("limit", "seconds", "dropped"),
    [
        (Limit("min_duration", 8), 7.999, True),
        (Limit("min_duration", 8), 8.0, False),
        (Limit("max_duration", 16.7), 16.7, False),
        (Limit("max_duration", 16.7), 16.7001, True),
        (Limit("min_sample_size", 32000), 1.9999, True),
        (Limit("min_sample_size", 32000), 2.0, False),
    ],
)
def test_bounds_are_kept(limit, seconds, dropped):
    num_samples = np.array([round(seconds * RATE)])
    assert limit.effect(num_samples, RATE) == ((1, num_samples[0]) if dropped else (0, 0))


def test_a_crop_loses_what_is_beyond_it():
    assert Limit("max_sample_size", 100).effect(np.array([99, 100, 101, 250]), RATE) == (2, 151)


def test_given_limits_take_the_place_of_the_typical_ones(clean):
    typical = check(clean)["lists"][0]["limits"]
    assert [limit["value"] for limit in typical] == [1, 2, 15.6, 20, 30]
    given = check(clean, "--min_duration", "0.52", "--max_sample_size", "8500", "8600")["lists"][0]["limits"]
    assert [(limit["limit"], limit["utterances"]) for limit in given] == [
        ("min_duration", 4),  # 8000 to 8300 samples of 16 kHz are below 8320
        ("max_sample_size", 2),
        ("max_sample_size", 1),
    ]
    assert given[1]["hours"] == pytest.approx((100 + 200) / RATE / 3600)


@pytest.mark.parametrize("longest", [0.2, 15, 35, 20_000])
def test_a_histogram_counts_every_utterance_once_in_few_bins(longest):
    seconds = np.append(np.random.default_rng(0).uniform(0, longest, 5000), longest)
    edges = list_report.bin_edges(seconds)
    content = list_report.summary(seconds, edges, [], 1)  # at 1 Hz samples are seconds
    assert 4 <= len(edges) - 1 <= list_report.MOST_BINS + 1
    assert (np.diff(edges) > 0).all()
    assert sum(content["histogram"]["utterances"]) == len(seconds)
    assert sum(content["histogram"]["hours"]) == pytest.approx(content["hours"])


def test_the_picture_is_a_png(clean, tmp_path):
    check(clean, "--png", tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG\r\n")


# ---- As a program ---------------------------------------------------------------------------------------------------


def test_the_program_says_why_in_one_line_and_ends_with_status_1(faulty, clean):
    for tsv, status in ((faulty[0], 1), (clean, 0)):
        run = subprocess.run([sys.executable, PROGRAM, tsv], capture_output=True, text=True, timeout=60)
        assert run.returncode == status
        assert len(run.stderr.splitlines()) == status
        assert "would stop or spoil a run" in (run.stderr if status else run.stdout)


def children(pid):
    """Processes that a process has started and that still run."""
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interruption_ends_all_processes_and_writes_nothing(tmp_path, number):
    write(tmp_path / "x.flac", noise(0, 400 * RATE))  # the tasks that are waiting take longer than the test may
    write_list(tmp_path / "x.tsv", tmp_path, [("x.flac", 400 * RATE, "")] * 5000, labels=False)
    outputs = ["--fix", tmp_path / "fixed.tsv", "--json", tmp_path / "x.json"]
    command = [sys.executable, PROGRAM, tmp_path / "x.tsv", "--workers", "2", *outputs]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # a suite in the background ignores it
    )
    while process.poll() is None and len(started := children(process.pid)) < 2:
        time.sleep(0.02)
    time.sleep(0.3)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=20)  # of the processes that were started, too: they hold the pipes
    expected = (130, "", "interrupted\n") if number == signal.SIGINT else (-number, "", "")
    assert (process.returncode, out, err) == expected
    assert not (tmp_path / "fixed.tsv").exists()
    assert not (tmp_path / "x.json").exists()
    assert len(started) == 2


def test_a_process_that_dies_is_told_in_one_line(clean, monkeypatch):
    monkeypatch.setattr(list_checks.Checker, "check", lambda *_: os._exit(9))
    with pytest.raises(DataError, match="--workers 2: a process was ended while it checked clean"):
        check_data.main([str(clean), "--workers", "2"])


def test_odd_files_are_told_apart(shared, tmp_path):
    odd = shared("speech/odd")
    expected = {
        "zero_bytes.wav": "unreadable",
        "text_named.flac": "unreadable",
        "html_named.wav": "unreadable",
        "header_bad.wav": "unreadable",
        "truncated.wav": "damaged",
        "truncated.flac": "damaged",
        "corrupt_middle.flac": "damaged",
        "float32_some_nan.wav": "nan",
        "float32_all_nan.wav": "nan",
        "float32_some_inf.wav": "nan",
        "clip_1_sample.flac": "short",
        "clip_399_samples.flac": "short",
        "silence_5s.flac": "silent",
        "constant.flac": "silent",
        "clipped.flac": "clipped",
        "header_awful.wav": "unreadable",
        "stereo_44100_24bit.flac": None,
        "real_48000.mp3": None,
        "encoded_16000.ogg": None,
        "encoded_48000.opus": None,
        "mono_8000_ulaw.wav": None,
        "six_channels.wav": None,
        "clip_400_samples.flac": None,
        "very_quiet.flac": None,
        "dc_offset.flac": None,
        "float32_above_one.wav": None,
        "room_noise_4s.wav": None,
        "silence_then_speech.flac": None,
    }
    rows = []
    for name in expected:
        try:
            info = soundfile.info(odd / name)
            samples = -(-info.frames * RATE // info.samplerate)
        except soundfile.LibsndfileError:
            samples = 77040
        rows.append((name, 77040 if name == "truncated.wav" else samples, ""))
    write_list(tmp_path / "odd.tsv", odd, rows, labels=False)
    found = found_in(check(tmp_path / "odd.tsv", fails=True))
    assert {name: found.get(line) for line, name in enumerate(expected, start=2)} == {
        name: kind and {kind} for name, kind in expected.items()
    }
