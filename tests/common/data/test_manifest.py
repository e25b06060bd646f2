"""Lists and labels: what is read, and what is refused with file and line."""

# SPDX-License-Identifier: Apache-2.0
import time

import numpy as np
import pytest

from common.data.manifest import read_manifest
from common.errors import DataError


def write(folder, lines, name="train.tsv", root=".", end="\n"):
    path = folder / name
    path.write_bytes(end.join([root, *lines, ""]).encode())
    return path


def test_lines_become_utterances(tmp_path):
    tsv = write(tmp_path, ["a/b c.flac\t400", "日本/é.two.dots.wav\t16000", "no_extension\t7"])
    (tmp_path / "train.ltr").write_text("A N D | A |\n\nÉ |\n", encoding="utf-8")
    manifest = read_manifest(tsv, tmp_path / "train.ltr")
    assert [manifest[i].id for i in range(3)] == ["a/b c", "日本/é.two.dots", "no_extension"]
    assert manifest[1].source == tmp_path / "日本/é.two.dots.wav"
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
        assert [other[i].source for i in range(3)] == [plain[i].source for i in range(3)]
        assert other.num_samples.tolist() == [1, 22, 333]


def test_a_relative_root_is_relative_to_the_list_and_an_absolute_one_is_kept(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "audio").mkdir()
    relative = read_manifest(write(tmp_path / "lists", ["a.wav\t9"], root="../audio"))
    absolute = read_manifest(write(tmp_path / "lists", ["a.wav\t9"], root=str(tmp_path / "audio")))
    assert relative[0].source.resolve() == absolute[0].source == tmp_path / "audio" / "a.wav"


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


@pytest.mark.parametrize(("labels", "found"), [("A\n", 1), ("A\nB\nC\n", 3), ("", 0), ("\n", 1)])
def test_labels_that_do_not_match_in_number_are_refused(tmp_path, labels, found):
    tsv = write(tmp_path, ["a.wav\t5", "b.wav\t5"])
    (tmp_path / "train.ltr").write_text(labels)
    with pytest.raises(DataError, match=rf"train.ltr: {found} lines of labels for 2 utterances in .*train.tsv;"):
        read_manifest(tsv, tmp_path / "train.ltr")


@pytest.mark.parametrize("labels", ["A\n\n", "\n\n", "A\nB", "A\nB\n\n\n"])
def test_labels_may_be_empty_and_surplus_empty_lines_do_not_count(tmp_path, labels):
    tsv = write(tmp_path, ["a.wav\t5", "b.wav\t5"])
    (tmp_path / "train.ltr").write_text(labels)
    manifest = read_manifest(tsv, tmp_path / "train.ltr")
    assert [manifest[i].text for i in range(2)] == labels.split("\n")[:2]


def test_a_quarter_of_a_million_lines_are_read_in_a_moment_and_agree_with_split(tmp_path):
    rng = np.random.default_rng(0)
    lines = [f"{i % 97}/x-{i}.flac\t{n}" for i, n in enumerate(rng.integers(1, 10**6, 250_000))]
    tsv = write(tmp_path, lines)
    start = time.perf_counter()
    manifest = read_manifest(tsv)
    assert time.perf_counter() - start < 5
    assert manifest.num_samples.tolist() == [int(line.split("\t")[1]) for line in lines]
    for i in rng.integers(0, len(lines), 100).tolist():
        assert str(manifest[i].source.relative_to(tmp_path)) == lines[i].split("\t")[0]
