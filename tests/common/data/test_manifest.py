"""Lists and labels: what is read, and what is refused with file and line."""

# SPDX-License-Identifier: Apache-2.0
import json
import logging
import mmap
import multiprocessing
import pickle
import re
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from common.data import manifest_files
from common.data.audio import Clip
from common.data.manifest import Utterance, find_list, join_manifests, read_manifest
from common.errors import DataError


def write(folder, lines, name="train.tsv", root=".", end="\n"):
    path = folder / name
    path.write_bytes(end.join([root, *lines, ""]).encode())
    return path


def write_json(folder, entries, name="train.json", end="\n"):
    path = folder / name
    path.write_bytes("".join(json.dumps(entry, ensure_ascii=False) + end for entry in entries).encode())
    return path


def everything(manifest):
    """All that a manifest says, as Python objects."""
    utterances = [manifest[i] for i in range(len(manifest))]
    assert [utterance.num_samples for utterance in utterances] == manifest.num_samples.tolist()
    assert [utterance.text for utterance in utterances] == [manifest.text(i) for i in range(len(manifest))]
    assert [utterance.where for utterance in utterances] == [manifest.where(i) for i in range(len(manifest))]
    return utterances


def test_lines_become_utterances(tmp_path):
    tsv = write(tmp_path, ["a/b c.flac\t400", "日本/é.two.dots.wav\t16000", "no_extension\t7"])
    (tmp_path / "train.ltr").write_text("A N D | A |\n\nÉ |\n", encoding="utf-8")
    manifest = read_manifest(tsv, tmp_path / "train.ltr")
    assert [manifest[i].id for i in range(3)] == ["a/b c", "日本/é.two.dots", "no_extension"]
    assert manifest[1].clip.path == tmp_path / "日本/é.two.dots.wav"
    assert manifest.num_samples.tolist() == [400, 16000, 7] == [manifest[i].num_samples for i in range(3)]
    assert [manifest[i].text for i in range(3)] == ["A N D | A |", "", "É |"]
    assert manifest[2].where == f"{tsv}:4"
    assert manifest.text_where(2) == f"{tmp_path / 'train.ltr'}:3"
    assert (manifest.name, manifest.has_text, len(manifest)) == ("train", True, 3)
    assert manifest.hours(100) == pytest.approx(16407 / 100 / 3600)


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path):
    lines = ["a.wav\t1", "b.wav\t22", "c.wav\t333"]
    plain = read_manifest(write(tmp_path, lines, "plain.tsv"))
    windows = read_manifest(write(tmp_path, lines, "windows.tsv", root="\ufeff.", end="\r\n"))
    no_end = tmp_path / "no_end.tsv"
    no_end.write_text(".\n" + "\n".join(lines))
    for other in (windows, read_manifest(no_end)):
        assert [other[i].clip.path for i in range(3)] == [plain[i].clip.path for i in range(3)]
        assert other.num_samples.tolist() == [1, 22, 333]


def test_a_relative_root_is_relative_to_the_list_and_an_absolute_one_is_kept(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "audio").mkdir()
    relative = read_manifest(write(tmp_path / "lists", ["a.wav\t9"], root="../audio"))
    absolute = read_manifest(write(tmp_path / "lists", ["a.wav\t9"], root=str(tmp_path / "audio")))
    assert relative[0].clip.path.resolve() == absolute[0].clip.path == tmp_path / "audio" / "a.wav"


