"""Audio files: good ones of any kind give the samples they hold, all others one clear error."""

# SPDX-License-Identifier: Apache-2.0
import io
import math
import os
import subprocess
import sys
import tarfile
from fractions import Fraction

import numpy as np
import pytest
import soundfile

from common.data import audio
from common.data.audio import AudioInfo, Clip, normalize, read_audio, read_info, resampled_length
from common.errors import DataError

RATE = 16000


def wave(samples=2000, seed=0):
    return np.random.default_rng(seed).uniform(-0.9, 0.9, samples).astype(np.float32)


def tones(rate, seconds, *frequencies):
    """Sines of 0.3 each, by the formula, at any rate."""
    times = np.arange(math.ceil(rate * seconds)) / rate
    return sum(0.3 * np.sin(2 * np.pi * f * times + k) for k, f in enumerate(frequencies)).astype(np.float32)


def refused(path, expected, **arguments):
    with pytest.raises(DataError) as caught:
        read_audio(path, sample_rate=RATE, where="train.tsv:17", **arguments)
    message = str(caught.value)
    assert message.startswith(f"train.tsv:17: {path}: ")
    assert expected in message
    assert ";" in message
    assert "\n" not in message


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


def test_another_length_than_listed_is_refused_with_the_reason(tmp_path):
    soundfile.write(tmp_path / "length.flac", wave(), RATE)
    refused(
        tmp_path / "length.flac",
        "has 2000 samples, but 1999 are listed; the file has changed since: regenerate the list with utils/",
        num_samples=1999,
    )
    soundfile.write(tmp_path / "cd.flac", wave(4410), 44100)
    assert len(read_audio(tmp_path / "cd.flac", sample_rate=RATE, num_samples=1600)) == 1600
    refused(
        tmp_path / "cd.flac",
        "the list counts the file's own 4410 samples at 44100 Hz; lists count at the model's 16000 Hz, 1600 here",
        num_samples=4410,
    )
    refused(tmp_path / "cd.flac", "has 1600 samples at 16000 Hz, but 1599 are listed", num_samples=1599)


