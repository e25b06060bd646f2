"""Audio files: good ones give finite samples, all others one clear error."""

# SPDX-License-Identifier: Apache-2.0
import os

import numpy as np
import pytest
import soundfile

from common.data import audio
from common.data.audio import normalize, read_audio
from common.errors import DataError

RATE = 16000
ODD_BUT_GOOD = {
    "-dash.flac",
    "UPPER.FLAC",
    "clip_100ms.flac",
    "clip_10ms.flac",
    "clip_1_sample.flac",
    "clip_30ms.flac",
    "clip_399_samples.flac",
    "clip_400_samples.flac",
    "clipped.flac",
    "constant.flac",
    "dc_offset.flac",
    "flac_named.wav",
    "float32.wav",
    "float32_above_one.wav",
    "float64.wav",
    "it's; [odd] #1 & 100%.flac",
    "junk_after_data.wav",
    "long_3min.flac",
    "name with spaces.flac",
    "no_extension",
    "noise_1s.wav",
    "näme_日本語_имя.flac",
    "room_noise_4s.wav",
    "silence_5s.flac",
    "silence_then_speech.flac",
    "two.dots.in.name.flac",
    "very_quiet.flac",
    "wav_named.flac",
}


def wave(samples=2000, seed=0):
    return np.random.default_rng(seed).uniform(-0.9, 0.9, samples).astype(np.float32)


def refused(path, expected, **arguments):
    with pytest.raises(DataError) as caught:
        read_audio(path, sample_rate=RATE, where="train.tsv:17", **arguments)
    message = str(caught.value)
    assert message.startswith(f"train.tsv:17: {path}: ")
    assert expected in message
    assert ";" in message
    assert "\n" not in message


def tried(path):
    """Samples and no error, or no samples and the message."""
    try:
        return read_audio(path, sample_rate=RATE, where="odd.tsv:2"), ""
    except DataError as error:
        return None, str(error)


def test_every_odd_file_gives_finite_samples_or_one_data_error(shared):
    files = [path for path in shared("speech/odd").iterdir() if path.is_file()]
    assert len(files) > 60
    good = set()
    for path in files:
        samples, error = tried(path)
        if samples is None:
            assert error.startswith(f"odd.tsv:2: {path}: ")
            assert "\n" not in error
            continue
        good.add(path.name)
        assert samples.dtype == np.float32
        assert len(samples)
        assert np.isfinite(samples).all()
        assert np.isfinite(normalize(samples)).all()
    assert {name for name in good if not name.startswith("xxx")} == ODD_BUT_GOOD


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [
        ("a.wav", "PCM_16", 2**-15),
        ("a.wav", "PCM_24", 2**-23),
        ("a.wav", "PCM_32", 1e-7),
        ("a.wav", "PCM_U8", 2**-7),
        ("a.wav", "FLOAT", 0),
        ("a.wav", "DOUBLE", 0),
        ("a.flac", "PCM_16", 2**-15),
        ("a.flac", "PCM_24", 2**-23),
    ],
)
def test_all_sample_types_are_read_as_float32(tmp_path, name, subtype, tolerance):
    written = wave()
    soundfile.write(tmp_path / name, written, RATE, subtype=subtype)
    samples = read_audio(tmp_path / name, sample_rate=RATE, num_samples=2000)
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, written, atol=tolerance, rtol=0)


@pytest.mark.parametrize("container", ["WAV", "WAVEX", "RF64", "FLAC"])
def test_the_content_decides_and_not_the_name(tmp_path, container):
    for name in ("a.raw", "a.mp3", "a"):
        with (tmp_path / name).open("wb") as file:
            soundfile.write(file, wave(), RATE, format=container, subtype="PCM_16")
        assert len(read_audio(tmp_path / name, sample_rate=RATE)) == 2000


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_a_piece_equals_that_piece_of_the_whole(tmp_path, name):
    soundfile.write(tmp_path / name, wave(50_000), RATE)
    whole = read_audio(tmp_path / name, sample_rate=RATE)
    for start, frames in ((0, 1), (1, 400), (12_345, 20_000), (49_999, 1), (4096, -1), (0, 50_000)):
        piece = read_audio(tmp_path / name, sample_rate=RATE, start=start, frames=frames)
        stop = 50_000 if frames < 0 else start + frames
        np.testing.assert_array_equal(piece, whole[start:stop])
    refused(tmp_path / name, "samples 49000 to 51000 of 50000", start=49_000, frames=2000)