def test_selected_utterances_keep_their_lines_and_labels(tmp_path):
    tsv = write(tmp_path, [f"{i}.wav\t{i + 1}" for i in range(10)])
    (tmp_path / "train.ltr").write_text("".join(f"L{i}\n" for i in range(10)))
    chosen = read_manifest(tsv, tmp_path / "train.ltr").select([7, 2]).select(np.array([False, True]))
    assert (len(chosen), chosen[0].id, chosen[0].text, chosen[0].where) == (1, "2", "L2", f"{tsv}:4")
    assert chosen.num_samples.tolist() == [3]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "empty"),
        (".\n", ":2: the list has a root folder and no utterances"),
        ("a.wav\t5\n", ":1: the first line must be the root folder"),
        ("nowhere\na.wav\t5\n", ":1: the root folder"),
        (".\na.wav\t5\nb.wav 6\n", ":3: expected PATH<TAB>SAMPLES"),
        (".\na.wav\t5\nb.wav\t-6\n", ":3:"),
        (".\na.wav\t0\n", ":2:"),
        (".\na.wav\t5.0\n", ":2:"),
        (".\na.wav\t\n", ":2:"),
        (".\na.wav\t5\t6\n", ":2:"),
        (".\n\t5\n", ":2:"),
        (".\na.wav\t5\n\nb.wav\t5\n", ":3:"),
        (".\na.wav\t99999999999999999999999\n", ":2:"),
        (".\na\0.wav\t5\n", ":2: not UTF-8"),
        (b".\na.wav\t5\n\xff\xfe.wav\t5\n", ":3: not UTF-8"),
        (".\n" + "x" * 5000 + "\n", ":2:"),
    ],
)
def test_a_malformed_list_is_refused_with_file_and_line(tmp_path, content, expected):
    tsv = tmp_path / "bad.tsv"
    tsv.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read_manifest(tsv)
    message = str(caught.value)
    assert message.startswith(str(tsv))
    assert expected in message
    assert ";" in message
    assert len(message) < 500
    assert "\n" not in message


