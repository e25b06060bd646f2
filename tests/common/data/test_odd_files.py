"""Odd files, one row each: taken, with the conversion that it needs, or refused with the right message."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from common.data.audio import normalize, read_audio, read_info
from common.errors import DataError

RATE = 16000
PLAIN = "16 kHz mono"
NOT_AUDIO = "not audio, truncated or damaged"
NOT_FINITE = "has NaN or infinite samples"
NO_LENGTH = "empty, or its header gives no length"
LONG_NAME = "x" * 180 + ".flac"

# What the header says of files that are read; those that are not PLAIN are averaged or resampled to it.
TAKEN = {
    "-dash.flac": PLAIN,
    "UPPER.FLAC": PLAIN,
    "clip_100ms.flac": PLAIN,
    "clip_10ms.flac": PLAIN,
    "clip_1_sample.flac": PLAIN,
    "clip_30ms.flac": PLAIN,
    "clip_399_samples.flac": PLAIN,
    "clip_400_samples.flac": PLAIN,
    "clipped.flac": PLAIN,
    "constant.flac": PLAIN,
    "dc_offset.flac": PLAIN,
    "encoded_16000.mp3": PLAIN,
    "encoded_16000.ogg": PLAIN,
    "encoded_48000.opus": "48 kHz mono",
    "flac_named.wav": PLAIN,
    "float32.wav": PLAIN,
    "float32_above_one.wav": PLAIN,
    "float64.wav": PLAIN,
    "it's; [odd] #1 & 100%.flac": PLAIN,
    "junk_after_data.wav": PLAIN,
    "long_3min.flac": PLAIN,
    "mono_22050.flac": "22.05 kHz mono",
    "mono_44100_16bit.aiff": "44.1 kHz mono",
    "mono_44100_24bit.wav": "44.1 kHz mono",
    "mono_44100_32bit_int.wav": "44.1 kHz mono",
    "mono_44100_8bit.wav": "44.1 kHz mono",
    "mono_48000.flac": "48 kHz mono",
    "mono_8000.wav": "8 kHz mono",
    "mono_8000_alaw.wav": "8 kHz mono",
    "mono_8000_one_digit.wav": "8 kHz mono",
    "mono_8000_ulaw.wav": "8 kHz mono",
    "name with spaces.flac": PLAIN,
    "no_extension": PLAIN,
    "noise_1s.wav": PLAIN,
    "näme_日本語_имя.flac": PLAIN,
    "real_48000.mp3": "48 kHz mono",
    "room_noise_4s.wav": PLAIN,
    "silence_5s.flac": PLAIN,
    "silence_then_speech.flac": PLAIN,
    "six_channels.wav": "16 kHz 6 channels",
    "stereo_44100_16bit.wav": "44.1 kHz stereo",
    "stereo_44100_24bit.flac": "44.1 kHz stereo",
    "stereo_one_side_silent.flac": "16 kHz stereo",
    "stereo_two_talkers.flac": "16 kHz stereo",
    "two.dots.in.name.flac": PLAIN,
    "very_quiet.flac": PLAIN,
    "wav_named.flac": PLAIN,
    LONG_NAME: PLAIN,
}
REFUSED = {
    "corrupt_middle.flac": NOT_AUDIO,
    "float32_all_nan.wav": NOT_FINITE,
    "float32_some_inf.wav": NOT_FINITE,
    "float32_some_nan.wav": NOT_FINITE,
    "header_awful.wav": "1092676 Hz is not within 1000 to 768000 Hz",
    "header_bad.wav": NOT_AUDIO,
    "header_evil.wav": NOT_AUDIO,
    "html_named.wav": NOT_AUDIO,
    "text_named.flac": NOT_AUDIO,
    "truncated.flac": NOT_AUDIO,
    "truncated.wav": "truncated, 77018 of 154080 bytes of audio are left",
    "truncated_header.flac": NOT_AUDIO,
    "unknown_length.flac": NO_LENGTH,
    "zero_bytes.flac": "zero bytes",
    "zero_bytes.wav": "zero bytes",
    "zero_samples.flac": NO_LENGTH,
    "zero_samples.wav": "zero samples",
}
# The others are the clip itself, in other wrappings. Files that have it too, with the share of its power that agrees.
ORDINARY = "two.dots.in.name.flac"
SAME_SPEECH = {  # name: highest frequency (Hz) that both have, smallest correlation below it
    "mono_22050.flac": (7000, 0.9999),
    "mono_48000.flac": (7000, 0.9999),
    "mono_8000.wav": (3400, 0.999),
    "mono_8000_alaw.wav": (3400, 0.99),
    "mono_8000_ulaw.wav": (3400, 0.99),
    "encoded_16000.mp3": (5000, 0.99),
    "encoded_16000.ogg": (5000, 0.98),
    "encoded_48000.opus": (5000, 0.98),
    "stereo_one_side_silent.flac": (8000, 0.9999),
    "float32.wav": (8000, 0.9999),
    "float64.wav": (8000, 0.9999),
    "six_channels.wav": (8000, 0.9),
    "dc_offset.flac": (8000, 0.999),
    "very_quiet.flac": (8000, 0.9),
}


@pytest.fixture(scope="module")
def odd(shared):
    return shared("speech/odd")


def read(path):
    return read_audio(path, sample_rate=RATE)


def correlation(one, other, highest):
    """Of two recordings of one length, between 100 Hz and `highest` Hz."""
    spectra = [np.fft.rfft(np.asarray(samples, np.float64)) for samples in (one, other)]
    frequencies = np.fft.rfftfreq(len(one), 1 / RATE)
    one_F, other_F = (spectrum[(frequencies >= 100) & (frequencies <= highest)] for spectrum in spectra)
    return np.vdot(one_F, other_F).real / np.linalg.norm(one_F) / np.linalg.norm(other_F)


def test_every_file_has_a_row(odd):
    files = [path.name for path in odd.iterdir() if path.is_file() and path.suffix not in (".md", ".txt")]
    rows = {name for name in [*TAKEN, *REFUSED] if name != LONG_NAME}
    assert {name for name in files if not name.startswith("x" * 50)} == rows
    assert len(files) == len(rows) + 1


@pytest.mark.parametrize(("name", "kind"), TAKEN.items())
def test_what_is_taken_has_the_promised_length_and_says_how_it_is_converted(odd, name, kind):
    path = next(odd.glob("x" * 50 + "*")) if name == LONG_NAME else odd / name
    info, told = read_info(path), []
    samples = read_audio(path, sample_rate=RATE, num_samples=info.num_samples(RATE), on_convert=told.append)
    assert info.kind == kind
    assert told == ([] if kind == PLAIN else [info])
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert abs(len(samples) / RATE - info.num_frames / info.sample_rate) < 1 / RATE
    assert np.isfinite(samples).all()
    assert np.isfinite(normalize(samples)).all()


@pytest.mark.parametrize(("name", "message"), REFUSED.items())
def test_what_is_refused_is_refused_in_one_line_with_the_place_the_reason_and_a_remedy(odd, name, message):
    with pytest.raises(DataError) as caught:
        read_audio(odd / name, sample_rate=RATE, where="train.tsv:17")
    text = str(caught.value)
    assert text.startswith(f"train.tsv:17: {odd / name}: {message}")
    assert ";" in text
    assert "\n" not in text


@pytest.mark.parametrize(("name", "limits"), SAME_SPEECH.items())
def test_one_sentence_in_other_formats_agrees_with_the_original_in_the_band_that_both_have(odd, name, limits):
    original, samples = read(odd / ORDINARY), read(odd / name)
    assert abs(len(samples) - len(original)) <= 1
    highest, smallest = limits
    length = min(len(samples), len(original))
    assert correlation(samples[:length], original[:length], highest) > smallest


def test_nothing_of_a_telephone_recording_lies_above_its_band(odd):
    samples = read(odd / "mono_8000.wav")
    power = np.square(np.abs(np.fft.rfft(samples)))
    above = np.fft.rfftfreq(len(samples), 1 / RATE) > 4200
    assert power[above].sum() < 1e-6 * power.sum()


@pytest.mark.parametrize("name", ["stereo_two_talkers.flac", "stereo_one_side_silent.flac", "six_channels.wav"])
def test_what_has_several_channels_becomes_their_mean(odd, name):
    channels = soundfile.read(odd / name)[0]
    assert channels.shape[1] in (2, 6)
    np.testing.assert_allclose(read(odd / name), channels.mean(axis=1), atol=1e-6)


def test_stereo_at_another_rate_becomes_the_mean_of_its_resampled_channels(odd):
    channels, rate = soundfile.read(odd / "stereo_44100_16bit.wav", dtype="float32")
    parts = []
    for channel in channels.T:
        content = io.BytesIO()
        soundfile.write(content, channel, rate, format="WAV", subtype="FLOAT")
        parts.append(read(content.getvalue()))
    np.testing.assert_allclose(read(odd / "stereo_44100_16bit.wav"), np.mean(parts, axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("mono_44100_16bit.aiff", 2**-15),
        ("mono_44100_32bit_int.wav", 2**-15),
        ("mono_44100_8bit.wav", 2**-7),
        ("stereo_44100_16bit.wav", 2**-15),
        ("stereo_44100_24bit.flac", 2**-15),
    ],
)
def test_all_widths_of_one_recording_agree_to_their_quantisation(odd, name, step):
    error = read(odd / name) - read(odd / "mono_44100_24bit.wav")
    assert np.sqrt(np.square(error).mean()) < step
    assert np.abs(error).max() < 4 * step


def test_names_and_wrappings_do_not_change_the_samples(odd):
    original = read(odd / ORDINARY)
    same = ["-dash.flac", "UPPER.FLAC", "flac_named.wav", "it's; [odd] #1 & 100%.flac", "junk_after_data.wav"]
    same += ["name with spaces.flac", "no_extension", "näme_日本語_имя.flac", "wav_named.flac"]
    for name in same:
        np.testing.assert_array_equal(read(odd / name), original)
    assert np.abs(read(odd / "float32_above_one.wav")).max() == pytest.approx(3.0, abs=0.01)
