"""Samples of a dataset: joined neighbours, trimmed silence, segments, and the order of all that."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from common.data.audio import normalize
from common.data.dataset import SpeechDataset, Waveforms, check_frames, frames_needed, trim_silence
from common.data.manifest import read_manifest
from common.data.segment import RandomSegment
from common.data.selection import join_neighbours
from common.errors import DataError

RATE = 16000


@pytest.fixture
def manifest(tmp_path):
    """Six utterances of noise of two speakers."""
    rng = np.random.default_rng(0)
    lines = [str(tmp_path)]
    for number, length in enumerate((3000, 2000, 5000, 4000, 2500, 1000)):
        path = f"s{number // 3}/{number}.wav"
        (tmp_path / path).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / path, rng.uniform(-0.5, 0.5, length).astype(np.float32), RATE, subtype="FLOAT")
        lines.append(f"{path}\t{length}")
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    return read_manifest(tmp_path / "train.tsv")


def waves(manifest):
    return [soundfile.read(manifest[place].clip.path, dtype="float32")[0] for place in range(len(manifest))]


@pytest.mark.parametrize("normalized", [False, True])
def test_joined_neighbours_are_their_recordings_one_after_the_other(manifest, normalized):
    firsts = join_neighbours(manifest, 8000)
    dataset = SpeechDataset(manifest, Waveforms(RATE, normalized), seed=1, firsts=firsts)
    whole = [np.concatenate(waves(manifest)[begin:end]) for begin, end in zip(firsts, firsts[1:], strict=False)]
    assert dataset.num_samples.tolist() == [5000, 5000, 7500]
    assert len(dataset) == 3
    for place, wave in enumerate(whole):
        expected = normalize(wave) if normalized else wave
        np.testing.assert_array_equal(dataset.sample(place, longest=8000, epoch_pass=1).audio_S, expected)
        piece = dataset.sample(place, longest=4000, epoch_pass=1).audio_S
        starts = [start for start in range(len(wave) - 3999) if np.array_equal(expected[start : start + 4000], piece)]
        assert len(starts) == 1


def test_silence_is_cut_off_and_the_level_inside_stays():
    tone = 0.3 * np.sin(np.arange(RATE) * 0.3).astype(np.float32)
    wave = np.concatenate((np.zeros(20_000, np.float32), tone, np.zeros(30_000, np.float32)))
    trimmed = trim_silence(wave)
    assert len(tone) <= len(trimmed) <= len(tone) + 2 * 2048
    start = int(np.flatnonzero(wave == trimmed[np.flatnonzero(trimmed)[0]])[0]) - int(np.flatnonzero(trimmed)[0])
    np.testing.assert_array_equal(wave[start : start + len(trimmed)], trimmed)
    quiet = 1e-4 * np.sin(np.arange(RATE) * 0.3).astype(np.float32)  # 70 dB below the tone
    assert len(trim_silence(np.concatenate((quiet, tone)))) < len(tone) + 2 * 2048
    for silent in (np.zeros(9000, np.float32), np.full(100, 0.1, np.float32)):
        np.testing.assert_array_equal(trim_silence(silent), silent)


@pytest.mark.parametrize("longest", [10_000, 1500])
def test_waveforms_are_trimmed_then_cut_then_normalised_then_cropped(longest):
    """A second reading of the rule, with its own steps on the whole recording."""
    rng = np.random.default_rng(0)
    wave = np.concatenate((np.zeros(9000), rng.uniform(-1, 1, 40_000), np.zeros(9000))).astype(np.float32)
    form = Waveforms(RATE, normalize=True, trim=True, segment=RandomSegment(0.25))
    made = form.make(lambda start, frames: wave[start : start + frames], len(wave), longest, (5, 1, 7))
    inner = trim_silence(wave)
    assert len(made) == min(longest, 4000)
    centred = (made - made.mean()).astype(np.float64)
    place = int(np.argmax(np.correlate(inner, centred)))  # where the piece lies: noise is like itself only there
    explained = []
    for start in range(max(0, place + len(made) - 4000), place + 1):  # where its segment may have begun
        segment = inner[start : start + 4000].astype(np.float64)
        if len(segment) == 4000:
            scaled = (inner[place : place + len(made)] - segment.mean()) / np.sqrt(segment.var() + 1e-5)
            explained.append(np.abs(scaled - made).max() < 1e-5)
    assert sum(explained) == 1


def test_a_short_recording_is_filled_with_zeros_only_up_to_its_segment():
    wave = np.full(3000, 0.5, np.float32)

    def make(longest: int, pad: bool) -> np.ndarray:
        form = Waveforms(RATE, normalize=False, segment=RandomSegment(0.25, pad=pad))
        return form.make(lambda start, frames: wave[start : start + frames], len(wave), longest, (1, 1, 1))

    assert make(9000, pad=False).tolist() == wave.tolist()
    assert make(9000, pad=True).tolist() == wave.tolist() + [0.0] * 1000
    assert make(3500, pad=True).tolist() == wave.tolist() + [0.0] * 500
    assert Waveforms(RATE, False, segment=RandomSegment(0.25, pad=True)).planned(np.array([3000, 5000])).tolist() == [
        4000,
        4000,
    ]


def test_pieces_differ_between_passes_and_utterances_and_not_between_calls(manifest):
    dataset = SpeechDataset(manifest, Waveforms(RATE, False, segment=RandomSegment(0.05)), seed=1)

    def pieces(epoch_pass: int) -> list[bytes]:
        return [dataset.sample(place, longest=9000, epoch_pass=epoch_pass).audio_S.tobytes() for place in range(6)]

    assert pieces(1) == pieces(1)
    assert not set(pieces(1)) & set(pieces(2))


def test_only_what_is_needed_is_read(monkeypatch, manifest):
    asked = []

    def read(clip, **options):
        asked.append((options["start"], options["frames"]))
        return np.zeros(options["frames"], np.float32)

    monkeypatch.setattr("common.data.dataset.read_audio", read)
    firsts = join_neighbours(manifest, 10_000)
    dataset = SpeechDataset(manifest, Waveforms(RATE, False), seed=1, firsts=firsts)
    assert len(dataset.sample(0, longest=100, epoch_pass=1).audio_S) == 100
    assert sum(frames for _, frames in asked) == 100


def test_kinds_that_were_converted_come_with_the_sample(tmp_path):
    for name, rate, channels in (("a", 8000, 1), ("b", 16000, 2), ("c", 16000, 1)):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros((rate, channels)), rate)
    (tmp_path / "l.tsv").write_text(f"{tmp_path}\na.wav\t16000\nb.wav\t16000\nc.wav\t16000\n")
    dataset = SpeechDataset(read_manifest(tmp_path / "l.tsv"), Waveforms(RATE, False), seed=1)
    kinds = [dataset.sample(place, longest=16000, epoch_pass=1).converted for place in range(3)]
    assert kinds == [("8 kHz mono",), ("16 kHz stereo",), ()]


def test_samples_without_a_frame_are_refused_unless_they_are_joined(tmp_path):
    (tmp_path / "l.tsv").write_text(f"{tmp_path}\na.wav\t400\nb.wav\t399\nc.wav\t1\n")
    manifest = read_manifest(tmp_path / "l.tsv")
    form = Waveforms(RATE, False)

    def num_frames(samples):
        return (samples - 400) // 320 + 1

    with pytest.raises(DataError, match=r"l.tsv:3: .*b.wav has 399 samples, too short for one frame \(2 such"):
        check_frames(SpeechDataset(manifest, form, seed=1), num_frames)
    check_frames(SpeechDataset(manifest, form, seed=1, firsts=join_neighbours(manifest, 800)), num_frames)
    check_frames(SpeechDataset(manifest, form, seed=1, firsts=np.array([0, 1, 3])), num_frames)


@pytest.mark.parametrize(("labels", "frames"), [([], 0), ([5], 1), ([5, 6], 2), ([5, 5], 3), ([5, 5, 5, 6], 6)])
def test_ctc_needs_a_frame_per_symbol_and_one_between_equal_ones(labels, frames):
    assert frames_needed(labels) == frames
