"""Whole trainings on what users have: mixed audio, bad files, JSON lists, several lists, shards, streams, languages."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT
from tiny import MODEL_FLAGS, SMALL, corpus

import train
from common import checkpoint
from common.errors import CheckpointError, ConfigError, DataError
from utils import convert_manifest, generate_dictionary, generate_filelist, libri_labels, make_shards

MULTI = ROOT.parent / "shared" / "speech" / "multi"
QUICK = ("--num_workers", "0", "--device", "cpu", "--log_frequency", "1", "--validate_frequency", "100")
OBJECTIVE = ("--num_negatives", "10", "--mask_length", "3", "--lr", "0.002")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"), number=14)


def pretrain(data: Path, output: Path, *more: str, updates: int = 3) -> dict[str, Any]:
    """Pre-train and give the last checkpoint."""
    command = ["pretrain", "--data", str(data), "--output_dir", str(output), *MODEL_FLAGS, *QUICK, *OBJECTIVE]
    if "--bucketing_batch_size" not in more:
        command += ["--max_tokens", "40000"]
    train.main([*command, "--max_update", str(updates), *more])
    return checkpoint.load(checkpoint.update_path(output, updates))


def finetune(data: Path, output: Path, w2v: Path, *more: str, updates: int = 3) -> dict[str, Any]:
    """Fine-tune and give the last checkpoint."""
    command = ["finetune", "--data", str(data), "--output_dir", str(output), "--w2v_path", str(w2v), *QUICK]
    command += ["--mask_prob", "0.2", "--mask_length", "2", "--max_tokens", "60000", "--max_update", str(updates)]
    train.main([*command, *more])
    return checkpoint.load(checkpoint.update_path(output, updates))


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("pretrained")
    pretrain(data, output)
    return checkpoint.update_path(output, 3)


def weights(state: dict[str, Any]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in state["model"].values()])


def logged(output: Path, name: str) -> list[float]:
    """A number of the training lines of the log."""
    lines = [json.loads(line.removeprefix("DLLL ")) for line in (output / "nvlog.json").read_text().splitlines()]
    found = [line["data"] for line in lines if line["type"] == "LOG" and isinstance(line["step"], list)]
    return [values[f"train_{name}"] for values in found if f"train_{name}" in values]


# ---- Any audio -------------------------------------------------------------------------------------------------------


def test_the_same_speech_at_another_rate_in_stereo_or_as_shards_trains_alike(data, tmp_path, capfd):
    """Every file doubled in rate and channels: after resampling it is, up to the filter, what it was."""
    plain = pretrain(data, tmp_path / "plain")
    double = tmp_path / "double"
    shutil.copytree(data, double)
    for file in (double / "audio").iterdir():
        wave, _ = soundfile.read(file)
        spectrum = np.fft.rfft(wave)
        wide = np.fft.irfft(np.pad(spectrum, (0, len(wave) + 1 - len(spectrum))), 2 * len(wave)) * 2
        soundfile.write(file, np.stack((wide, wide), 1), 32000, subtype="FLOAT")
    for subset in ("train", "valid"):
        lines = (double / f"{subset}.tsv").read_text().splitlines()
        (double / f"{subset}.tsv").write_text("\n".join([str(double / "audio"), *lines[1:]]) + "\n")
    converted = pretrain(double, tmp_path / "converted")
    assert logged(tmp_path / "converted", "loss") == pytest.approx(logged(tmp_path / "plain", "loss"), rel=0.05)
    assert not torch.equal(weights(plain), weights(converted))
    assert "32 kHz stereo -> 16 kHz mono" in capfd.readouterr().out


def test_bad_files_do_not_end_a_run_that_may_leave_them_out(data, tmp_path):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(data, spoilt)
    lines = (spoilt / "train.tsv").read_text().splitlines()
    (spoilt / "train.tsv").write_text("\n".join([str(spoilt / "audio"), *lines[1:]]) + "\n")  # valid keeps the whole
    for name in ("3.wav", "5.wav"):
        (spoilt / "audio" / name).write_bytes(b"RIFF and then nothing")
    with pytest.raises(DataError, match=r"train.tsv:[57]: .*not audio, truncated or damaged"):
        pretrain(spoilt, tmp_path / "error", updates=8)
    output = tmp_path / "skip"
    pretrain(spoilt, output, "--on_bad_file", "skip", "--max_bad_share", "0.2", updates=8)
    assert len((output / "bad_files.txt").read_text().splitlines()) == 2
    with pytest.raises(DataError, match="2 of 14 files cannot be used, more than --max_bad_share 0.1 allows"):
        pretrain(spoilt, tmp_path / "share", "--on_bad_file", "skip", "--max_bad_share", "0.1", updates=8)


def test_another_sample_rate_than_the_checkpoints_is_refused(data, pretrained, tmp_path):
    """A model for telephone speech, from the same files; its lists count at its rate."""
    with pytest.raises(DataError, match=r"train.tsv:\d+: .* lists count at the model's 8000 Hz"):
        pretrain(data, tmp_path / "lists", "--sample_rate", "8000")
    telephone = tmp_path / "data"
    telephone.mkdir()
    for subset in ("train", "valid"):
        root, *lines = (data / f"{subset}.tsv").read_text().splitlines()
        halved = [f"{path}\t{-(-int(samples) // 2)}" for path, samples in (line.split("\t") for line in lines)]
        (telephone / f"{subset}.tsv").write_text("\n".join([root, *halved]) + "\n")
    state = pretrain(telephone, tmp_path / "telephone", "--sample_rate", "8000", updates=1)
    assert state["sample_rate"] == 8000
    with pytest.raises(CheckpointError, match="sample_rate"):
        pretrain(telephone, tmp_path / "telephone", "--sample_rate", "16000", "--resume", updates=2)


CHOICES = {
    "durations": ("--min_duration", "0.55", "--max_duration", "0.95"),
    "segments": ("--random_segment_sec", "0.5", "--random_segment_prob", "0.7", "--random_segment_pad"),
    "loud segments": ("--random_segment_sec", "0.4", "--random_segment_min_rms_db", "-30"),
    "joined": ("--join_short", "1.9"),
    "trimmed": ("--trim_silence", "--max_sample_size", "10000"),
    "semi-sorted": ("--semi_sorted", "0.3", "--enable_padding"),
    "buckets": ("--enable_padding", "--num_batch_buckets", "3", "--bucketing_type", "equal_width"),
    "rows of buckets": (
        *("--enable_padding", "--num_batch_buckets", "2", "--bucketing_batch_size", "1", "--bucketing_weights", "1"),
        *("2", "--bucketing_strategy", "synced_randomized"),
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_of_lengths_and_batches_trains_and_resumes_bit_for_bit(data, tmp_path, name):
    whole = pretrain(data, tmp_path / "whole", *CHOICES[name], updates=4)
    more = (*CHOICES[name], "--save_interval_updates", "2", "--keep_milestones", "2")
    train_to_end = pretrain(data, tmp_path / "parts", *more, updates=4)
    for file in (tmp_path / "parts").glob("*.pt"):
        if file != checkpoint.update_path(tmp_path / "parts", 2):
            file.unlink()
    resumed = pretrain(data, tmp_path / "parts", *more, "--resume", updates=4)
    assert torch.equal(weights(whole), weights(train_to_end))
    assert torch.equal(weights(whole), weights(resumed))


def test_a_segment_without_a_frame_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="--random_segment_sec 0.02: gives no frame"):
        pretrain(data, tmp_path / "out", "--random_segment_sec", "0.02")


def test_padding_to_the_end_of_a_bucket_changes_no_loss(data, tmp_path):
    """One bucket: the same sub-batches as without, all padded to the longest utterance."""
    plain = ("--enable_padding", "--dropout", "0", "--attention_dropout", "0")
    rows = ("--bucketing_batch_size", "2", "--num_batch_buckets", "1")
    pretrain(data, tmp_path / "plain", *plain, "--batch_size", "2", "--required_batch_size_multiple", "1")
    pretrain(data, tmp_path / "bucket", *plain, *rows)
    assert logged(tmp_path / "bucket", "loss") == pytest.approx(logged(tmp_path / "plain", "loss"), rel=1e-4)
    assert logged(tmp_path / "bucket", "nsamples") == logged(tmp_path / "plain", "nsamples")


# ---- Lists -----------------------------------------------------------------------------------------------------------


def test_json_manifests_give_the_very_same_training(data, pretrained, tmp_path):
    lists = tmp_path / "json"
    lists.mkdir()
    shutil.copy(data / "dict.ltr.txt", lists)
    for subset in ("train", "valid"):
        convert_manifest.main([str(data / f"{subset}.tsv"), str(lists / f"{subset}.json")])
    expected = weights(finetune(data, tmp_path / "tsv", pretrained))
    found = weights(finetune(lists, tmp_path / "out", pretrained, "--manifest_format", "json"))
    assert torch.equal(expected, found)


def test_several_lists_train_together(data, tmp_path):
    lists = tmp_path / "lists"
    shutil.copytree(data, lists)
    lines = (data / "train.tsv").read_text().splitlines()
    for name, part in (("a", lines[1:9]), ("b", lines[9:])):
        (lists / f"{name}.tsv").write_text("\n".join([lines[0], *part]) + "\n")
    for number, more in enumerate((["--dataset_weights", "1,0.3"], ["--dataset_temperature", "2"], [])):
        pretrain(lists, tmp_path / f"out{number}", "--train_subset", "a,b", *more)


# ---- Shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(data, tmp_path_factory) -> Path:
    """The training list in 3 shards, and the lists that a training needs besides."""
    folder = tmp_path_factory.mktemp("shards")
    make_shards.main([str(data / "train.tsv"), str(folder), "--num_shards", "3"])
    for name in ("valid.tsv", "valid.ltr", "dict.ltr.txt"):
        shutil.copy(data / name, folder)
    return folder


@pytest.mark.parametrize("mode", ["pretrain", "finetune"])
def test_indexed_shards_train_bit_for_bit_like_files(data, shards, pretrained, tmp_path, mode):
    def run(folder: Path, output: str, *more: str) -> torch.Tensor:
        if mode == "pretrain":
            return weights(pretrain(folder, tmp_path / output, *more))
        return weights(finetune(folder, tmp_path / output, pretrained, *more))

    expected = run(data, "files")
    assert torch.equal(expected, run(shards, "list"))  # the list of the set names clips in shards
    pattern = str(shards / "train-{000000..000002}.tar")
    assert torch.equal(expected, run(shards, "pattern", "--is_tarred", "--tarred_filepaths", pattern))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_stream_trains_and_goes_on_bit_for_bit(shards, pretrained, tmp_path, workers):
    pytest.importorskip("webdataset")
    pattern = str(shards / "train-{000000..000002}.tar")
    stream = ("--streaming", "--tarred_filepaths", pattern, "--epoch_size", "3", "--shuffle_n", "4")
    more = (*stream, "--num_workers", workers, "--save_interval_updates", "2", "--keep_milestones", "2")
    whole = finetune(shards, tmp_path / "whole", pretrained, *more, updates=5)
    output = tmp_path / "parts"
    finetune(shards, output, pretrained, *more, updates=5)
    for file in output.glob("*.pt"):
        if file != checkpoint.update_path(output, 2):
            file.unlink()
    resumed = finetune(shards, output, pretrained, *more, "--resume", updates=5)
    assert torch.equal(weights(whole), weights(resumed))
    assert whole["loader"] == resumed["loader"]


def test_a_list_of_another_shard_or_of_none_is_refused(data, shards, tmp_path):
    first, second = (str(shards / f"train-00000{number}") for number in range(2))
    one = ("--is_tarred", "--tarred_filepaths", f"{first}.tar")
    for manifests, message in (
        (f"{second}.tsv", r"train-000001.tar is no clip of the shard .*train-000000.tar"),
        (str(data / "train.tsv"), r"0.wav is no clip of the shard"),
    ):
        with pytest.raises(DataError, match=message):
            pretrain(shards, tmp_path / "out", *one, "--shard_manifests", manifests)
    with pytest.raises(ConfigError, match="2 lists for 1 shards"):
        pretrain(shards, tmp_path / "out", *one, "--shard_manifests", f"{first}.tsv,{second}.tsv")
    with pytest.raises(DataError, match="--tarred_filepaths: .*nowhere.tar: no such file"):
        pretrain(shards, tmp_path / "out", "--is_tarred", "--tarred_filepaths", str(shards / "nowhere.tar"))


def test_shards_of_others_are_trained_on_with_an_index_and_without(data, tmp_path):
    """A tar of FLAC files as any program writes it."""
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "x-0.tar", "w") as tar:
        for file in sorted((data / "audio").iterdir()):
            content = file.read_bytes()
            entry = tarfile.TarInfo(f"{file.stem}.wav")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    shutil.copy(data / "valid.tsv", folder)
    make_shards.main(["--index", str(folder / "x-0.tar"), "--output", str(folder / "train.tsv")])
    pretrain(folder, tmp_path / "indexed")
    pytest.importorskip("webdataset")
    more = ("--streaming", "--tarred_filepaths", str(folder / "x-0.tar"), "--epoch_size", "2")
    pretrain(folder, tmp_path / "stream", *more)


# ---- Languages -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not MULTI.exists(), reason="needs the reference speech")
def test_six_languages_in_their_own_letters_train(tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    languages = sorted(folder.name for folder in MULTI.iterdir() if folder.is_dir())
    assert len(languages) == 6
    for language in languages:
        generate_filelist.main([str(MULTI / language), str(lists / f"{language}.tsv")])
        libri_labels.main([str(lists / f"{language}.tsv"), "--output_dir", str(lists), "--output_name", language])
    for kind in ("tsv", "ltr", "wrd"):
        shutil.copy(lists / f"{languages[0]}.{kind}", lists / f"valid.{kind}")
    generate_dictionary.main([*(str(lists / f"{language}.ltr") for language in languages), str(lists / "dict.ltr.txt")])
    symbols = {line.split()[0] for line in (lists / "dict.ltr.txt").read_text(encoding="utf-8").splitlines()}
    assert any(symbol > "\u4e00" for symbol in symbols)
    together = ("--train_subset", ",".join(languages), "--dataset_temperature", "2", "--max_tokens", "300000")
    pretrain(lists, tmp_path / "pretrain", *together, updates=2)
    start = checkpoint.update_path(tmp_path / "pretrain", 2)
    state = finetune(lists, tmp_path / "finetune", start, *together, updates=2)
    assert set(state["labels"]) >= symbols
    assert torch.isfinite(weights(state)).all()


# ---- The README ------------------------------------------------------------------------------------------------------


def mixed_folder(folder: Path) -> None:
    """Forty recordings of several kinds, and what lies around in such folders."""
    rng = np.random.default_rng(0)
    kinds = [("flac", 16000, 1), ("wav", 44100, 2), ("mp3", 44100, 1), ("ogg", 22050, 1), ("WAV", 8000, 1)]
    for number in range(40):
        ending, rate, channels = kinds[number % len(kinds)]
        place = folder / f"speaker {number // 10}"
        place.mkdir(parents=True, exist_ok=True)
        seconds = rng.uniform(2.1, 2.6)
        time = np.arange(int(seconds * rate)) / rate
        wave = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 900) * time) + 0.05 * rng.standard_normal(len(time))
        soundfile.write(place / f"clip {number}.{ending}", np.stack([wave] * channels, 1), rate)
    (folder / "notes.txt").write_text("no audio")
    (folder / "broken.flac").write_bytes(b"nothing of the kind")


def test_the_three_commands_of_the_readme_lead_from_a_folder_to_a_training(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("**Any folder of audio**", 1)[1].split("```")[1]
    commands = block.strip().splitlines()
    assert len(commands) == 3
    audio = tmp_path / "audio"
    mixed_folder(audio)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    environment |= SMALL | {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}", "OUTPUT_DIR": "out"}
    for name in ("TRAIN_SUBSET", "VALID_SUBSET", "MIN_SAMPLE_SIZE"):
        del environment[name]  # as the README and the recipe say
    said = []
    for command in commands:
        command = command.replace("/my/audio", str(audio))
        for place in ("utils/", "scripts/"):
            command = command.replace(f" {place}", f" {ROOT}/{place}")
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        said.append(done.stdout + done.stderr)
    assert "8 files 44.1 kHz stereo -> 16 kHz mono" in said[0]
    assert "broken.flac" in said[0]
    assert "44.1 kHz stereo -> 16 kHz mono" in said[2]
    assert checkpoint.update_path(tmp_path / "out", 2).exists()
