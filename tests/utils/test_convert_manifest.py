"""Lists to JSON manifests and back: nothing is lost, and what the other format cannot say is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT

from common.data.manifest import read_manifest
from common.errors import ConfigError, DataError
from utils import convert_manifest


def convert(*arguments):
    convert_manifest.main([str(argument) for argument in arguments])


def files_of(manifest):
    """What a manifest says apart from ids and lines: real paths, spans, lengths, texts."""
    found = []
    for i in range(len(manifest)):
        clip = manifest[i].clip
        found.append((os.path.realpath(clip.path), clip.span, int(manifest.num_samples[i]), manifest[i].text))
    return found


def write_json(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def random_list(rng, folder, root):
    """A list with labels: (tsv, ltr, paths, samples, words)."""
    names = ["a", "é b", "日本/x.y", "..", "deep/er/.hid", "s.tar:512:99:k/1", "x:y"]
    paths = [f"{rng.choice(names)}/{i}.flac" for i in range(int(rng.integers(1, 20)))]
    samples = [int(10 ** rng.uniform(0, 8)) for _ in paths]
    words = [" ".join(rng.choice(["HI", "ÉT'S", "東京", "😀", '"\\'], rng.integers(0, 4))) for _ in paths]
    folder.mkdir(parents=True, exist_ok=True)
    tsv, ltr = folder / "in.tsv", folder / "in.ltr"
    lines = [str(root), *(f"{path}\t{count}" for path, count in zip(paths, samples, strict=True))]
    tsv.write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = [" ".join(" ".join([*word, "|"]) for word in text.split()) for text in words]
    ltr.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tsv, ltr, paths, samples, words


@pytest.mark.parametrize("rate", [16000, 22050])
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("root", [".", "../audio", "absolute"])
@pytest.mark.parametrize("seed", range(3))
def test_a_list_comes_back_from_a_manifest_as_it_was(tmp_path, seed, root, elsewhere, rate):
    (tmp_path / "audio").mkdir()
    root = tmp_path / "audio" if root == "absolute" else root
    tsv, ltr, paths, samples, words = random_list(np.random.default_rng(seed), tmp_path / "lists", root)
    middle = (tmp_path / "other" / "place" if elsewhere else tmp_path / "lists") / "m.jsonl"
    back = tmp_path / "back" / "b.tsv" if elsewhere else tmp_path / "lists" / "b.tsv"
    convert(tsv, middle, "--sample_rate", rate)
    original = files_of(read_manifest(tsv, ltr))
    assert files_of(read_manifest(middle, sample_rate=rate, text=True)) == original
    entries = [json.loads(line) for line in middle.read_text(encoding="utf-8").splitlines()]
    assert [entry["text"] for entry in entries] == words
    assert [entry["duration"] for entry in entries] == [count / rate for count in samples]
    assert {Path(entry["audio_filepath"]).is_absolute() for entry in entries} == {root not in (".", "../audio")}
    convert(middle, back, "--sample-rate", rate)
    lines = back.read_text(encoding="utf-8").splitlines()
    (back.parent / lines[0]).mkdir(parents=True, exist_ok=True)  # the common folder, where it has to be for reading
    assert files_of(read_manifest(back, back.with_suffix(".ltr"))) == original
    assert back.with_suffix(".ltr").read_bytes() == ltr.read_bytes()
    assert back.with_suffix(".wrd").read_text(encoding="utf-8").split("\n") == [*words, ""]
    assert Path(lines[0]).is_absolute() == (root not in (".", "../audio"))


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_manifest_comes_back_from_a_list_as_it_was(tmp_path, seed, absolute):
    rng = np.random.default_rng(seed)
    prefix = f"{tmp_path}/" * absolute
    entries = [
        {"audio_filepath": f"{prefix}{rng.choice(['x', 'x/é', 'x/b c', '../up'])}/{i}.wav", "duration": int(n) / 16000}
        for i, n in enumerate(rng.integers(1, 10**7, 15))
    ]
    for entry in entries if seed % 2 else []:
        entry["text"] = " ".join(rng.choice(["one", "zwei", "три"], rng.integers(0, 4)))
    first, last = write_json(tmp_path / "in" / "a.json", entries), tmp_path / "in" / "c.json"
    convert(first, tmp_path / "in" / "b.tsv")
    root = (tmp_path / "in" / "b.tsv").read_text(encoding="utf-8").split("\n")[0]
    (tmp_path / "in" / root).mkdir(parents=True, exist_ok=True)
    convert(tmp_path / "in" / "b.tsv", last)
    assert [json.loads(line) for line in last.read_text(encoding="utf-8").splitlines()] == entries
    assert (tmp_path / "in" / "b.ltr").exists() == bool(seed % 2)


def test_the_root_is_the_common_folder_or_the_one_named(tmp_path):
    entries = [{"audio_filepath": f"{tmp_path}/a/{name}.wav", "duration": 1} for name in ("b/1", "./b//c/2", "bc/3")]
    path = write_json(tmp_path / "m.json", entries)
    convert(path, tmp_path / "o.tsv")
    below = ["b/1.wav\t16000", "b/c/2.wav\t16000", "bc/3.wav\t16000"]
    assert (tmp_path / "o.tsv").read_text().splitlines() == [f"{tmp_path}/a", *below]
    convert(path, tmp_path / "o.tsv", "--root", tmp_path)
    assert (tmp_path / "o.tsv").read_text().splitlines() == [str(tmp_path), *(f"a/{line}" for line in below)]
    with pytest.raises(DataError, match=r"m.json:3: .*bc/3.wav' is not below --root .*/a/b; name a folder above all"):
        convert(path, tmp_path / "o.tsv", "--root", tmp_path / "a/b")


def test_words_of_the_plain_file_where_asked(tmp_path):
    (tmp_path / "l.tsv").write_text(".\na.wav\t8\nb.wav\t8\n")
    (tmp_path / "l.wrd").write_text("Mr.  Ünal \n\n", encoding="utf-8")
    convert(tmp_path / "l.tsv", tmp_path / "o.json")
    assert "text" not in json.loads((tmp_path / "o.json").read_text().splitlines()[0])
    convert(tmp_path / "l.tsv", tmp_path / "o.json", "--labels", "wrd")
    texts = [json.loads(line)["text"] for line in (tmp_path / "o.json").read_text(encoding="utf-8").splitlines()]
    assert texts == ["Mr. Ünal", ""]
    with pytest.raises(DataError, match="l.ltr: no such file"):
        convert(tmp_path / "l.tsv", tmp_path / "o.json", "--labels", "ltr")


@pytest.mark.parametrize(
    ("suffix", "line", "message"),
    [
        ("ltr", "AH0 K |", r"l.ltr:2: 'AH0 K \|' is not spelt as characters .* keep the list, or .* --labels wrd"),
        ("ltr", "A B", r"l.ltr:2: 'A B' is not spelt"),
        ("ltr", "A | | B |", r"l.ltr:2: 'A \| \| B \|' is not spelt"),
        ("wrd", "A|B", r"l.wrd:2: 'A\|B' has a '\|', which marks the end of a word"),
    ],
)
def test_labels_that_text_cannot_say_are_refused_and_nothing_is_written(tmp_path, suffix, line, message):
    (tmp_path / "l.tsv").write_text(".\na.wav\t8\nb.wav\t8\n")
    (tmp_path / f"l.{suffix}").write_text(f"A |\n{line}\n" if suffix == "ltr" else f"A\n{line}\n")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=message):
        convert(tmp_path / "l.tsv", tmp_path / "o.json", "--labels", suffix)
    assert sorted(tmp_path.iterdir()) == before


GOOD = {"audio_filepath": "a.wav", "duration": 1.0}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (GOOD | {"offset": 0.5}, "m.json:2: has an offset, and a list can only name whole files; keep the manifest"),
        (GOOD | {"text": "x"}, "m.json:1: no text, though others have one; add it, or remove all texts"),
        (GOOD | {"audio_filepath": "a\tb.wav"}, "m.json:2: .* has a tab or a line end in its name; rename the file"),
        (GOOD | {"audio_filepath": "a\nb.wav"}, "m.json:2: .* has a tab or a line end in its name; rename the file"),
        (GOOD | {"duration": -1}, "m.json:2: duration -1 is not"),
    ],
)
def test_entries_that_a_list_cannot_name_are_refused_and_nothing_is_written(tmp_path, entry, message):
    path = write_json(tmp_path / "m.json", [GOOD, entry])
    with pytest.raises(DataError, match=message):
        convert(path, tmp_path / "o.tsv")
    assert [file.name for file in tmp_path.iterdir()] == ["m.json"]


def test_a_root_that_no_list_can_hold_is_refused(tmp_path):
    path = write_json(tmp_path / "m.json", [{"audio_filepath": "/a /x.wav", "duration": 1}])
    with pytest.raises(DataError, match="m.json: the root folder '/a ' has a tab, a line end or outer spaces"):
        convert(path, tmp_path / "o.tsv")


def test_an_offset_of_zero_is_a_whole_file(tmp_path, capsys):
    path = write_json(tmp_path / "m.json", [GOOD | {"offset": 0.0, "speaker": "s", "lang": "en"}])
    convert(path, tmp_path / "o.tsv")
    assert (tmp_path / "o.tsv").read_text() == ".\na.wav\t16000\n"
    assert "speakers are not in it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m.json", "m.json"], "m.json: the same kind as m.json; name one .tsv and one .json file"),
        (["m.json", "n.jsonl"], "the same kind"),
        (["l.tsv", "l.tsv"], "the same kind"),
        (["l.tsv", "o.txt"], "o.txt: the name of a list ends in .tsv, that of a manifest in .json or .jsonl"),
        (["l", "o.json"], "l: the name of a list"),
        (["m.json", "o.tsv", "--labels", "ltr"], "--labels: has no effect from .json to .tsv"),
        (["l.tsv", "o.json", "--root", "/"], "--root: has no effect from .tsv to .json"),
        (["l.tsv", "o.json", "--read_lengths"], "--read_lengths: has no effect from .tsv to .json"),
        (["l.tsv", "o.json", "--sample_rate", "0"], "--sample_rate 0: a rate is at least 1 Hz"),
        (["l.tsv", "o.json", "--labels", "phn"], "--labels"),
    ],
)
def test_directions_and_flags_that_make_no_sense(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    contents = {"m.json": json.dumps(GOOD) + "\n", "l.tsv": ".\na.wav\t8\n"}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        convert(*arguments)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == contents


def test_lengths_of_the_headers_where_durations_are_rounded(tmp_path):
    (tmp_path / "x").mkdir()
    lengths = {"a": (16000, 12345), "b": (8000, 4001), "c": (44100, 100_003)}
    entries = []
    for name, (rate, frames) in lengths.items():
        soundfile.write(tmp_path / f"x/{name}.wav", np.zeros(frames), rate)
        entries.append({"audio_filepath": f"x/{name}.wav", "duration": round(frames / rate, 2)})
    path = write_json(tmp_path / "m.json", entries)
    convert(path, tmp_path / "o.tsv", "--read_lengths")
    exact = [f"{name}.wav\t{-(-frames * 16000 // rate)}" for name, (rate, frames) in lengths.items()]
    assert (tmp_path / "o.tsv").read_text().splitlines() == ["x", *exact]
    convert(path, tmp_path / "o.tsv")
    assert (tmp_path / "o.tsv").read_text().splitlines() != ["x", *exact]
    for part in ({}, {"offset": 0}):
        write_json(path, [*entries[:2], entries[2] | {"duration": 0.5} | part])
        with pytest.raises(
            DataError, match=r"m.json:3: has 36283 samples at 16000 Hz, but its duration is that of 8000"
        ):
            convert(path, tmp_path / "new.tsv", "--read_lengths")
    write_json(path, [GOOD])
    with pytest.raises(DataError, match=r"m.json:1: .*a.wav"):
        convert(path, tmp_path / "new.tsv", "--read_lengths")
    assert not (tmp_path / "new.tsv").exists()


def test_it_runs_as_a_program(tmp_path):
    (tmp_path / "l.tsv").write_text(".\na.wav\t8000\n")
    command = [sys.executable, str(ROOT / "utils" / "convert_manifest.py"), "l.tsv", "o.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "o.json: 1 entries, 0.00 hours, without text\n"
    assert json.loads((tmp_path / "o.json").read_text()) == {"audio_filepath": "a.wav", "duration": 0.5}
