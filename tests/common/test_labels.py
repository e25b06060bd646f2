"""Dictionary files are read strictly, and text survives the way to ids and back."""

# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from common.errors import DataError
from common.labels import SPECIAL_SYMBOLS, Dictionary, words


def written(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "dict.ltr.txt"
    path.write_bytes(text.encode(encoding))
    return path


def collapse(ids):
    """Remove repeats, then blanks: the definition of a CTC path's labelling."""
    return [i for n, i in enumerate(ids) if i != 0 and (n == 0 or ids[n - 1] != i)]


def test_symbols_of_the_file_follow_the_four_special_ones_in_file_order(tmp_path):
    dictionary = Dictionary.read(written(tmp_path, "| 9\nB 3\nA 1\n"))
    assert dictionary.symbols == ["<s>", "<pad>", "</s>", "<unk>", "|", "B", "A"]
    assert len(dictionary) == 7
    assert dictionary.encode("A B | A", "x:1") == [6, 5, 4, 6]
    assert dictionary.encode("", "x:1") == []


def test_a_dictionary_survives_its_list_of_symbols(tmp_path):
    dictionary = Dictionary.read(written(tmp_path, "| 9\nB 3\nA 1\n"))
    again = Dictionary.from_symbols(json.loads(json.dumps(dictionary.symbols)))
    assert again.symbols == dictionary.symbols
    assert again.encode("A |", "x:1") == dictionary.encode("A |", "x:1")


@pytest.mark.parametrize("symbols", [["A", "B"], [], list(SPECIAL_SYMBOLS), [*SPECIAL_SYMBOLS, "A", "A"]])
def test_a_list_that_is_no_dictionary_is_refused(symbols):
    with pytest.raises(DataError, match="labels: "):
        Dictionary.from_symbols(symbols)


def test_encoding_and_decoding_are_inverse_for_any_script_and_symbol_length(tmp_path):
    path = written(tmp_path, "é 5\n| 4\nß 3\n語 2\nsch 1\n\U0001f600 1\n")
    dictionary = Dictionary.read(path)
    line = "sch é | 語 ß \U0001f600 |"
    assert dictionary.decode(dictionary.encode(line, "x:1")) == words(line) == "sché 語ß\U0001f600"


def test_windows_line_ends_and_byte_order_marks_do_not_become_symbols(tmp_path):
    dictionary = Dictionary.read(written(tmp_path, "\ufeff| 9\r\nA 1\r\n"))
    assert dictionary.symbols[4:] == ["|", "A"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("| 9\nA\n", r"dict.ltr.txt:2: 'A' is not a symbol and its count"),
        ("| 9\n\nA 1\n", r":2: '' is not a symbol"),
        ("| 9\nA B 1\n", r":2: "),
        ("| 9\nA -1\n", r":2: "),
        ("| 9\nA 1.5\n", r":2: "),
        ("| 9\nA ²\n", r":2: "),
        ("| 9\nA 1\nB 1\nA 2\n", r":4: 'A' \(U\+0041\) stands in line 2 already"),
        ("<pad> 1\nA 1\n", r":1: <pad> is added by the toolkit itself"),
        ("", r"dict.ltr.txt: is empty; .*generate_dictionary"),
    ],
)
def test_a_malformed_dictionary_names_file_and_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        Dictionary.read(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_a_binary_and_a_folder_in_place_of_a_dictionary_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none.txt: there is no such file; .*generate_dictionary"):
        Dictionary.read(tmp_path / "none.txt")
    with pytest.raises(DataError, match=r"not UTF-8"):
        Dictionary.read(written(tmp_path, "é 1\n", encoding="latin-1"))
    with pytest.raises(DataError, match=r"cannot be read"):
        Dictionary.read(tmp_path)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("A é |", r"'é' \(U\+00E9\)"),
        ("A \u200b |", r"U\+200B"),
        ("a", r"'a' \(U\+0061\)"),
        ("<unk>", "'<unk>'"),
        ("A <s>", "'<s>'"),
    ],
)
def test_a_character_outside_the_dictionary_names_line_character_and_remedy(tmp_path, line, shown):
    dictionary = Dictionary.read(written(tmp_path, "| 9\nA 1\n"))
    with pytest.raises(DataError, match=rf"train.ltr:7: .*{shown}.* is not in the dictionary; .*generate_dic"):
        dictionary.encode(line, "train.ltr:7")


def test_words_of_a_letter_line():
    assert words("H E L L O | W O R L D |") == "HELLO WORLD"
    assert words("| A | | B") == "A B"
    assert words("") == ""


def test_decoding_agrees_with_the_reference_cases(shared):
    folder = shared("golden_nvidia")
    dictionary = Dictionary.read(folder / "dict.ltr.txt")
    boundary_second = Dictionary.from_symbols([*SPECIAL_SYMBOLS, "E", "|", "T", "A"])
    for case in json.loads((folder / "decode_cases.json").read_text()):
        used = boundary_second if "boundary not first" in case["case"] else dictionary
        for frames, ids, text in zip(case["frame_ids"], case["collapsed_ids"], case["greedy_text"], strict=True):
            assert collapse(frames) == ids
            assert used.decode(ids) == text
