"""Labels and dictionary: the words as they stand, in the order of the list; faults name file and line."""

import shutil
from collections import Counter

import pytest

from common.errors import ConfigError, DataError
from utils import generate_1h_10h_datasets, generate_dictionary, generate_filelist, libri_labels, transcripts

CHAPTER = "84/121123"


@pytest.fixture
def labels(tmp_path):
    """Write a transcript and a list of two clips, make the labels, return the lines of both files."""
    folder = tmp_path / CHAPTER
    folder.mkdir(parents=True)
    tsv = tmp_path / "dev.tsv"
    tsv.write_text(f"{tmp_path}\n{CHAPTER}/84-121123-0001.flac\t10\n{CHAPTER}/84-121123-0000.flac\t20\n")

    def make(transcript):
        transcripts._read_folder.cache_clear()
        (folder / "84-121123.trans.txt").write_bytes(transcript)
        libri_labels.main([str(tsv), "--output_dir", str(tmp_path / "out"), "--output-name", "dev"])
        return [(tmp_path / "out" / f"dev.{kind}").read_text(encoding="utf-8").split("\n") for kind in ("ltr", "wrd")]

    return make


def test_labels_follow_the_order_of_the_list(labels):
    ltr, wrd = labels(b"84-121123-0000 A AND B\n84-121123-0001 IT'S\n84-121123-0002 UNUSED\n")
    assert ltr == ["I T ' S |", "A | A N D | B |", ""]
    assert wrd == ["IT'S", "A AND B", ""]


@pytest.mark.parametrize(
    "transcript",
    [
        "\ufeff84-121123-0000 A B\r\n84-121123-0001 C\r\n".encode(),
        b"84-121123-0000\tA \t B   \n\n  84-121123-0001   C",
        b"84-121123-0001 C\n84-121123-0000 A B\n84-121123-0000  A  B\n",
    ],
    ids=["byte-order mark and CRLF", "tabs, spaces, no last line end", "the same line twice"],
)
def test_harmless_irregularities_change_nothing(labels, transcript):
    assert labels(transcript) == [["C |", "A | B |", ""], ["C", "A B", ""]]


def test_words_stay_as_they_stand(labels):
    ltr, wrd = labels("84-121123-0000 Mr. Ünal\n84-121123-0001 東京\n".encode())
    assert (ltr[0], wrd[1]) == ("東 京 |", "Mr. Ünal")


@pytest.mark.parametrize(
    ("transcript", "message"),
    [
        (b"84-121123-0000 A\n", r"dev.tsv:2: no transcript line for 84-121123-0001"),
        (b"84-121123-0000 A\n84-121123-0001\n", r"trans.txt:2: no words for 84-121123-0001"),
        (b"84-121123-0001 A\n84-121123-0000 A\n84-121123-0000 B\n", r"trans.txt:3: other words .*trans.txt:2"),
        (b"84-121123-0000 A\n84-121123-0001 A|B\n", r"trans.txt:2: '\|'"),
        (b"84-121123-0000 \xff\n", r"trans.txt: not UTF-8"),
        (b"", r"dev.tsv:2: .*and 1 more"),
    ],
)
def test_faults_name_the_line_and_nothing_is_written(labels, tmp_path, transcript, message):
    with pytest.raises(DataError, match=message):
        labels(transcript)
    assert not (tmp_path / "out").exists()


def test_labels_of_a_real_corpus_agree_with_its_transcripts(shared, tmp_path):
    source = shared("speech/digits/dev")
    generate_filelist.main([str(source), str(tmp_path / "dev.tsv")])
    libri_labels.main([str(tmp_path / "dev.tsv"), "--output_dir", str(tmp_path), "--output_name", "dev"])
    texts = dict(line.split(" ", 1) for path in source.rglob("*.trans.txt") for line in path.read_text().splitlines())
    clips = [line.split("\t")[0] for line in (tmp_path / "dev.tsv").read_text().splitlines()[1:]]
    words = (tmp_path / "dev.wrd").read_text().splitlines()
    assert words == [texts[clip.split("/")[-1].removesuffix(".flac")] for clip in clips]
    letters = (tmp_path / "dev.ltr").read_text().splitlines()
    assert [line.replace(" ", "").replace("|", " ").strip() for line in letters] == words
    assert len(words) == 124


