"""Shards: every clip once and unchanged, to and from the webdataset library, and resumed where it broke off."""

# SPDX-License-Identifier: Apache-2.0
import io
import json
import tarfile

import numpy as np
import pytest
import soundfile

from common.data.audio import Clip, read_audio
from common.data.manifest import read_manifest
from common.data.shards import split_name
from common.errors import ConfigError, DataError
from utils import make_shards

RATE = 16000
FORMATS = ("flac", "wav", "ogg")


def wave(number, length):
    return 0.3 * np.sin(np.arange(length) * (0.01 + 0.001 * number))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """37 clips of three formats in two folders, with texts."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "speaker.1").mkdir()
    (folder / "x").mkdir()
    lines, letters = ["."], []
    for number in range(37):
        length = 500 + 7 * (number * 11 % 37)
        name = f"{('x', 'speaker.1')[number % 2]}/take.{number}.{FORMATS[number % 3]}"
        soundfile.write(folder / name, wave(number, length), RATE, format=FORMATS[number % 3].upper())
        lines.append(f"{name}\t{length}")
        letters.append(f"É {'A ' * (number % 4)}| {'B ' * number}|" if number else "")
    (folder / "train.tsv").write_text("\n".join(lines) + "\n")
    (folder / "train.ltr").write_text("\n".join(letters) + "\n", encoding="utf-8")
    return folder


def make(corpus, out, *flags, name="train.tsv"):
    make_shards.main([str(corpus / name), str(out), "--workers", "1", *map(str, flags)])
    return out


def clips(out, name="train.tsv"):
    """(bytes, samples, text) of every clip that a list of shards names."""
    labels = (out / name).with_suffix(".ltr")
    manifest = read_manifest(out / name, labels if labels.exists() else None)
    found = []
    for index in range(len(manifest)):
        utterance = manifest[index]
        first, size = utterance.clip.span
        content = utterance.clip.path.read_bytes()[first : first + size]
        found.append((content, utterance.num_samples, utterance.text))
    return found


def originals(corpus):
    manifest = read_manifest(corpus / "train.tsv", corpus / "train.ltr")
    utterances = [manifest[index] for index in range(len(manifest))]
    return [(u.clip.path.read_bytes(), u.num_samples, " ".join(u.text.split())) for u in utterances]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_37_clips_in_4_shards_are_37_clips_with_their_bytes_and_texts(corpus, tmp_path):
    make(corpus, tmp_path, "--num_shards", 4)
    assert clips(tmp_path) == originals(corpus)
    sizes = [len((tmp_path / f"train-{n:06d}.tsv").read_text().splitlines()) - 1 for n in range(4)]
    assert sizes == [10, 9, 9, 9]
    assert sum((clips(tmp_path, f"train-{n:06d}.tsv") for n in range(4)), []) == clips(tmp_path)
    words = (tmp_path / "train.wrd").read_text(encoding="utf-8").split("\n")
    assert words[:3] == ["", "ÉA B", "ÉAA BB"]
    manifest = read_manifest(tmp_path / "train.tsv")
    for index in (0, 1, 36):
        utterance = manifest[index]
        audio = read_audio(utterance.clip, sample_rate=RATE, num_samples=utterance.num_samples)
        assert np.abs(audio - wave(index, len(audio))).max() < 0.05


def test_the_webdataset_library_reads_what_we_write(corpus, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    make(corpus, tmp_path, "--num_shards", 4)
    reader = webdataset.WebDataset(str(tmp_path / "train-{000000..000003}.tar"), shardshuffle=False)
    found = []
    for sample in reader:
        (audio,) = (sample[kind] for kind in FORMATS if kind in sample)
        entry = json.loads(sample["json"])
        assert entry["sample_rate"] == RATE
        assert entry["text"] == sample["txt"].decode()
        found.append((audio, round(entry["duration"] * RATE), sample["txt"].decode(), sample["__key__"]))
    expected = [(audio, length, text) for audio, length, text in originals(corpus)]
    assert [(a, n) for a, n, _, _ in found] == [(a, n) for a, n, _ in expected]
    assert [text.replace(" ", "") for _, _, text, _ in found] == [
        text.replace(" ", "").replace("|", "") for _, _, text in expected
    ]
    assert found[0][3] == "x/take_0"
    assert found[1][3] == "speaker.1/take_1"
    assert len({key for *_, key in found}) == 37


def test_what_the_webdataset_library_writes_is_listed_here(corpus, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    expected = originals(corpus)
    with webdataset.ShardWriter(str(tmp_path / "theirs-%02d.tar"), maxcount=10, verbose=0) as writer:
        for number, (audio, _, letters) in enumerate(expected):
            text = " ".join(letters.replace(" ", "").split("|")).strip()
            writer.write({"__key__": f"k{number:02d}", FORMATS[number % 3]: audio, "json": {"text": text}})
    output = tmp_path / "lists" / "train.tsv"
    make_shards.main(["--index", str(tmp_path / "theirs-{00..03}.tar"), "--output", str(output), "--workers", "2"])
    assert clips(tmp_path / "lists") == expected
    make_shards.main(["--index", str(tmp_path), "--workers", "1"])
    assert sum((clips(tmp_path, f"theirs-{n:02d}.tsv") for n in range(4)), []) == expected
    assert read_manifest(output)[36].id == "k36"


def test_the_same_list_gives_the_same_bytes_and_processes_change_nothing(corpus, tmp_path):
    flags = ["--num_shards", "5", "--shuffle", "--seed", "3", "--sort_by_length"]
    make(corpus, tmp_path / "one", *flags)
    make(corpus, tmp_path / "two", *flags, "--workers", "3")
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert sorted(clips(tmp_path / "one")) == sorted(originals(corpus))
    assert clips(tmp_path / "one") != originals(corpus)
    for number in range(5):
        lengths = [length for _, length, _ in clips(tmp_path / "one", f"train-{number:06d}.tsv")]
        assert lengths == sorted(lengths)
    make(corpus, tmp_path / "other", "--num_shards", 5, "--shuffle", "--seed", 4)
    assert clips(tmp_path / "other") != clips(tmp_path / "one")


def test_an_interrupted_run_goes_on_and_keeps_what_is_complete(corpus, tmp_path, monkeypatch):
    whole = content(make(corpus, tmp_path / "whole", "--shard_size", 10))
    out = tmp_path / "out"
    made = []

    def broken(utterance, sample_rate, members=make_shards._members):
        made.append(utterance.id)
        if len(made) == 25:
            raise OSError(28, "No space left on device", str(out / ".train-000002.tar.partial"))
        return members(utterance, sample_rate)

    with monkeypatch.context() as patch:
        patch.setattr(make_shards, "_members", broken)
        with pytest.raises(DataError, match="No space left"):
            make(corpus, out, "--shard_size", 10)
    assert sorted(path.name for path in out.glob("*.tar")) == ["train-000000.tar", "train-000001.tar"]
    assert not list(out.glob(".*"))
    (out / "train-000001.tsv").unlink()  # as if it had been killed before the list
    before = (out / "train-000000.tar").stat().st_mtime_ns
    make(corpus, out, "--shard_size", 10)
    assert content(out) == whole
    assert (out / "train-000000.tar").stat().st_mtime_ns == before


def test_shards_made_otherwise_are_not_mixed(corpus, tmp_path):
    make(corpus, tmp_path / "out", "--num_shards", 4)
    for flags in (["--num_shards", 5], ["--num_shards", 4, "--shuffle"], ["--num_shards", 4, "--sort_by_length"]):
        with pytest.raises(ConfigError, match=r"train.shards.json: the shards there were made otherwise .*now"):
            make(corpus, tmp_path / "out", *flags)
    make(corpus, tmp_path / "out", "--num_shards", 5, "--name", "other")
    assert len(list((tmp_path / "out").glob("other-*.tar"))) == 5


def test_parts_of_recordings_and_other_rates(tmp_path):
    (tmp_path / "a").mkdir()
    for name, rate in (("a/long.wav", 16000), ("a/fast.wav", 48000)):
        soundfile.write(tmp_path / name, wave(1, rate), rate)
    entries = [
        {"audio_filepath": "a/long.wav", "duration": 1.0, "offset": 0, "text": "ALL OF IT"},
        {"audio_filepath": "a/long.wav", "duration": 0.25, "offset": 0.5, "text": "A PART"},
        {"audio_filepath": "a/fast.wav", "duration": 1.0, "text": "FAST"},
    ]
    (tmp_path / "train.json").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    make(tmp_path, tmp_path / "out", "--num_shards", 1, name="train.json")
    (long, total, text), (part, length, second), (fast, resampled, _) = clips(tmp_path / "out")
    assert long == (tmp_path / "a/long.wav").read_bytes()
    assert fast == (tmp_path / "a/fast.wav").read_bytes()
    assert (total, length, resampled) == (16000, 4000, 16000)
    assert (text.replace(" ", ""), second.replace(" ", "")) == ("ALL|OF|IT|", "A|PART|")
    audio, rate = soundfile.read(io.BytesIO(part))
    assert rate == 16000
    assert np.abs(audio - wave(1, 16000)[8000:12000]).max() < 2 / 2**15


def test_shards_can_be_packed_anew(corpus, tmp_path):
    make(corpus, tmp_path / "one", "--num_shards", 4)
    make(tmp_path / "one", tmp_path / "two", "--num_shards", 2)
    assert clips(tmp_path / "two") == originals(corpus)


def test_keys_are_unique_and_webdataset_keeps_them_whole():
    names = ["a/b.c", "a/b_c", "a/b_c_2", "/x/../y", "y", "x/y", "__m__/a", ".h", "a/b.c"]
    others = make_shards.unique_keys(names)
    keys = [others.get(position, make_shards.key_of(name)) for position, name in enumerate(names)]
    assert len(set(keys)) == len(names)
    assert keys[:2] == ["a/b_c", "a/b_c_2"]
    assert [split_name(f"{key}.flac") for key in keys] == [(key, "flac") for key in keys]  # none is passed over
    iterators = pytest.importorskip("webdataset.tariterators")
    assert [iterators.base_plus_ext(f"{key}.flac") for key in keys] == [(key, "flac") for key in keys]


def test_files_that_are_not_as_listed_are_refused(corpus, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(900), RATE)
    (tmp_path / "train.tsv").write_text(".\na.wav\t800\n")
    with pytest.raises(DataError, match=r"train.tsv:2: .*a.wav.* 900 samples, but 800 are listed; regenerate"):
        make(tmp_path, tmp_path / "out")
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        tar.add(tmp_path / "train.tsv", "x.wav")
    with pytest.raises(DataError, match=r"bad.tar: x.wav"):
        make_shards.main(["--index", str(tmp_path / "bad.tar")])
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        tar.add(tmp_path / "train.tsv", "x.tsv")
    with pytest.raises(DataError, match=r"bad.tar: has no audio"):
        make_shards.main(["--index", str(tmp_path / "bad.tar")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a", "b", "--index", "--num_shards", "3"], "--num_shards: has no effect with --index"),
        (["a", "b", "--output", "x.tsv"], "--output: only with --index"),
        (["a"], "two paths, LIST and OUT_DIR"),
        (["a", "b", "--num_shards", "3", "--shard_size", "3"], "--num_shards: cannot be used together"),
        (["a", "b", "--num_shards", "0"], "num_shards"),
        (["a", "b", "--seed", "1"], "--seed 1: has no effect without --shuffle"),
        (["a", "--index", "--output", "x.txt"], "ends in .tsv"),
    ],
)
def test_flags_without_effect_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        make_shards.main(flags)


def test_the_list_is_not_overwritten_and_no_shard_is_empty(corpus, tmp_path):
    with pytest.raises(ConfigError, match="is the list to read"):
        make(corpus, corpus)
    with pytest.raises(ConfigError, match="--num_shards 38: there are only 37 clips"):
        make(corpus, tmp_path, "--num_shards", 38)


def test_clips_are_named_with_their_bytes(corpus, tmp_path):
    make(corpus, tmp_path, "--num_shards", 4)
    utterance = read_manifest(tmp_path / "train.tsv")[5]
    assert utterance.id == "speaker.1/take_5"
    assert utterance.clip == Clip(tmp_path / "train-000000.tar", utterance.clip.span, member="speaker.1/take_5.ogg")


def test_clips_of_others_that_cannot_be_read_are_all_named_or_left_out(corpus, tmp_path, capsys):
    good = io.BytesIO()
    soundfile.write(good, np.zeros(1600), 16000, format="WAV")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content in (("a.wav", b"no audio"), ("b.wav", good.getvalue()), ("c.flac", b"")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    index = ["--index", str(tmp_path / "s.tar"), "--output", str(tmp_path / "l.tsv")]
    with pytest.raises(DataError, match=r"2 clips cannot be listed; .*--skip_bad\n.*a.wav.*\n.*c.flac"):
        make_shards.main(index)
    assert not (tmp_path / "l.tsv").exists()
    make_shards.main([*index, "--skip_bad"])
    assert [utterance.id for utterance in map(read_manifest(tmp_path / "l.tsv").__getitem__, range(1))] == ["b"]
    assert len(read_manifest(tmp_path / "l.tsv")) == 1