def test_only_the_piece_is_read(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", wave(50_000), RATE)
    sizes = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda file, n, **k: sizes.append(n) or read(file, n, **k))
    read_audio(tmp_path / "a.wav", sample_rate=RATE, start=30_000, frames=500)
    assert sizes == [500]


def test_long_files_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "BLOCK", 300)
    soundfile.write(tmp_path / "a.wav", wave(), RATE, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", sample_rate=RATE), wave())


def test_missing_empty_and_foreign_files_are_refused(tmp_path):
    refused(tmp_path / "missing.wav", "no such file")
    refused(tmp_path, "not a regular file")
    refused(tmp_path / ("x" * 300), "cannot be read")
    (tmp_path / "empty.flac").touch()
    refused(tmp_path / "empty.flac", "zero bytes")
    (tmp_path / "page.wav").write_text("<html>404</html>" * 20)
    refused(tmp_path / "page.wav", "not audio")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")


def test_wrong_rate_channels_container_and_length_are_refused_with_a_remedy(tmp_path):
    soundfile.write(tmp_path / "rate.wav", wave(), 8000)
    refused(tmp_path / "rate.wav", "8000 Hz instead of 16000 Hz; convert it")
    soundfile.write(tmp_path / "stereo.wav", np.stack((wave(), wave()), 1), RATE)
    refused(tmp_path / "stereo.wav", "2 channels instead of 1; convert it")
    with (tmp_path / "aiff.wav").open("wb") as file:
        soundfile.write(file, wave(), RATE, format="AIFF")
    refused(tmp_path / "aiff.wav", "AIFF audio, only WAV and FLAC are read; convert it")
    soundfile.write(tmp_path / "length.flac", wave(), RATE)
    refused(
        tmp_path / "length.flac",
        "has 2000 samples, but 1999 are listed; the file has changed since: regenerate the list with utils/",
        num_samples=1999,
    )


def test_truncated_and_damaged_files_are_refused(tmp_path):
    for name in ("a.wav", "a.flac"):
        soundfile.write(tmp_path / name, wave(40_000), RATE)
        content = (tmp_path / name).read_bytes()
        for share in (0.001, 0.3, 0.7, 0.99):
            (tmp_path / name).write_bytes(content[: int(len(content) * share)])
            refused(tmp_path / name, "", num_samples=40_000)
            refused(tmp_path / name, "")
    (tmp_path / "a.flac").write_bytes(content[: len(content) // 2] + bytes(3000) + content[len(content) // 2 + 3000 :])
    refused(tmp_path / "a.flac", "damaged", num_samples=40_000)


def test_a_wav_from_a_pipe_has_no_true_length_in_its_header_and_is_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", wave(), RATE, subtype="PCM_16")
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(content)
    assert len(read_audio(tmp_path / "a.wav", sample_rate=RATE)) == 2000


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path, bad):
    samples = wave()
    samples[1234] = bad
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    refused(tmp_path / "a.wav", "NaN or infinite")


def test_normalizing_follows_the_formula_in_float64():
    for samples in (wave() * 3 + 0.3, np.zeros(500, np.float32), wave() * 1e-4, wave() * 1e30):
        exact = samples.astype(np.float64)
        expected = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
        assert normalize(samples).dtype == np.float32
        np.testing.assert_allclose(normalize(samples), expected, rtol=1e-6, atol=1e-6)


def test_normalizing_agrees_with_the_original(shared):
    torch = pytest.importorskip("torch")
    case = torch.load(shared("golden/large_tiny/features.pt"), weights_only=True)["padded"]
    for raw, source, length in zip(case["raw_source"], case["source"], case["lengths"].tolist(), strict=True):
        np.testing.assert_allclose(normalize(raw[:length].numpy()), source[:length].numpy(), atol=2e-6)