def test_the_dictionary_counts_all_symbols_and_breaks_ties_by_symbol(tmp_path):
    lines = ["A N D | A |", "B | É |"]
    (tmp_path / "a.ltr").write_text(lines[0] + "\n", encoding="utf-8")
    (tmp_path / "b.ltr").write_text(lines[1] + "\n", encoding="utf-8")
    out = tmp_path / "dict.ltr.txt"
    generate_dictionary.main([str(tmp_path / "a.ltr"), str(tmp_path / "b.ltr"), str(out)])
    assert out.read_text(encoding="utf-8") == "| 4\nA 2\nB 1\nD 1\nN 1\nÉ 1\n"
    counted = {symbol: int(count) for symbol, count in map(str.split, out.read_text(encoding="utf-8").splitlines())}
    assert counted == Counter(" ".join(lines).split())


def test_words_or_nothing_make_no_dictionary(tmp_path):
    (tmp_path / "x.wrd").write_text("ONE THREE\n")
    with pytest.raises(DataError, match="not the .wrd file"):
        generate_dictionary.main([str(tmp_path / "x.wrd"), str(tmp_path / "d")])
    (tmp_path / "x.ltr").write_text("\n")
    with pytest.raises(DataError, match="no symbols"):
        generate_dictionary.main([str(tmp_path / "x.ltr"), str(tmp_path / "d")])


@pytest.mark.parametrize("output", ["a.ltr", "sub/../a.ltr", "new.ltr", "a.wrd", "a.tsv", "notes.txt", "link"])
def test_a_dictionary_replaces_nothing_but_a_dictionary(output, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to("a.ltr")
    for name, text in (("a.ltr", "A |\n"), ("a.wrd", "A\n"), ("a.tsv", "/root\nx\t5\n"), ("notes.txt", "my notes\n")):
        (tmp_path / name).write_text(text)
    before = {path: path.read_text() for path in tmp_path.glob("*.*")}
    with pytest.raises(ConfigError, match=r"choose another name|comes last"):
        generate_dictionary.main([str(tmp_path / "a.ltr"), str(tmp_path / output)])
    assert {path: path.read_text() for path in tmp_path.glob("*.*")} == before


def test_a_dictionary_can_be_made_again(tmp_path):
    (tmp_path / "a.ltr").write_text("A |\n")
    out = tmp_path / "dict.ltr.txt"
    for text in ("", "| 7\nB 1\n"):
        out.write_text(text)
        generate_dictionary.main([str(tmp_path / "a.ltr"), str(out)])
        assert out.read_text() == "A 1\n| 1\n"


def test_the_fine_tuning_sets_are_those_of_libri_light(shared, tmp_path):
    source = sorted(shared("speech/digits/dev").rglob("*-0000.flac"))[0]
    root = tmp_path / "librispeech_finetuning"
    parts = [f"1h/{part}/{kind}" for part in range(6) for kind in ("clean", "other")] + ["9h/clean", "9h/other"]
    for number, part in enumerate(parts):
        folder = root / part / f"{number}" / "7"
        folder.mkdir(parents=True)
        shutil.copyfile(source, folder / f"{number}-7-0000.flac")
        (folder / f"{number}-7.trans.txt").write_text(f"{number}-7-0000 NUMBER {'I' * (number + 1)}\n")
    with pytest.raises(DataError, match="train-clean-100.tsv"):
        generate_1h_10h_datasets.main([str(root), str(tmp_path), "--filelists", str(tmp_path)])
    for suffix in (".tsv", ".ltr", ".wrd"):
        (tmp_path / f"train-clean-100{suffix}").write_text(suffix)
    generate_1h_10h_datasets.main([str(root), str(tmp_path / "out"), "--filelists", str(tmp_path)])
    ten = (tmp_path / "out" / "train-10h.tsv").read_text().splitlines()
    one = (tmp_path / "out" / "train-1h.tsv").read_text().splitlines()
    assert (len(one), len(ten)) == (1 + 12, 1 + 14)
    assert one[0] == ten[0] == str(root)
    assert set(one) < set(ten)
    assert len((tmp_path / "out" / "train-1h.wrd").read_text().splitlines()) == 12
    assert (tmp_path / "out" / "train-100h.ltr").read_text() == ".ltr"
    shutil.rmtree(root / "1h" / "3")
    with pytest.raises(DataError, match="1h/3/clean: no such folder"):
        generate_1h_10h_datasets.main([str(root), str(tmp_path / "out")])
