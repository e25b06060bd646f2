"""The data scripts, run as users run them, on small trees."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from utils import filelists

FULL_960 = ("train-clean-100", "train-clean-360", "train-other-500")


def bash(script, *arguments, cwd, **variables):
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **variables}
    command = [os.environ.get("TEST_BASH", "bash"), str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


@pytest.fixture
def librispeech(shared, tmp_path):
    """A tree with the names of LibriSpeech, in a folder with a space, one chapter of real speech in each subset."""
    root = tmp_path / "my data" / "LibriSpeech"
    chapter = next(path.parent for path in sorted(shared("speech/digits/dev").rglob("*.trans.txt")))
    for subset in (*FULL_960, "dev-other"):
        folder = root / subset / chapter.parent.name / chapter.name
        folder.mkdir(parents=True)
        for path in sorted(chapter.iterdir()):
            if path.name.endswith(("0000.flac", "0001.flac", ".trans.txt")):
                shutil.copyfile(path, folder / path.name)
    (root / "notes").mkdir()
    return root


def test_file_lists_of_a_librispeech_tree_are_made_and_joined(librispeech, tmp_path):
    lists = tmp_path / "the lists"
    result = bash("generate_filelists.sh", librispeech, lists, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    names = {path.name for path in lists.iterdir()}
    subsets = (*FULL_960, "dev-other", "train-full-960")
    assert names == {f"{subset}.{kind}" for subset in subsets for kind in ("tsv", "ltr", "wrd")} | {"dict.ltr.txt"}
    full = filelists.read_filelist(lists / "train-full-960.tsv")
    assert len(full.paths) == 6
    assert all((full.root / path).is_file() for path in full.paths)
    assert (lists / "train-full-960.ltr").read_text() == "".join((lists / f"{s}.ltr").read_text() for s in FULL_960)
    words = (lists / "train-full-960.wrd").read_text().split()
    assert f"| {len(words)}\n" in (lists / "dict.ltr.txt").read_text()
    assert {path.name for path in librispeech.iterdir()} == {*FULL_960, "dev-other", "notes"}


def test_variables_serve_as_well_as_arguments_and_other_training_sets_give_the_dictionary(librispeech, tmp_path):
    shutil.rmtree(librispeech / "train-clean-360")
    for path in (librispeech / "dev-other").rglob("*.trans.txt"):
        path.unlink()
    result = bash(
        "generate_filelists.sh", cwd=tmp_path, DATASET_DIR=str(librispeech), FILELISTS_DIR=str(tmp_path / "l")
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "l" / "train-full-960.tsv").exists()
    assert (tmp_path / "l" / "dict.ltr.txt").is_file()
    assert (tmp_path / "l" / "dev-other.tsv").is_file()
    assert not (tmp_path / "l" / "dev-other.ltr").exists()
    assert "dev-other: no transcripts" in result.stderr


def test_a_fault_in_the_data_stops_the_script(librispeech, tmp_path):
    next((librispeech / "dev-other").rglob("*0001.flac")).write_bytes(b"")
    result = bash("generate_filelists.sh", librispeech, tmp_path / "l", cwd=tmp_path)
    assert result.returncode == 1
    assert "cannot be listed" in result.stderr
    skipped = bash("generate_filelists.sh", librispeech, tmp_path / "l", cwd=tmp_path, SKIP_BAD="1")
    assert skipped.returncode == 0, skipped.stderr
    assert len(filelists.read_filelist(tmp_path / "l" / "dev-other.tsv").paths) == 1


def test_an_empty_or_absent_dataset_is_a_usage_error(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        result = bash("generate_filelists.sh", folder, tmp_path / "l", cwd=tmp_path)
        assert result.returncode == 2
        assert "DATASET_DIR=" in result.stderr
    assert list(tmp_path.iterdir()) == []
    for wrong in (["--x"], ["a", "--x"], ["a", "b", "c"]):
        assert bash("generate_filelists.sh", *wrong, cwd=tmp_path).returncode == 2


def test_nothing_is_written_below_a_source_unless_asked(librispeech, tmp_path):
    refused = bash("generate_filelists.sh", librispeech, cwd=tmp_path)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert "second argument" in refused.stderr
    assert "FILELISTS_DIR" in refused.stderr
    assert not list(tmp_path.rglob("*.tsv"))
    (tmp_path / "file").touch()
    unwritable = bash("generate_filelists.sh", librispeech, tmp_path / "file" / "x", cwd=tmp_path)
    assert (unwritable.returncode, unwritable.stdout, unwritable.stderr.count("\n")) == (2, "", 1)
    assert "FILELISTS_DIR=" in unwritable.stderr


def test_without_arguments_lists_go_where_recipes_look_and_that_is_said_first(librispeech, tmp_path):
    for subset in FULL_960:
        shutil.rmtree(librispeech / subset)
    result = bash("generate_filelists.sh", cwd=tmp_path, DATASET_DIR=str(librispeech))
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[0] == f"Writing lists into {librispeech}"
    assert (librispeech / "dev-other.tsv").is_file()
    named = bash("generate_filelists.sh", librispeech, cwd=tmp_path, FILELISTS_DIR=str(tmp_path / "l"))
    assert named.returncode == 0, named.stderr
    assert (tmp_path / "l" / "dev-other.tsv").is_file()


@pytest.mark.parametrize("script", ["generate_filelists.sh", "quickstart.sh"])
def test_help_prints_the_comment_at_the_head_of_the_script(script, tmp_path):
    result = bash(script, "--help", cwd=tmp_path, PYTHON="/no/such/python")
    assert (result.returncode, result.stderr) == (0, "")
    source = (ROOT / "scripts" / script).read_text().splitlines()
    assert result.stdout.splitlines()[0] == source[1].removeprefix("# ")
    assert "DRY_RUN=1" in result.stdout
    assert "SPDX" not in result.stdout
    assert '. "$(dirname' not in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["download_data.sh", "download_pretrained.sh", "generate_filelists.sh"])
def test_a_python_that_is_not_there_is_a_usage_error_that_names_the_variable(script, librispeech, tmp_path):
    arguments = {"generate_filelists.sh": [librispeech, tmp_path / "l"]}.get(script, ["to"])
    result = bash(script, *arguments, cwd=tmp_path, PYTHON="/no/such/python")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "PYTHON=/no/such/python" in result.stderr


@pytest.mark.parametrize(
    ("script", "targets"),
    [
        ("download_data.sh", ["target dir"]),
        ("download_pretrained.sh", ["target dir"]),
        ("generate_filelists.sh", ["source", "target dir"]),
    ],
)
def test_a_dry_run_prints_commands_whose_flags_exist_and_does_nothing(script, targets, tmp_path):
    result = bash(script, *targets, cwd=tmp_path, DRY_RUN="1")
    assert (result.returncode, result.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    for line in result.stdout.splitlines():
        program = next(word for word in line.split() if word.endswith(".py"))
        text = (ROOT / "utils" / program.rpartition("/")[2]).read_text()
        assert "'target dir" in line
        assert all(f'"{word}"' in text for word in line.split() if word.startswith("--"))


def test_further_options_of_the_downloads_are_passed_on(tmp_path):
    data = bash("download_data.sh", "to", "--keep_archives", cwd=tmp_path, DRY_RUN="1", SUBSETS="dev-clean dev-other")
    assert data.stdout.endswith("download_librispeech.py to --subsets dev-clean dev-other --keep_archives\n")
    files = bash("download_pretrained.sh", "to", "libri960_big", "wav2vec_vox_new", cwd=tmp_path, DRY_RUN="1")
    assert files.stdout.endswith("download_pretrained.py to libri960_big wav2vec_vox_new\n")
    names = bash("download_pretrained.sh", "--list", cwd=tmp_path)
    assert "wav2vec2_vox_960h_new.pt" in names.stdout


PROGRAMS = [path for path in sorted((ROOT / "utils").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_tool_starts_from_any_folder_and_has_help(path, tmp_path):
    result = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "options:" in result.stdout