def test_a_missing_list_names_the_program_that_makes_it(tmp_path):
    with pytest.raises(DataError, match=r"none.tsv: no such file; .*utils/generate_filelist.py"):
        read_manifest(tmp_path / "none.tsv")
    with pytest.raises(DataError, match="cannot be read"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("chunk", [1, 10**6])
@pytest.mark.parametrize(("labels", "found"), [("A\n", 1), ("A\nB\nC\n", 3), ("A\n\n\nD\n\n", 4), ("", 0), ("\n", 1)])
def test_labels_that_do_not_match_in_number_are_refused(tmp_path, monkeypatch, labels, found, chunk):
    monkeypatch.setattr(manifest_files, "CHUNK", chunk)
    tsv = write(tmp_path, ["a.wav\t5", "b.wav\t5"])
    (tmp_path / "train.ltr").write_text(labels)
    with pytest.raises(DataError, match=rf"train.ltr: {found} lines of labels for 2 utterances in .*train.tsv;"):
        read_manifest(tsv, tmp_path / "train.ltr")


@pytest.mark.parametrize("chunk", [1, 10**6])
@pytest.mark.parametrize("labels", ["A\n\n", "\n\n", "A\nB", "A\nB\n\n\n"])
def test_labels_may_be_empty_and_surplus_empty_lines_do_not_count(tmp_path, monkeypatch, labels, chunk):
    monkeypatch.setattr(manifest_files, "CHUNK", chunk)
    tsv = write(tmp_path, ["a.wav\t5", "b.wav\t5"])
    (tmp_path / "train.ltr").write_text(labels)
    manifest = read_manifest(tsv, tmp_path / "train.ltr")
    assert [manifest[i].text for i in range(2)] == labels.split("\n")[:2]


@pytest.mark.parametrize("seed", range(30))
def test_random_lists_agree_with_plain_python(tmp_path, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(manifest_files, "CHUNK", int(rng.integers(1, 200)))
    letters = np.array(list("ab c.é日😀\u2028\x85\r/-"))
    number = int(rng.integers(1, 60))
    paths = ["x" + "".join(rng.choice(letters, rng.integers(0, 12))) + "y.wav" for _ in range(number)]
    samples = [int(10.0 ** rng.uniform(0, 14.9)) for _ in range(number)]
    labels = ["" if rng.random() < 0.4 else "".join(rng.choice(letters[letters != "\r"], 5)) for _ in range(number)]
    bom, end, last = ("\ufeff" * int(rng.integers(2)), ["\n", "\r\n"][rng.integers(2)], int(rng.integers(3)))
    tsv, ltr = tmp_path / "a.tsv", tmp_path / "a.ltr"
    lines = [bom + ".", *(f"{path}\t{count}" for path, count in zip(paths, samples, strict=True))]
    tsv.write_bytes((end.join(lines) + end * last).encode())
    ltr.write_bytes((bom + end.join(labels) + end * (1 + last)).encode())
    assert everything(read_manifest(tsv, ltr)) == [
        Utterance(path[: path.rindex(".")], Clip(tmp_path / path), count, text, f"{tsv}:{row + 2}")
        for row, (path, count, text) in enumerate(zip(paths, samples, labels, strict=True))
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [(b"b.wav 7", ":90: expected PATH<TAB>SAMPLES"), (b"", ":90: expected"), (b"\xff\t5", ":90: not UTF-8")],
)
@pytest.mark.parametrize("chunk", [1, 50, 300, 10**6])
def test_a_fault_far_into_a_list_is_named_by_its_line(tmp_path, monkeypatch, chunk, line, expected):
    monkeypatch.setattr(manifest_files, "CHUNK", chunk)
    tsv = tmp_path / "a.tsv"
    lines = [b".", *(b"a%d.wav\t%d" % (i, i) for i in range(1, 200))]
    lines[89] = line
    tsv.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=re.escape(f"{tsv}{expected}")):
        read_manifest(tsv)


def test_lengths_take_four_bytes_where_they_fit_and_are_exact_where_not(tmp_path):
    short = read_manifest(write(tmp_path, ["a.wav\t5", f"b.wav\t{2**31 - 1}"]))
    long = read_manifest(write(tmp_path, ["a.wav\t5", f"b.wav\t{2**31}"]))
    assert (short.num_samples.dtype, long.num_samples.dtype) == (np.int32, np.int64)
    assert (short.num_samples[1], long.num_samples[1]) == (2**31 - 1, 2**31)
    assert join_manifests([short, short]).hours(1) == pytest.approx(2 * (2**31 + 4) / 3600, rel=1e-15)


def test_a_block_beyond_four_gigabytes_has_wide_offsets(tmp_path, monkeypatch):
    tsv = write(tmp_path, [f"{i}/é.wav\t{i}" for i in range(1, 100)])
    narrow = read_manifest(tsv)
    monkeypatch.setattr(manifest_files, "SMALL_BLOCK", 500)
    wide = read_manifest(tsv)
    assert wide.nbytes - narrow.nbytes == 4 * 100
    assert everything(wide) == everything(narrow)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A list of 100,000 utterances, and the bytes of its paths."""
    lines = [f"{i % 97}/speaker-{i % 7}/chapter-{i}.flac\t{100_000 + i}" for i in range(100_000)]
    tsv = write(tmp_path_factory.mktemp("large"), lines)
    return tsv, sum(len(line.split("\t")[0]) for line in lines)


def test_an_utterance_costs_its_path_and_at_most_24_bytes(large, monkeypatch):
    monkeypatch.setattr(manifest_files, "CHUNK", 1 << 16)
    tsv, path_bytes = large
    number = 100_000
    objects = sys.getallocatedblocks()
    tracemalloc.start()
    try:
        whole = read_manifest(tsv)
        held, peak = tracemalloc.get_traced_memory()
        half = whole.select(np.arange(number) % 2 == 0)
        twice = join_manifests([whole, half])
    finally:
        tracemalloc.stop()
    assert sys.getallocatedblocks() - objects < 1000  # none per utterance
    assert whole.nbytes <= path_bytes + 24 * number
    assert half.nbytes <= path_bytes + 24 * number
    assert (
        whole.nbytes <= held <= 1.15 * path_bytes + 24 * number
    )  # a block that has grown may have some room at its end
    assert peak < 1.6 * held
    assert twice.nbytes <= path_bytes * 2 + 24 * 1.5 * number
    assert whole.select(np.ones(number, bool)).nbytes == whole.nbytes


def _own_pages(array):
    """The share of the pages of an array that no other process has as well."""
    first, last = array.ctypes.data // mmap.PAGESIZE + 1, (array.ctypes.data + array.nbytes) // mmap.PAGESIZE
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        file.seek(8 * first)
        pages = np.frombuffer(file.read(8 * (last - first)), np.uint64)
    return float((pages >> np.uint64(56) & np.uint64(1)).mean())  # bit 56: exclusively mapped


def _read_all(manifest, answer):
    """In a worker: which of the memory that it shares with its parent it copies by reading, and by writing."""
    paths = manifest._lists[0].paths
    arrays = [np.frombuffer(paths.block, np.uint8), paths.offsets, manifest.num_samples]
    for i in range(0, len(manifest), 10):
        manifest[i]
    read = [_own_pages(array) for array in arrays]
    manifest.num_samples += 1
    answer.put((read, _own_pages(manifest.num_samples)))


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="the system does not tell who has a page")
def test_a_forked_worker_copies_nothing_by_reading(large):
    manifest = read_manifest(large[0])
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    worker = context.Process(target=_read_all, args=(manifest, answer))
    worker.start()
    read, written = answer.get(timeout=60)
    worker.join()
    assert written > 0.9  # the measurement sees a copy
    assert max(read) < 0.05
    del manifest  # until here the parent has it too


def test_a_quarter_of_a_million_lines_are_read_in_a_moment_and_agree_with_split(tmp_path):
    rng = np.random.default_rng(0)
    lines = [f"{i % 97}/x-{i}.flac\t{n}" for i, n in enumerate(rng.integers(1, 10**6, 250_000))]
    tsv = write(tmp_path, lines)
    start = time.perf_counter()
    manifest = read_manifest(tsv)
    assert time.perf_counter() - start < 5
    assert manifest.num_samples.tolist() == [int(line.split("\t")[1]) for line in lines]
    for i in rng.integers(0, len(lines), 100).tolist():
        assert str(manifest[i].clip.path.relative_to(tmp_path)) == lines[i].split("\t")[0]


def test_paths_into_shards_are_pieces_of_tar_files(tmp_path):
    lines = [
        "train/s-000.tar:512:8192:84/12/a.b.flac\t400",
        "s:1.tar:0:7:k\t5",
        "x.tar:5:flac\t6",
        "y.tgz:1:2:z.flac\t7",
    ]
    found = everything(read_manifest(write(tmp_path, lines)))
    assert [utterance.id for utterance in found] == ["84/12/a.b", "k", "x", "y.tgz:1:2:z"]
    assert [utterance.clip for utterance in found] == [
        Clip(tmp_path / "train/s-000.tar", (512, 8192), member="84/12/a.b.flac"),
        Clip(tmp_path / "s:1.tar", (0, 7), member="k"),
        Clip(tmp_path / "x.tar:5:flac"),
        Clip(tmp_path / "y.tgz:1:2:z.flac"),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_random_json_manifests_agree_with_the_json_module(tmp_path, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(manifest_files, "CHUNK", int(rng.integers(1, 400)))
    words = ["hello", "wörld", "日本", "a\tb", "\u2028", "", '"', "\\", "😀"]
    lines = []
    for _ in range(int(rng.integers(1, 40))):
        entry = {"audio_filepath": f"/d{rng.integers(3)}/é{rng.integers(6)}.x.wav"[rng.integers(2) :]}
        entry["duration"] = [float(rng.uniform(0.01, 40)), int(rng.integers(1, 40)), 1e-4][rng.integers(3)]
        entry["text"] = " ".join(rng.choice(words, rng.integers(0, 5)))
        if rng.random() < 0.5:
            entry["offset"] = [0, 0.0, 1.25, float(rng.uniform(0, 9)), None][rng.integers(5)]
        if rng.random() < 0.5:
            entry |= {"lang": "en", "extra": {"nested": [1, None]}, "speaker": "s"}
        keys = rng.permutation(list(entry))
        lines.append(json.dumps({key: entry[key] for key in keys}, ensure_ascii=bool(rng.integers(2))))
    path = tmp_path / "m.json"
    end = ["\n", "\r\n"][rng.integers(2)]
    path.write_bytes(("\ufeff" * int(rng.integers(2)) + end.join(lines) + end * int(rng.integers(4))).encode())
    seen, expected = {}, []
    for number, line in enumerate(lines, 1):
        entry = json.loads(line)
        name, offset = entry["audio_filepath"], entry.get("offset")
        copy = seen[name] = seen.get(name, -1) + 1
        samples = round(entry["duration"] * 22050)
        part = (None, None) if offset is None else (offset, samples / 22050)
        text = " ".join(" ".join([*word, "|"]) for word in entry["text"].split())
        stem = name.removesuffix(".wav") + (f"-sub{copy}" if copy else "")
        expected.append(Utterance(stem, Clip(tmp_path / name, None, *part), samples, text, f"{path}:{number}", 1102))
    manifest = read_manifest(path, sample_rate=22050, text=True)
    assert everything(manifest) == expected
    assert manifest.has_text
    assert [manifest.text_where(i) for i in range(len(lines))] == [u.where for u in expected]
    without = read_manifest(path, sample_rate=22050)
    assert not without.has_text
    assert [u.clip for u in everything(without)] == [u.clip for u in expected]
    assert without.text(0) is None


GOOD = '{"audio_filepath": "a.wav", "duration": 1}'


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nonsense", "not JSON, 'nonsense'"),
        ("", "not JSON, ''"),
        (GOOD + GOOD, "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"audio_filepath": "a.wav", "duration": 1' + "0" * 5000 + "}", "not JSON"),
        ("[]", "[] is not a JSON object"),
        ("{}", "audio_filepath is missing"),
        ('{"audio_filepath": null, "duration": 1}', "audio_filepath is missing"),
        ('{"audio_filepath": "", "duration": 1}', "audio_filepath '' is not a path"),
        ('{"audio_filepath": ["a"], "duration": 1}', "audio_filepath ['a'] is not a path"),
        (r'{"audio_filepath": "a\u0000.wav", "duration": 1}', "audio_filepath or text has a character that no"),
        (r'{"audio_filepath": "a\ud800.wav", "duration": 1}', "audio_filepath or text has a character that no"),
        (r'{"audio_filepath": "a", "duration": 1, "text": "\udfff"}', "audio_filepath or text has a character that no"),
        ('{"audio_filepath": "a"}', "duration is missing"),
        ('{"audio_filepath": "a", "duration": null}', "duration is missing"),
        ('{"audio_filepath": "a", "duration": 0}', "duration 0 is not a number of seconds above 0"),
        ('{"audio_filepath": "a", "duration": -1.5}', "duration -1.5 is not"),
        ('{"audio_filepath": "a", "duration": NaN}', "duration nan is not"),
        ('{"audio_filepath": "a", "duration": Infinity}', "duration inf is not"),
        ('{"audio_filepath": "a", "duration": 1' + "0" * 400 + "}", "duration 1000"),
        ('{"audio_filepath": "a", "duration": true}', "duration True is not"),
        ('{"audio_filepath": "a", "duration": "3"}', "duration '3' is not"),
        ('{"audio_filepath": "a", "duration": 0.00001}', "duration 1e-05 is less than one sample at 16000 Hz"),
        ('{"audio_filepath": "a", "duration": 1, "offset": -0.5}', "offset -0.5 is not a number of seconds, 0 or more"),
        ('{"audio_filepath": "a", "duration": 1, "offset": "0"}', "offset '0' is not"),
        ('{"audio_filepath": "a", "duration": 1, "offset": NaN}', "offset nan is not"),
        ('{"audio_filepath": "a", "duration": 1, "text": 5}', "text 5 is not a string"),
        ('{"audio_filepath": "a", "duration": 1, "speaker": ["x"]}', "speaker ['x'] is neither"),
    ],
)
@pytest.mark.parametrize("chunk", [10, 10**6])
def test_a_malformed_entry_is_refused_with_file_and_line(tmp_path, monkeypatch, chunk, line, expected):
    monkeypatch.setattr(manifest_files, "CHUNK", chunk)
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join([GOOD, GOOD, line, GOOD, line]))
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: {expected}")
    assert ";" in message
    assert len(message) < 500
    assert "\n" not in message


def test_an_empty_or_missing_json_manifest_is_refused(tmp_path):
    path = tmp_path / "m.json"
    with pytest.raises(DataError, match="m.json: no such file; a manifest has one JSON object per line"):
        read_manifest(path)
    for content in (b"", b"\n\r\n", b"\xef\xbb\xbf"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="m.json: the manifest is empty; a manifest has one JSON object per line"):
            read_manifest(path)
    path.write_bytes(GOOD.encode() + b"\n\xff\n")
    with pytest.raises(DataError, match="m.json:2: not UTF-8 text"):
        read_manifest(path)


@pytest.mark.parametrize("chunk", [1, 10**6])
def test_fine_tuning_needs_the_text_of_every_entry(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(manifest_files, "CHUNK", chunk)
    entries = [{"audio_filepath": f"{i}.wav", "duration": 1, "text": "a b"} for i in range(5)]
    del entries[2]["text"]
    entries[3]["text"] = None
    path = write_json(tmp_path, entries)
    with pytest.raises(DataError, match="train.json:3: no text, but labels are needed; add it"):
        read_manifest(path, text=True)
    assert len(read_manifest(path)) == 5
    with pytest.raises(DataError, match="train.json:1: no text"):
        read_manifest(write_json(tmp_path, entries[2:3]), text=True)
    entries[1]["text"] = "a|b"
    path = write_json(tmp_path, entries)
    with pytest.raises(DataError, match=r"train.json:2: text 'a\|b' has a '\|', which marks the end of a word"):
        read_manifest(path, text=True)
    assert len(read_manifest(path)) == 5


def test_a_file_of_labels_serves_a_json_manifest_too(tmp_path):
    path = write_json(tmp_path, [{"audio_filepath": f"{i}.wav", "duration": 1} for i in range(2)])
    (tmp_path / "train.phn").write_text("AH K\n\n")
    manifest = read_manifest(path, tmp_path / "train.phn", text=True)
    assert [u.text for u in everything(manifest)] == ["AH K", ""]
    assert manifest.text_where(1) == f"{tmp_path / 'train.phn'}:2"


def test_entries_of_one_file_are_told_apart_when_hashes_collide(tmp_path):
    class Same(str):
        def __hash__(self):
            return 7

    builder = manifest_files._StringsBuilder()
    names = ["a", "b", "a", "c", "a", "b"]
    builder.add_strings(names)
    copies = manifest_files._count_copies(builder.finish(), np.array([hash(Same(name)) for name in names]))
    assert copies.tolist() == [names[:i].count(name) for i, name in enumerate(names)]


def speakers_by_hand(manifest, entries):
    """neighbours() from the entries as they were written: (list, place in it, speaker or None, path)."""
    expected = []
    for one, two in zip(entries[:-1], entries[1:], strict=True):
        same = (
            one[2] == two[2] if (one[2], two[2]) != (None, None) else one[3].split("/")[:-1] == two[3].split("/")[:-1]
        )
        expected.append(one[0] == two[0] and one[1] + 1 == two[1] and same)
    return expected


@pytest.mark.parametrize("seed", range(20))
def test_neighbours_follow_each_other_and_have_one_speaker(tmp_path, seed):
    rng = np.random.default_rng(seed)
    lists, entries = [], []
    for number in range(3):
        paths = [f"{'/a' * rng.integers(3)}/{rng.integers(2)}/{i}.wav"[1:] for i in range(30)]
        names = [[None, "x", "y", 5][rng.integers(4)] if number == 1 else None for _ in paths]
        if number == 1:
            rows = [
                {"audio_filepath": path, "duration": 1} | ({} if name is None else {"speaker": name})
                for path, name in zip(paths, names, strict=True)
            ]
            lists.append(read_manifest(write_json(tmp_path, rows)))
        elif number == 0:
            lists.append(read_manifest(write(tmp_path, [f"{path}\t5" for path in paths])))
        else:
            lines = [f"s/{i // 7}.tar:{i}:9:{path}\t5" for i, path in enumerate(paths)]
            lists.append(read_manifest(write(tmp_path, lines, "shards.tsv")))
        entries.append([(number, i, name, path) for i, (path, name) in enumerate(zip(paths, names, strict=True))])
    for manifest, own in zip(lists, entries, strict=True):
        assert manifest.neighbours().tolist() == speakers_by_hand(manifest, own)
        chosen = rng.permutation(30)[:20] if seed % 2 else np.sort(rng.permutation(30)[:25])
        part = manifest.select(chosen)
        assert part.neighbours().tolist() == speakers_by_hand(part, [own[i] for i in chosen])
    joined, every = join_manifests(lists), sum(entries, [])
    assert joined.neighbours().tolist() == speakers_by_hand(joined, every)
    chosen = np.flatnonzero(rng.random(90) < 0.8)
    assert joined.select(chosen).neighbours().tolist() == speakers_by_hand(joined, [every[i] for i in chosen])
    assert len(lists[0].select([3]).neighbours()) == 0


@pytest.mark.parametrize("seed", range(10))
def test_lists_are_joined_one_after_another(tmp_path, seed):
    rng = np.random.default_rng(seed)
    lists = []
    for number in range(3):
        count = int(rng.integers(1, 9))
        if number == 1:
            entries = [{"audio_filepath": f"{i % 2}.wav", "duration": i + 1, "text": f"t{i}"} for i in range(count)]
            lists.append(read_manifest(write_json(tmp_path, entries), text=True))
        else:
            tsv = write(tmp_path, [f"{number}-{i}.wav\t{i + 1}" for i in range(count)], f"l{number}.tsv")
            (tmp_path / f"l{number}.ltr").write_text("".join(f"L {i}\n" for i in range(count)))
            lists.append(read_manifest(tsv, tmp_path / f"l{number}.ltr"))
        if rng.random() < 0.5:
            lists[-1] = lists[-1].select(rng.integers(0, count, 5))
    joined = join_manifests(lists)
    one_by_one = [utterance for manifest in lists for utterance in everything(manifest)]
    numbers = [number for number, manifest in enumerate(lists) for _ in range(len(manifest))]
    assert everything(joined) == one_by_one
    assert joined.datasets.tolist() == numbers
    assert joined.datasets.dtype == np.uint8
    assert joined.has_text
    assert joined.name == "+".join(manifest.name for manifest in lists)
    assert [joined.text_where(i) for i in range(len(joined))] == [
        manifest.text_where(i) for manifest in lists for i in range(len(manifest))
    ]
    chosen = rng.permutation(len(joined))[:4]
    part = joined.select(chosen)
    assert everything(part) == everything(pickle.loads(pickle.dumps(part))) == [one_by_one[i] for i in chosen]
    assert part.datasets.tolist() == [numbers[i] for i in chosen]
    nested = join_manifests([part, lists[0]])
    assert everything(nested) == [one_by_one[i] for i in chosen] + everything(lists[0])
    assert nested.datasets.tolist() == [0] * len(part) + [1] * len(lists[0])


def test_one_list_is_not_numbered_and_labels_of_some_are_not_enough(tmp_path):
    tsv = write(tmp_path, ["a.wav\t5"])
    (tmp_path / "train.ltr").write_text("A |\n")
    labelled, bare = read_manifest(tsv, tmp_path / "train.ltr"), read_manifest(tsv)
    assert join_manifests([bare]).datasets is None
    assert not join_manifests([labelled, bare]).has_text
    assert [join_manifests([labelled, bare]).text(i) for i in range(2)] == ["A |", None]


def test_positions_and_masks_of_a_selection(tmp_path):
    manifest = read_manifest(write(tmp_path, [f"{i}.wav\t{i + 1}" for i in range(10)]))
    assert [u.id for u in everything(manifest.select([]))] == []
    assert [u.id for u in everything(manifest.select([-1, 3, 3]))] == ["9", "3", "3"]
    assert [u.id for u in everything(manifest.select([-1, 3]).select([-2]))] == ["9"]
    assert manifest[-1].id == "9"
    for wrong in ([10], [-11], np.ones(9, bool)):
        with pytest.raises(IndexError):
            manifest.select(wrong)
    with pytest.raises(IndexError):
        manifest[10]


def test_the_list_of_a_subset_is_found_by_its_format(tmp_path, caplog):
    with pytest.raises(
        DataError, match=r"dev.tsv: no such file, nor dev.json or dev.jsonl \(--manifest_format auto\);"
    ):
        find_list(tmp_path, "dev")
    (tmp_path / "dev.jsonl").touch()
    assert find_list(tmp_path, "dev") == find_list(tmp_path, "dev", "json") == tmp_path / "dev.jsonl"
    with pytest.raises(DataError, match=r"dev.tsv: no such file \(--manifest_format tsv\); .*generate_filelist.py"):
        find_list(tmp_path, "dev", "tsv")
    assert not caplog.records
    (tmp_path / "dev.tsv").touch()
    with caplog.at_level(logging.WARNING):
        assert find_list(tmp_path, "dev") == find_list(tmp_path, "dev", "tsv") == tmp_path / "dev.tsv"
    assert "dev.tsv is read, and dev.jsonl beside it is not" in caplog.text
    assert find_list(tmp_path, "dev", "json") == tmp_path / "dev.jsonl"
    (tmp_path / "dev.tsv").unlink()
    with pytest.raises(DataError, match=r"test.json: no such file, nor test.jsonl \(--manifest_format json\)"):
        find_list(tmp_path, "test", "json")
