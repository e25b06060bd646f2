"""File lists: every file once, in a reproducible order, and nothing left out in silence."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from common.data.audio import AudioInfo, read_audio
from common.errors import ConfigError, DataError
from utils import combine_filelists, filelists, generate_filelist, program

PROGRAM = Path(generate_filelist.__file__)
NAMES = [
    "a.wav",
    "b/UPPER.WAV",
    "b/name with spaces.wav",
    "b/-dash.wav",
    "c/näme_日本語.flac",
    "c/two.dots.flac",
    "z/%1;'.wav",
]


def write_audio(path, samples, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "FLAC" if path.suffix.lower() == ".flac" else "WAV"
    soundfile.write(path, np.zeros(samples, np.int16), rate, format=kind)


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    for number, name in enumerate(NAMES):
        write_audio(root / name, 1000 + number)
    (root / "notes.txt").write_text("not audio")
    return root


def test_a_list_read_back_names_every_audio_file_with_its_length(tree, tmp_path):
    out = tmp_path / "all.tsv"
    generate_filelist.main([str(tree), str(out)])
    files = filelists.read_filelist(out)
    assert files.root == tree.resolve()
    assert dict(zip(files.paths, files.num_samples, strict=True)) == {n: 1000 + i for i, n in enumerate(NAMES)}
    assert list(files.paths) == sorted(files.paths)
    assert out.read_text(encoding="utf-8").split("\n")[1] == "a.wav\t1000"


def test_extensions_are_chosen_in_any_case_and_paths_by_a_part_of_them(tree, tmp_path):
    out = tmp_path / "list.tsv"
    generate_filelist.main([str(tree), str(out), "--extensions", ".FLAC"])
    assert filelists.read_filelist(out).paths == ("c/näme_日本語.flac", "c/two.dots.flac")
    generate_filelist.main(["--extension", "wav", str(tree), str(out), "--path-must-contain", "b/"])
    assert all(path.startswith("b/") for path in filelists.read_filelist(out).paths)
    with pytest.raises(DataError, match=r"no \.mp3 file \(5 \.wav"):
        generate_filelist.main([str(tree), str(out), "--extensions", "mp3"])


def test_linked_folders_are_followed_and_a_circle_ends(tree, tmp_path):
    other = tmp_path / "elsewhere"
    write_audio(other / "far.wav", 5)
    (tree / "link").symlink_to(other)
    (other / "back").symlink_to(tree)
    found = filelists.find_audio(tree, ["wav", "flac"])
    assert "link/far.wav" in found
    assert len(found) == len(NAMES) + 1


def test_files_that_cannot_be_listed_are_an_error_or_are_named(tree, tmp_path, capsys):
    out = tmp_path / "list.tsv"
    (tree / "empty.wav").write_bytes(b"")
    (tree / "page.flac").write_text("<html>")
    write_audio(tree / "zero.wav", 0)
    (tree / "tab\there.wav").write_bytes((tree / "a.wav").read_bytes())
    with pytest.raises(DataError, match="4 of 11 files.*--skip_bad") as error:
        generate_filelist.main([str(tree), str(out)])
    assert all(name in str(error.value) for name in ("empty.wav", "page.flac", "zero.wav", r"tab\there.wav"))
    assert not out.exists()
    generate_filelist.main([str(tree), str(out), "--skip_bad"])
    assert len(filelists.read_filelist(out).paths) == len(NAMES)
    assert "empty.wav" in capsys.readouterr().out


def test_only_ten_bad_files_are_named_and_the_rest_counted(tmp_path):
    for number in range(13):
        (tmp_path / f"{number:02d}.wav").write_bytes(b"")
    with pytest.raises(DataError, match="and 3 more") as error:
        generate_filelist.main([str(tmp_path), str(tmp_path / "x.tsv")])
    assert str(error.value).count("\n  '") == 10


def test_odd_inputs_neither_crash_nor_vanish(shared, tmp_path):
    source = shared("speech/odd")
    generate_filelist.main([str(source), str(tmp_path / "odd.tsv"), "--skip_bad"])
    listed = set(filelists.read_filelist(tmp_path / "odd.tsv").paths)
    assert {
        "-dash.flac",
        "name with spaces.flac",
        "näme_日本語_имя.flac",
        "UPPER.FLAC",
        "two.dots.in.name.flac",
    } <= listed
    assert not listed & {"zero_bytes.wav", "zero_samples.wav", "unknown_length.flac", "text_named.flac"}


def test_the_split_draws_one_number_for_each_sorted_file(shared):
    for case in json.loads(shared("golden_ssl/data_pipeline.json").read_text())["manifest_split"]:
        drawn = generate_filelist.draw_valid(case["files"], case["valid_percent"], case["seed"])
        assert [i for i, valid in enumerate(drawn) if valid] == case["valid_positions"]


def test_a_fraction_of_0_makes_one_list(tree, tmp_path):
    train, valid = tmp_path / "train.tsv", tmp_path / "valid.tsv"
    for more in ([], ["--valid-out", str(valid)]):
        generate_filelist.main([str(tree), str(train), "--valid-percent", "0", *more])
        assert len(filelists.read_filelist(train).paths) == len(NAMES)
        assert not valid.exists()
        train.unlink()


@pytest.fixture
def mixed(tmp_path):
    """Files of several rates, channel counts and formats, and one that is no audio."""
    root = tmp_path / "mixed"
    for number in range(4):
        write_audio(root / f"good{number}.wav", 16000)
    write_audio(root / "phone.wav", 8000, 8000)
    for number in range(3):
        soundfile.write(root / f"cd{number}.flac", np.zeros((44101, 2), np.int16), 44100)
    soundfile.write(root / "vorbis.ogg", np.zeros(16000), 16000)
    soundfile.write(root / "layer3.MP3", np.zeros(48000), 48000, format="MP3")
    soundfile.write(root / "apple.aiff", np.zeros(22050), 22050)
    (root / "page.opus").write_text("<html>")
    return root


def test_files_of_any_kind_are_listed_with_their_length_at_the_models_rate(mixed, tmp_path, capsys):
    out = tmp_path / "x.tsv"
    generate_filelist.main([str(mixed), str(out), "--skip_bad"])
    files = filelists.read_filelist(out)
    assert len(files.paths) == 11
    assert dict(zip(files.paths, files.num_samples, strict=True))["cd0.flac"] == -(-44101 * 16000 // 44100)
    for path, length in zip(files.paths, files.num_samples, strict=True):
        assert len(read_audio(files.root / path, sample_rate=16000, num_samples=length)) == length
    lines = capsys.readouterr().out.splitlines()
    assert "1 of 12 files cannot be listed and are left out" in lines[0]
    assert lines[2] == f"{out}: 11 files, 0.00 h, lengths at 16000 Hz"
    assert lines[3:5] == ["  5 files 16 kHz mono", "  3 files 44.1 kHz stereo -> 16 kHz mono"]
    assert set(lines[5:]) == {f"  1 file {rate} kHz mono -> 16 kHz mono" for rate in ("8", "48", "22.05")}


def test_lengths_follow_the_rate_of_the_model(mixed, tmp_path, capsys):
    out = tmp_path / "x.tsv"
    generate_filelist.main([str(mixed), str(out), "--skip-bad", "--sample-rate", "8000"])
    files = filelists.read_filelist(out)
    lengths = dict(zip(files.paths, files.num_samples, strict=True))
    assert (lengths["phone.wav"], lengths["good0.wav"], lengths["cd0.flac"]) == (8000, 8000, 8001)
    assert "  5 files 16 kHz mono -> 8 kHz mono" in capsys.readouterr().out
    scanned = filelists.scan(mixed, ["flac"], sample_rate=8000)
    assert scanned.num_samples == (8001, 8001, 8001)


def test_what_reading_would_refuse_by_its_header_cannot_be_listed(tmp_path):
    write_audio(tmp_path / "in" / "whole.wav", 1000)
    content = (tmp_path / "in" / "whole.wav").read_bytes()
    (tmp_path / "in" / "cut.wav").write_bytes(content[:-500])
    write_audio(tmp_path / "in" / "rate.wav", 1000, 1_092_676)
    with pytest.raises(DataError, match="2 of 3 files cannot be listed") as error:
        generate_filelist.main([str(tmp_path / "in"), str(tmp_path / "x.tsv")])
    assert "\n  'cut.wav': truncated, 1500 of 2000 bytes" in str(error.value)
    assert "\n  'rate.wav': 1092676 Hz is not within" in str(error.value)


def test_audio_that_cannot_be_read_is_not_passed_over_in_silence(tree, tmp_path, capsys):
    for name in ("a.m4a", "b/c.M4A", "d.wma"):
        (tree / name).write_bytes(b"x")
    generate_filelist.main([str(tree), str(tmp_path / "x.tsv")])
    assert "2 .m4a, 1 .wma files are left out, they cannot be read; convert them" in capsys.readouterr().err


def test_numbers_of_files_are_grouped_by_thousands():
    infos = [AudioInfo("WAV", "PCM_16", 44100, 2, 1)] * 1204 + [AudioInfo("FLAC", "PCM_16", 16000, 1, 1)]
    lines = ["1,204 files 44.1 kHz stereo -> 16 kHz mono", "1 file 16 kHz mono"]
    assert filelists.conversions(infos, 16000) == lines


def test_both_parts_of_a_split_are_disjoint_and_complete(tmp_path):
    for number in range(60):
        write_audio(tmp_path / "in" / f"{number:03d}.wav", 10)
    train, valid = tmp_path / "train.tsv", tmp_path / "valid.tsv"
    generate_filelist.main([str(tmp_path / "in"), str(train), "--valid_percent", "0.05", "--valid_out", str(valid)])
    assert [int(Path(path).stem) for path in filelists.read_filelist(valid).paths] == [1, 9, 12, 19, 41]
    parts = filelists.read_filelist(train).paths + filelists.read_filelist(valid).paths
    assert sorted(parts) == [f"{number:03d}.wav" for number in range(60)]


def test_a_repaired_file_moves_no_other_file_of_the_split(tmp_path):
    for number in range(40):
        write_audio(tmp_path / "in" / f"{number:03d}.wav", 10)
    valid = tmp_path / "valid.tsv"
    command = [str(tmp_path / "in"), str(tmp_path / "t.tsv"), "--valid_percent", "0.3", "--valid_out", str(valid)]
    generate_filelist.main(command)
    whole = set(filelists.read_filelist(valid).paths)
    (tmp_path / "in" / "003.wav").write_bytes(b"")
    generate_filelist.main([*command, "--skip_bad"])
    assert set(filelists.read_filelist(valid).paths) == whole - {"003.wav"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--valid_percent", "1", "--valid_out", "v.tsv"], r"leaves no file for .*x\.tsv; .* 1 % is 0.01"),
        (["--valid_percent", "5", "--valid_out", "v.tsv"], "fraction: 5 % is 0.05"),
        (["--valid_percent", "-0.1", "--valid_out", "v.tsv"], "fraction"),
        (["--valid_percent", "nan", "--valid_out", "v.tsv"], "fraction"),
        (["--valid_percent", "0.1"], "one needs the other"),
        (["--valid_out", "v.tsv"], "one needs the other"),
        (["--valid_persent", "0.1"], "did you mean --valid_percent"),
        (["--workers", "0"], "at least one"),
        (["--sample_rate", "0"], "such as 16000"),
    ],
)
def test_mistakes_of_usage_are_refused_with_the_remedy(tree, tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        generate_filelist.main([str(tree), str(tmp_path / "x.tsv"), *flags])
    assert not list(tmp_path.glob("*.tsv"))


def test_a_list_does_not_replace_the_other_half_or_what_it_is_made_of(tree, tmp_path):
    out = tmp_path / "x.tsv"
    with pytest.raises(ConfigError, match="--valid_out .*different names"):
        generate_filelist.main(
            [str(tree), str(out), "--valid_percent", "0.5", "--valid_out", str(tree / ".." / "x.tsv")]
        )
    assert not out.exists()
    for name in "ab":
        (tmp_path / f"{name}.tsv").write_text("/root\nx.wav\t5\n")
    lists = [str(tmp_path / "a.tsv"), str(tmp_path / "b.tsv")]
    with pytest.raises(ConfigError, match=r"--output .*b\.tsv: is among the lists"):
        combine_filelists.main([*lists, "--output", str(tree / ".." / "b.tsv")])
    assert (tmp_path / "b.tsv").read_text() == "/root\nx.wav\t5\n"
    with pytest.raises(DataError, match=r"c\.tsv: no such file; make it with utils/generate_filelist\.py"):
        combine_filelists.main([*lists, str(tmp_path / "c.tsv"), "--output", str(out)])


def test_a_split_without_files_on_one_side_is_refused(tree, tmp_path):
    with pytest.raises(DataError, match="change --valid_percent or --seed"):
        generate_filelist.main(
            [str(tree), str(tmp_path / "t.tsv"), "--valid_percent", "1e-9", "--valid_out", str(tmp_path / "v.tsv")]
        )
    assert not list(tmp_path.glob("*.tsv"))


def test_errors_are_one_line_with_a_status_and_no_traceback(tree, tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, PROGRAM, *arguments], capture_output=True, text=True, cwd=tmp_path)

    usage = run(tree, "x.tsv", "--sed", "3")
    assert (usage.returncode, usage.stderr.count("\n")) == (2, 1)
    assert usage.stderr.startswith("error: --sed: no such flag, did you mean --seed?")
    data = run(tmp_path / "nowhere", "x.tsv")
    assert (data.returncode, data.stderr.count("\n")) == (1, 1)
    assert "Traceback" in run(tmp_path / "nowhere", "x.tsv", "--debug").stderr
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.tsv").mkdir()
    for output in ("file/x.tsv", "file/deep/x.tsv", "folder.tsv", "/dev/null/x.tsv"):
        unwritable = run(tree, output)
        assert (unwritable.returncode, unwritable.stderr.count("\n")) == (2, 1)
        assert unwritable.stderr.startswith(f"error: {output}: cannot be written (")
        assert "check the path and its permissions" in unwritable.stderr
        assert "partial" not in unwritable.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"tree", "file", "folder.tsv"}
    good = run(tree, "x.tsv")
    assert (good.returncode, good.stderr) == (0, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"x.tsv:1: .*root"),
        ("a.wav\t5\n", r"x.tsv:1: .*root"),
        ("/root\na.wav\t5\nb.wav 6\n", r"x.tsv:3: .*path<TAB>samples"),
        ("/root\na.wav\t5.5\n", r"x.tsv:2: "),
        ("/root\na.wav\t-5\n", r"x.tsv:2: "),
        ("/root\n\t7\n", r"x.tsv:2: "),
    ],
)
def test_a_malformed_list_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "x.tsv").write_text(text)
    with pytest.raises(DataError, match=message):
        filelists.read_filelist(tmp_path / "x.tsv")


def test_joined_lists_name_the_same_files_with_the_same_labels(tmp_path):
    tsvs = []
    for part, count in (("one/deep", 3), ("two", 2)):
        for number in range(count):
            write_audio(tmp_path / part / f"{number}.wav", 10 * number + count)
        tsvs.append(tmp_path / f"{part.replace('/', '_')}.tsv")
        generate_filelist.main([str(tmp_path / part), str(tsvs[-1])])
        for suffix in (".ltr", ".wrd"):
            lines = [f"{part} {number} {suffix}\u2028\n" for number in range(count)]
            tsvs[-1].with_suffix(suffix).write_text("".join(lines), encoding="utf-8")
    out = tmp_path / "joined.tsv"
    combine_filelists.main([*map(str, tsvs), "--output", str(out)])
    joined = filelists.read_filelist(out)
    originals = [filelists.read_filelist(tsv) for tsv in tsvs]
    assert [joined.root / p for p in joined.paths] == [files.root / p for files in originals for p in files.paths]
    assert joined.num_samples == tuple(n for files in originals for n in files.num_samples)
    for suffix in (".ltr", ".wrd"):
        parts = "".join(tsv.with_suffix(suffix).read_text(encoding="utf-8") for tsv in tsvs)
        assert out.with_suffix(suffix).read_text(encoding="utf-8") == parts


def test_lists_whose_labels_do_not_fit_are_not_joined(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.tsv").write_text("/root\nx.wav\t5\n")
    arguments = [str(tmp_path / "a.tsv"), str(tmp_path / "b.tsv"), "--output", str(tmp_path / "c.tsv")]
    (tmp_path / "a.ltr").write_text("A |\n")
    with pytest.raises(DataError, match="b.ltr: missing"):
        combine_filelists.main(arguments)
    (tmp_path / "b.ltr").write_text("A |\nB |\n")
    with pytest.raises(DataError, match="b.ltr: 2 lines for 1 files"):
        combine_filelists.main(arguments)
    assert not (tmp_path / "c.tsv").exists()


def test_errors_while_writing_name_the_output_and_others_pass(tmp_path):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    with pytest.raises(ConfigError, match=rf"{out}: cannot be written \(.*permissions$"), program.writing(out, partial):
        (partial / "deep").mkdir()
    with pytest.raises(FileNotFoundError), program.writing(out, partial):
        (tmp_path / "input").read_text()
    with pytest.raises(DataError, match=rf"{out}: cannot be written .*; make room"), program.writing(out, partial):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_of_the_system_has_a_remedy(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["tool"])
    with pytest.raises(SystemExit) as end:
        program.run(lambda argv: (tmp_path / "input").read_text())
    assert end.value.code == 1
    expected = f"error: {tmp_path}/input: No such file or directory; check the path and its permissions\n"
    assert capsys.readouterr().err == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_an_error(tree):
    (tree / "b").chmod(0)
    with pytest.raises(PermissionError):
        filelists.find_audio(tree, ["wav"])
    (tree / "b").chmod(0o755)


@pytest.mark.parametrize("flag", [False, True])
def test_what_is_no_file_list_is_not_overwritten(tree, tmp_path, flag):
    """A table of Common Voice lies where a list would go; audio is no place for one either."""
    table = tmp_path / "train.tsv"
    table.write_text("client_id\tpath\tsentence\nx\ta.mp3\thello\n")
    out = [str(tmp_path / "lists.tsv"), "--valid_percent", "0.5", "--valid_out", str(table)] if flag else [str(table)]
    with pytest.raises(ConfigError, match=r"train.tsv: is there and is no file list"):
        generate_filelist.main([str(tree), *out])
    assert table.read_text().startswith("client_id")
    with pytest.raises(ConfigError, match=r"x.flac: the name of a file list ends in .tsv"):
        generate_filelist.main([str(tree), str(tmp_path / "x.flac")])
    generate_filelist.main([str(tree), str(tmp_path / "own.tsv")])
    generate_filelist.main([str(tree), str(tmp_path / "own.tsv")])  # a list may be made anew