@pytest.mark.parametrize("rate", [1, 999, 768_001, 1_092_676])
def test_a_rate_that_only_a_damaged_header_gives_is_refused(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", wave(), rate)
    refused(tmp_path / "a.wav", f"{rate} Hz is not within 1000 to 768000 Hz")


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


# ---- Other rates and channels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000, 96000])
def test_a_tone_is_the_same_tone_at_the_models_rate(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tones(rate, 0.5, 300, 2900), rate, subtype="FLOAT")
    samples = read_audio(tmp_path / "a.wav", sample_rate=RATE)
    assert samples.dtype == np.float32
    expected = tones(RATE, 0.6, 300, 2900)[: len(samples)]
    np.testing.assert_allclose(samples[500:-500], expected[500:-500], atol=1e-4)


def test_what_the_models_rate_cannot_hold_vanishes_and_is_not_folded_back(tmp_path):
    soundfile.write(tmp_path / "a.wav", tones(44100, 0.5, 9000, 15000), 44100, subtype="FLOAT")
    samples = read_audio(tmp_path / "a.wav", sample_rate=RATE)
    assert np.abs(samples[500:-500]).max() < 1e-4


@pytest.mark.parametrize("rate", [1000, 8000, 11025, 16000, 22050, 44100, 44099, 48000, 768_000])
def test_the_length_is_the_exact_quotient_rounded_up(tmp_path, rate):
    lengths = [1, 2, 7, 440, 441, 442, 12_345]
    exact = [math.ceil(Fraction(n * RATE, rate)) for n in lengths]
    assert [resampled_length(n, rate, RATE) for n in lengths] == exact
    assert resampled_length(np.array(lengths, np.int32), rate, RATE).tolist() == exact
    for n, expected in zip(lengths[:5], exact, strict=False):
        soundfile.write(tmp_path / "a.wav", wave(n), rate)
        assert len(read_audio(tmp_path / "a.wav", sample_rate=RATE)) == expected
        assert read_info(tmp_path / "a.wav").num_samples(RATE) == expected


def test_lengths_of_long_recordings_do_not_overflow():
    hours = np.array([2_000_000_000], np.int32)
    assert resampled_length(hours, 48000, RATE).tolist() == [-(-2_000_000_000 // 3)]


@pytest.mark.parametrize("channels", [2, 3, 6])
def test_channels_are_averaged(tmp_path, channels):
    written = np.stack([wave(3000, seed) for seed in range(channels)], 1)
    soundfile.write(tmp_path / "a.wav", written, RATE, subtype="FLOAT")
    samples = read_audio(tmp_path / "a.wav", sample_rate=RATE)
    np.testing.assert_allclose(samples, written.astype(np.float64).mean(axis=1), atol=1e-6)


def test_what_is_converted_is_told_with_its_header(tmp_path):
    told = []
    for channels, rate in ((1, RATE), (2, RATE), (1, 44100), (6, 48000)):
        soundfile.write(tmp_path / "a.wav", np.zeros((500, channels)), rate, subtype="PCM_16")
        read_audio(tmp_path / "a.wav", sample_rate=RATE, on_convert=told.append)
    assert told == [
        AudioInfo("WAV", "PCM_16", RATE, 2, 500),
        AudioInfo("WAV", "PCM_16", 44100, 1, 500),
        AudioInfo("WAV", "PCM_16", 48000, 6, 500),
    ]
    assert [info.kind for info in told] == ["16 kHz stereo", "44.1 kHz mono", "48 kHz 6 channels"]


def test_the_library_that_resamples_is_only_imported_to_resample(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros((500, 2)), RATE)
    program = (
        "import sys; from common.data.audio import read_audio; read_audio(sys.argv[1], sample_rate=16000);"
        "sys.exit(bool({'librosa', 'soxr', 'scipy', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path / "a.wav"]).returncode == 0


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 22051])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_resampled_piece_equals_that_piece_of_the_whole(tmp_path, rate, channels):
    soundfile.write(tmp_path / "a.flac", np.stack([wave(rate * 4, seed) for seed in range(channels)], 1), rate)
    whole = read_audio(tmp_path / "a.flac", sample_rate=RATE)
    assert len(whole) == 64_000
    for start, frames in ((0, 1), (0, 400), (1, 5000), (16_001, 20_000), (31_999, 1), (50_123, -1), (63_999, 1)):
        piece = read_audio(tmp_path / "a.flac", sample_rate=RATE, start=start, frames=frames)
        np.testing.assert_allclose(piece, whole[start:] if frames < 0 else whole[start : start + frames], atol=1e-4)


@pytest.mark.parametrize("container", ["WAV", "FLAC", "MP3"])
def test_only_about_the_piece_is_decoded_of_a_long_recording(tmp_path, monkeypatch, container):
    soundfile.write(tmp_path / "a", wave(44100 * 30), 44100, format=container)
    sizes = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda file, n, **k: sizes.append(n) or read(file, n, **k))
    read_audio(tmp_path / "a", sample_rate=RATE, start=16_000 * 20, frames=1600)
    assert 4410 <= sum(sizes) < 4410 + 3000 + (441_000 if container == "MP3" else 0)


# ---- Codecs ----------------------------------------------------------------------------------------------------------

CODECS = [
    ("MP3", "MPEG_LAYER_III", 16000),
    ("MP3", "MPEG_LAYER_III", 44100),
    ("OGG", "VORBIS", 16000),
    ("OGG", "VORBIS", 44100),
    ("OGG", "OPUS", 16000),
    ("OGG", "OPUS", 24000),
    ("OGG", "OPUS", 48000),
    ("WAV", "GSM610", 8000),
    ("WAV", "IMA_ADPCM", 16000),
    ("WAV", "ULAW", 8000),
    ("CAF", "ALAC_16", 44100),
]


def encode(path, container, subtype, samples, rate):
    """Written in steps: libsndfile's encoder of Vorbis overflows the stack with long ones. Codecs have few bits."""
    few = {"compression_level": 0.9} if container in ("MP3", "OGG") else {}
    with path.open("wb") as raw, soundfile.SoundFile(raw, "w", rate, 1, subtype, format=container, **few) as file:
        for start in range(0, len(samples), 10_000):
            file.write(samples[start : start + 10_000])


def voice(rate, seconds, seed=0):
    """Harmonics of a gliding pitch at changing levels, with a little noise: what codecs expect of speech."""
    rng, times = np.random.default_rng(seed), np.arange(rate * seconds) / rate
    pitch, level = (
        np.interp(times, np.arange(0, seconds + 1, step), rng.uniform(low, high, int((seconds + 1) / step)))
        for step, low, high in ((0.25, 90, 250), (0.125, 0, 1))
    )
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    harmonics = sum(np.sin(k * phase) / k for k in range(1, 12))
    return (0.3 * level**3 * (harmonics + 0.1 * rng.uniform(-1, 1, len(times)))).astype(np.float32)


@pytest.mark.parametrize(("container", "subtype", "rate"), CODECS)
def test_pieces_of_codecs_that_build_on_earlier_frames_equal_those_of_the_whole(tmp_path, container, subtype, rate):
    encode(tmp_path / "a", container, subtype, voice(rate, 25 if container == "MP3" else 10), rate)
    whole = read_audio(tmp_path / "a", sample_rate=RATE)
    assert len(whole) == read_info(tmp_path / "a").num_samples(RATE)
    rng = np.random.default_rng(0)
    for start in [0, len(whole) - 3000, *rng.integers(0, len(whole) - 3000, 30).tolist()]:
        piece = read_audio(tmp_path / "a", sample_rate=RATE, start=start, frames=3000)
        np.testing.assert_allclose(piece, whole[start : start + 3000], atol=1e-4)


@pytest.mark.parametrize(("container", "subtype", "rate"), CODECS)
def test_codecs_are_decoded_in_blocks_as_in_one(tmp_path, monkeypatch, container, subtype, rate):
    encode(tmp_path / "a", container, subtype, voice(rate, 2), rate)
    with soundfile.SoundFile(tmp_path / "a") as file:
        expected = file.read(file.frames, dtype="float32")
    monkeypatch.setattr(audio, "BLOCK", 1000)
    np.testing.assert_array_equal(read_audio(tmp_path / "a", sample_rate=rate), expected)


def test_an_mp3_may_give_a_little_less_than_its_header_promises_but_not_more(tmp_path):
    encode(tmp_path / "a", "MP3", "MPEG_LAYER_III", voice(RATE, 5), RATE)
    whole, content = read_audio(tmp_path / "a", sample_rate=RATE), (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[:-200])  # a frame has 144 bytes or so
    samples = read_audio(tmp_path / "a", sample_rate=RATE, num_samples=80_000)
    assert not samples[-100:].any()
    assert whole[-100:].any()
    np.testing.assert_array_equal(samples[: -audio.MISSING], whole[: -audio.MISSING])
    np.testing.assert_allclose(read_audio(tmp_path / "a", sample_rate=RATE, start=79_000), samples[79_000:], atol=1e-6)
    (tmp_path / "a").write_bytes(content[: len(content) * 9 // 10])
    refused(tmp_path / "a", "truncated, its header promises 80000 samples and")


@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        *((container, "PCM_16") for container in ("WAV", "WAVEX", "RF64", "AIFF", "AU", "CAF", "W64", "SVX")),
        ("WAV", "IMA_ADPCM"),
        ("WAV", "GSM610"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
    ],
)
def test_truncated_files_of_all_kinds_are_refused_by_the_header_already(tmp_path, container, subtype):
    encode(tmp_path / "a", container, subtype, voice(RATE, 5), RATE)
    content = (tmp_path / "a").read_bytes()
    assert read_info(tmp_path / "a").sample_rate == RATE
    for share in (0.3, 0.9):
        (tmp_path / "a").write_bytes(content[: int(len(content) * share) + 1])
        refused(tmp_path / "a", "truncated")
        with pytest.raises(DataError, match=r"^list:3: .*truncated"):
            read_info(tmp_path / "a", "list:3")


# ---- Parts of files --------------------------------------------------------------------------------------------------


@pytest.fixture
def shard(tmp_path):
    """A tar file with three members of different kinds: (path, {name: (first byte, size, content)})."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, rate in (("one.flac", RATE), ("two.wav", 8000), ("three.ogg", 48000)):
            soundfile.write(tmp_path / name, wave(rate // 2), rate)
            tar.add(tmp_path / name, name)
    with tarfile.open(tmp_path / "a.tar") as tar:
        spans = {member.name: (member.offset_data, member.size) for member in tar}
    return tmp_path / "a.tar", spans


def test_a_member_of_a_shard_is_read_like_a_file_of_its_own(tmp_path, shard):
    path, spans = shard
    for name, span in spans.items():
        alone = read_audio(tmp_path / name, sample_rate=RATE)
        assert len(alone) == 8000
        np.testing.assert_array_equal(read_audio(Clip(path, span), sample_rate=RATE, num_samples=8000), alone)
        np.testing.assert_array_equal(read_audio((tmp_path / name).read_bytes(), sample_rate=RATE), alone)
        piece = read_audio(Clip(path, span), sample_rate=RATE, start=3000, frames=1000)
        np.testing.assert_allclose(piece, alone[3000:4000], atol=1e-4)
        assert read_info(Clip(path, span)) == read_info(tmp_path / name) == read_info((tmp_path / name).read_bytes())


def test_bytes_of_a_shard_that_are_no_audio_are_refused_with_the_list_and_the_shard(tmp_path, shard):
    path, spans = shard
    first, size = spans["two.wav"]
    cases = {
        (first + 100, size): "not audio",
        (first, size // 2): "truncated",
        (first, 0): "zero bytes",
        (first, 10**9): f"the file has only {path.stat().st_size} bytes",
    }
    for span, expected in cases.items():
        with pytest.raises(
            DataError, match=rf"^train.tsv:17: {path} \(bytes {span[0]} \+ {span[1]}\): .*{expected}.*;"
        ):
            read_audio(Clip(path, span), sample_rate=RATE, where="train.tsv:17")
    with pytest.raises(DataError, match="no such file"):
        read_audio(Clip(tmp_path / "missing.tar", (0, 5)), sample_rate=RATE)
    with pytest.raises(DataError, match="not a regular file"):
        read_audio(Clip(tmp_path, (0, 5)), sample_rate=RATE)
    for content, expected in ((b"", "zero bytes"), (b"<html>" * 50, "not audio")):
        with pytest.raises(DataError, match=f"^s.tar:4: .*{expected}"):
            read_audio(content, sample_rate=RATE, where="s.tar:4")


@pytest.mark.parametrize("rate", [16000, 44100])
def test_a_part_in_seconds_is_that_part_alone(tmp_path, rate):
    written = wave(rate * 3)
    soundfile.write(tmp_path / "a.wav", written, rate, subtype="FLOAT")
    for start, seconds in ((0.5, 1.0), (1.23456, 0.78901), (None, 0.4), (2.25, None), (0.0, 3.0)):
        first = round((start or 0) * rate)
        last = len(written) if seconds is None else round(((start or 0) + seconds) * rate)
        content = io.BytesIO()
        soundfile.write(content, written[first:last], rate, format="WAV", subtype="FLOAT")
        alone = read_audio(content.getvalue(), sample_rate=RATE)
        clip = Clip(tmp_path / "a.wav", start=start, seconds=seconds)
        assert read_info(clip).num_frames == last - first
        np.testing.assert_array_equal(read_audio(clip, sample_rate=RATE, num_samples=len(alone)), alone)
        piece = read_audio(clip, sample_rate=RATE, start=1000, frames=2000)
        np.testing.assert_allclose(piece, alone[1000:3000], atol=1e-4)


def test_a_part_may_end_a_little_behind_the_recording_but_not_more(tmp_path):
    soundfile.write(tmp_path / "a.wav", wave(RATE), RATE, subtype="FLOAT")
    samples = read_audio(Clip(tmp_path / "a.wav", start=0.5, seconds=0.54), sample_rate=RATE)
    np.testing.assert_array_equal(samples, np.append(wave(RATE)[8000:], np.zeros(640, np.float32)))
    for start, seconds in ((0.5, 0.56), (1.01, 0.01), (1.0, None), (-0.1, 0.5), (0.2, 0.0), (0.2, -1.0), (0.2, 1e-9)):
        with pytest.raises(DataError, match=r"m.json:2: .*correct offset and duration"):
            read_audio(Clip(tmp_path / "a.wav", start=start, seconds=seconds), sample_rate=RATE, where="m.json:2")
    for number in (math.nan, math.inf):
        with pytest.raises(DataError, match="correct offset and duration"):
            read_audio(Clip(tmp_path / "a.wav", start=number), sample_rate=RATE)
        with pytest.raises(DataError, match="correct offset and duration"):
            read_audio(Clip(tmp_path / "a.wav", seconds=number), sample_rate=RATE)


@pytest.mark.parametrize("rate", [16000, 48000])
def test_within_the_tolerance_the_listed_length_is_made(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", wave(rate), rate, subtype="FLOAT")
    whole = read_audio(tmp_path / "a.wav", sample_rate=RATE)
    for listed in (RATE - 800, RATE - 1, RATE + 1, RATE + 800):
        expected = np.append(whole, np.zeros(800, np.float32))[:listed]
        arguments = {"sample_rate": RATE, "num_samples": listed, "tolerance": 800}
        np.testing.assert_allclose(read_audio(tmp_path / "a.wav", **arguments), expected, atol=1e-6)
        for start in (listed - 600, listed - 1):
            piece = read_audio(tmp_path / "a.wav", start=start, **arguments)
            np.testing.assert_allclose(piece, expected[start:], atol=1e-4)
    for listed in (RATE - 801, RATE + 801):
        refused(tmp_path / "a.wav", f"but {listed} are listed", num_samples=listed, tolerance=800)
    with pytest.raises(DataError, match="samples 15000 to 17000 of 16400"):
        read_audio(tmp_path / "a.wav", sample_rate=RATE, num_samples=16_400, tolerance=800, start=15_000, frames=2000)


def test_a_header_is_read_without_decoding(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.flac", np.zeros((4410, 2)), 44100)
    monkeypatch.delattr(soundfile.SoundFile, "read")
    assert read_info(tmp_path / "a.flac") == AudioInfo("FLAC", "PCM_16", 44100, 2, 4410)
    with pytest.raises(DataError, match="^l:1: .*no such file"):
        read_info(tmp_path / "b.flac", "l:1")
