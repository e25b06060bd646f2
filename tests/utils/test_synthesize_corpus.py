"""The synthetic corpus: LibriSpeech's layout, intelligible levels, separate speakers, the same for the same seed."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from common.errors import ConfigError
from utils import espeak, sentences, synthesize_corpus
from utils.synthesize_corpus import Narrator, plan_speakers, trim

PROGRAM = Path(synthesize_corpus.__file__)
needs_espeak = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("espeakng_loader"), reason="espeakng-loader is not installed"
)


def make(out, *flags):
    command = [sys.executable, PROGRAM, out, "--hours", "0.01", "--dev_hours", "0.003", "--test_hours", "0.003", *flags]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """The same corpus made by one process and by three."""
    root = tmp_path_factory.mktemp("synthetic")
    for name, workers in (("one", "1"), ("three", "3")):
        result = make(root / name, "--workers", workers)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
    return root / "one", root / "three"


def transcripts(corpus):
    lines = [line for path in corpus.rglob("*.trans.txt") for line in path.read_text().splitlines()]
    return dict(line.split(" ", 1) for line in lines)


@needs_espeak
def test_clips_and_transcripts_have_librispeechs_layout(corpora):
    corpus = corpora[0]
    clips = sorted(corpus.rglob("*.flac"))
    assert {path.stem for path in clips} == set(transcripts(corpus))
    for path in clips:
        speaker, chapter, number = path.stem.split("-")
        assert path.parts[-4:-1] == (path.parts[-4], speaker, chapter)
        assert path.parts[-4] in ("train", "dev", "test")
        assert len(number) == 4
        assert (path.parent / f"{speaker}-{chapter}.trans.txt").is_file()
    listed = [line.split("|")[0].strip() for line in (corpus / "SPEAKERS.TXT").read_text().splitlines()[1:]]
    assert listed == sorted({path.parts[-3] for path in clips})


@needs_espeak
def test_clips_are_clean_16_khz_speech(corpora):
    for path in corpora[0].rglob("*.flac"):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        wave, _ = soundfile.read(path)
        assert len(wave) % 80 == 0
        assert 0.5 < len(wave) / 16000 < 4
        assert 0.15 < np.abs(wave).max() < 0.95
        level = 10 * np.log10(np.square(wave[: len(wave) // 160 * 160].reshape(-1, 160)).mean(axis=1))
        loud = np.flatnonzero(level > level.max() - 15)
        assert loud[0] * 0.01 < 0.5
        assert (len(level) - loud[-1]) * 0.01 < 0.6
        assert 10 < level.max() - np.median(level[:4]) < 60


@needs_espeak
def test_the_same_seed_gives_the_same_samples_with_any_number_of_processes(corpora):
    one, three = corpora
    names = [path.relative_to(one) for path in sorted(one.rglob("*")) if path.is_file()]
    assert names == [path.relative_to(three) for path in sorted(three.rglob("*")) if path.is_file()]
    for name in names:
        if name.suffix == ".flac":
            np.testing.assert_array_equal(soundfile.read(one / name)[0], soundfile.read(three / name)[0])
        else:
            assert (one / name).read_bytes() == (three / name).read_bytes()


@needs_espeak
def test_another_run_has_nothing_to_do_and_another_corpus_is_not_overwritten(corpora):
    record = corpora[0] / "corpus.json"
    before = record.stat().st_mtime_ns
    again = make(corpora[0])
    assert (again.returncode, record.stat().st_mtime_ns) == (0, before)
    assert "is there already" in again.stdout
    other = make(corpora[0], "--seed", "2")
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "choose another folder" in other.stderr


def test_voices_of_dev_and_test_are_in_no_other_subset():
    for seed in range(20):
        tasks = plan_speakers(Path("x"), {"train": 30.0, "dev": 1.0, "test": 1.0}, "short", seed)
        voices = {s: {task.voice for task in tasks if task.subset == s} for s in ("train", "dev", "test")}
        assert not voices["train"] & voices["dev"]
        assert not voices["train"] & voices["test"]
        assert not voices["dev"] & voices["test"]
        assert len({(task.voice, task.pitch) for task in tasks}) == len(tasks)
        assert len({task.speaker_id for task in tasks}) == len(tasks)
        assert sum(task.seconds for task in tasks) == pytest.approx(32 * 3600)


def test_sentences_are_two_to_six_words_of_a_small_vocabulary():
    rng = random.Random(3)
    drawn = [sentences.draw(rng).split() for _ in range(3000)]
    assert {len(words) for words in drawn} == {2, 3, 4, 5, 6}
    assert {word for words in drawn for word in words} == sentences.vocabulary()
    assert 60 <= len(sentences.vocabulary()) <= 100
    assert all(word.isalpha() and word.islower() for word in sentences.vocabulary())


def test_lengths_like_librispeechs_have_its_mean_and_range():
    narrator = Narrator.__new__(Narrator)
    narrator.rng = random.Random(1)
    lengths = [narrator.librispeech_length() for _ in range(20000)]
    assert np.mean(lengths) == pytest.approx(12.3, abs=0.15)
    assert 1.3 <= min(lengths) < 2
    assert 16.5 < max(lengths) <= 17


def test_noise_keeps_its_distance_and_the_peak_its_level():
    rng = np.random.default_rng(0)
    for seed in range(30):
        narrator = Narrator.__new__(Narrator)
        narrator.rng, narrator.noise = random.Random(seed), np.random.default_rng(seed)
        speech = np.where(np.arange(16000) < 12000, rng.standard_normal(16000), 0).astype(np.float32) * 0.1
        wave = narrator.record(speech)
        noise = np.square(wave[12100:]).mean()
        ratio = 10 * np.log10(np.square(wave[:12000]).mean() / noise - 1)
        assert 14 < ratio < 36
        assert 10 ** (-14 / 20) - 1e-6 <= np.abs(wave).max() <= 10 ** (-1 / 20) + 1e-6


def test_trimming_keeps_the_speech_and_no_silence():
    speech = np.sin(np.arange(22050)).astype(np.float32)
    padded = np.pad(speech, (5000, 9000))
    kept = trim(padded, 22050)
    assert 0 <= len(kept) - len(speech) <= 2 * 220


@needs_espeak
def test_long_utterances_join_sentences_to_the_wanted_length(tmp_path):
    result = make(tmp_path / "long", "--lengths", "librispeech", "--dev_hours", "0.02")
    assert result.returncode == 0, result.stderr
    seconds = [soundfile.info(path).duration for path in (tmp_path / "long").rglob("*.flac")]
    assert max(seconds) <= 17.01
    assert np.mean(seconds) > 8
    assert max(len(text.split()) for text in transcripts(tmp_path / "long").values()) > 12


@needs_espeak
def test_a_long_path_of_the_voices_is_no_obstacle(tmp_path, monkeypatch):
    library, data = espeak.check_installed()
    deep = tmp_path / ("x" * 90) / ("y" * 90) / "espeak-ng-data"
    deep.parent.mkdir(parents=True)
    deep.symlink_to(data)
    monkeypatch.setattr(espeak, "check_installed", lambda: (library, str(deep)))
    wave = espeak.Synthesizer("en-us+m1", seed=1).say("yes please", rate=170, pitch=50, pitch_range=50)
    assert len(wave) > 5000


def test_without_espeak_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ConfigError, match="pip install espeakng-loader"):
        synthesize_corpus.main([str(tmp_path / "out"), "--hours", "1"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--hours", "0"], ["--hours", "nan"], ["--hours", "1", "--workers", "0"]])
def test_values_that_make_no_corpus_are_refused(tmp_path, flags):
    with pytest.raises(ConfigError):
        synthesize_corpus.main([str(tmp_path / "out"), *flags])
