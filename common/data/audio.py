"""Read audio of any kind, or a piece of it, as mono float32 at the model's rate; refuse whatever would spoil a run."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import io
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from common.errors import DataError

if TYPE_CHECKING:  # imported where a file is opened: programs on made batches need no audio library
    import soundfile

Lengths = TypeVar("Lengths", int, np.ndarray)

SAMPLE_RATES = (1_000, 768_000)  # Hz; what is outside comes from a damaged header, and resampling it would fill memory
UNKNOWN_LENGTH = 1 << 62  # libsndfile gives 2^63 - 1 where a header gives no length
STREAMED = 0x7FFFF000  # programs that write to a pipe put this much or more as the length of the data
BLOCK = 1 << 24  # values per read: a header that promises too much must not exhaust the memory

LOSSY = ("VORBIS", "OPUS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")
# An MP3 decoder is 529 samples late and encoders need not write the frame that would bring out the last ones, so
# headers promise some samples that never come. Two frames of MPEG-1 are more than that, and too few to be speech.
MISSING = 2 * 1152
# Seconds of an MP3 that are decoded before a piece: a frame builds on up to 511 bytes of earlier ones. One would do;
# with more, most recordings are decoded from the beginning, and the decoder does not print that it lacks those bytes.
PRE_ROLL = 10.0

# Samples of the lower rate on either side of a piece, so that resampling it gives what resampling the whole gives.
# At 64 the difference is 5e-4 of full scale, from 128 on it is that of float32 (measured with soxr_hq, 1 to 768 kHz).
MARGIN = 256
BEYOND = 0.05  # s by which a part may end behind the recording: durations in manifests are rounded

JSON = re.compile(r"\.jsonl?:\d+: ")  # a line of a manifest, in a message
TAR_BLOCK, TAR_NAME = 512, 100  # bytes of a header of tar, and of the name in it

MAKE_LIST = "regenerate the list with utils/generate_filelist.py"
COPY_AGAIN = "copy the file again or remove it from the list"
ENCODE_AGAIN = "encode it again, for example: ffmpeg -i IN OUT.flac"


@dataclass(frozen=True)
class Clip:
    """Where audio is: a file, or some bytes of it (a member of a tar shard), and which part of the recording.

    `span` is (first byte, number of bytes), `member` the name that the tar has for them; `start` and `seconds` are in
    seconds of the recording; None: all of it.
    """

    path: Path
    span: tuple[int, int] | None = None
    start: float | None = None
    seconds: float | None = None
    member: str = ""


@dataclass(frozen=True)
class AudioInfo:
    """What a header says; `num_frames` counts the samples per channel, at the own rate, of the part that is meant."""

    container: str
    subtype: str
    sample_rate: int
    channels: int
    num_frames: int

    def num_samples(self, sample_rate: int) -> int:
        """Length after resampling to `sample_rate`."""
        return resampled_length(self.num_frames, self.sample_rate, sample_rate)

    @property
    def kind(self) -> str:
        """Rate and channels for people: "44.1 kHz stereo", "16 kHz 6 channels"."""
        channels = {1: "mono", 2: "stereo"}.get(self.channels, f"{self.channels} channels")
        return f"{self.sample_rate / 1000:g} kHz {channels}"


def resampled_length(num_frames: Lengths, rate: int, sample_rate: int) -> Lengths:
    """Samples after resampling from `rate` to `sample_rate`: ceil(num_frames * sample_rate / rate), exactly.

    For one length or an array of them (int64, as products do not fit in less).
    """
    if isinstance(num_frames, np.ndarray):
        num_frames = num_frames.astype(np.int64)
    return -(-num_frames * sample_rate // rate)


def read_info(source: Clip | Path | str | bytes, where: str = "") -> AudioInfo:
    """What the header says, without decoding; DataError for all that `read_audio` would refuse by the header."""
    place = _place(source, where)
    with _opened(source, place) as file:
        return _find_part(file, source, place)[1]


def read_audio(
    source: Clip | Path | str | bytes,
    *,
    sample_rate: int,
    num_samples: int | None = None,
    tolerance: int = 0,
    start: int = 0,
    frames: int = -1,
    where: str = "",
    on_convert: Callable[[AudioInfo], None] | None = None,
) -> np.ndarray:
    """Samples (S,) float32 at `sample_rate`: channels averaged, other rates resampled; judged by content, not by name.

    `num_samples` is the length that the list gives, `start` and `frames` read only a piece; all three count at
    `sample_rate`. Up to `tolerance` samples more or less than listed are cut off or filled with zeros. Only about the
    piece is decoded, except of Ogg (Vorbis, Opus) and a few telephone codecs, which are decoded from the beginning.
    `on_convert` gets the header of what was resampled or averaged. DataError, with `where` and the file, for
    anything missing, damaged or of another length, and for NaN or infinite samples.
    """
    place = _place(source, where)
    with _opened(source, place) as file:
        first, info = _find_part(file, source, place)
        total = info.num_samples(sample_rate)
        if num_samples is None:
            num_samples = total
        elif abs(num_samples - total) > tolerance:
            listed = _other_duration if JSON.search(place) else _other_length
            raise DataError(f"{place}: {listed(info, sample_rate, num_samples)}")
        if frames < 0:
            frames = num_samples - start
        if start < 0 or frames < 1 or start + frames > num_samples:
            raise DataError(f"{place}: samples {start} to {start + frames} of {num_samples}; {MAKE_LIST}")
        present = min(frames, total - start)
        if present < 1:  # only zeros, behind the end
            wave = np.empty(0, np.float32)
        elif info.sample_rate == sample_rate:
            wave = _decode(file, first + start, present, place)
        else:
            wave = _resampled_piece(file, first, info, sample_rate, start, present, place)
    if on_convert is not None and (info.sample_rate, info.channels) != (sample_rate, 1):
        on_convert(info)
    return _fitted(wave, frames)


def normalize(wave: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance over the utterance: (wave - mean) / sqrt(var + 1e-5), biased; float32."""
    centred = wave.astype(np.float64)
    centred -= centred.mean()
    return (centred / np.sqrt(np.square(centred).mean() + 1e-5)).astype(np.float32)


# ---- Opening ---------------------------------------------------------------------------------------------------------


def _place(source: Clip | Path | str | bytes, where: str) -> str:
    """Where a message points: the line of a list and the file."""
    if isinstance(source, bytes):
        return where or "audio"
    name = source.path if isinstance(source, Clip) else source
    span = f" (bytes {source.span[0]} + {source.span[1]})" if isinstance(source, Clip) and source.span else ""
    return f"{where}: {name}{span}" if where else f"{name}{span}"


@contextmanager
def _opened(source: Clip | Path | str | bytes, place: str) -> Iterator[soundfile.SoundFile]:
    """The audio as libsndfile sees it; every error of opening and decoding becomes a DataError."""
    import soundfile

    with _content(source, place) as content:
        try:
            with _reader()(content, closefd=False) as file:
                yield file
        except soundfile.LibsndfileError as error:
            reason = error.error_string.rstrip(".")
            raise DataError(f"{place}: not audio, truncated or damaged ({reason}); {COPY_AGAIN}") from None


@functools.cache
def _reader() -> type[soundfile.SoundFile]:
    import soundfile

    class Forward(soundfile.SoundFile):
        """Reads on where it stopped.

        After every read, soundfile seeks to the position that a seekable file has anyway. That costs time, and at
        it an MP3 decoder forgets the earlier frames that the next one builds on.
        """

        def seekable(self) -> bool:
            return False

    return Forward


@contextmanager
def _content(source: Clip | Path | str | bytes, place: str) -> Iterator[int | io.BytesIO]:
    """The file, opened, or the bytes that are meant; DataError where there is nothing to read."""
    if isinstance(source, bytes):
        if not source:
            raise DataError(f"{place}: zero bytes; {COPY_AGAIN}")
        yield io.BytesIO(source)
        return
    clip = source if isinstance(source, Clip) else Clip(Path(source))
    try:
        state = clip.path.stat()
        if not stat.S_ISREG(state.st_mode):  # a pipe would block for ever
            raise DataError(f"{place}: not a regular file; correct the list")
        if state.st_size == 0 or (clip.span and clip.span[1] == 0):
            raise DataError(f"{place}: zero bytes; {COPY_AGAIN}")
        if clip.span and sum(clip.span) > state.st_size:
            raise DataError(f"{place}: the file has only {state.st_size} bytes; copy it again or make the list anew")
        # Opened by number: by name, soundfile would guess a format from some extensions.
        handle = os.open(clip.path, os.O_RDONLY)
    except FileNotFoundError:
        remedy = "correct the entry" if JSON.search(place) else f"correct the root in line 1 or {MAKE_LIST}"
        raise DataError(f"{place}: no such file; {remedy}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: cannot be read ({error}); correct the file or the list") from None
    try:
        if clip.span is None:
            yield handle
        else:
            _check_member(handle, clip.span[0], clip.member, place)
            yield io.BytesIO(_bytes_at(handle, *clip.span, place))
    finally:
        os.close(handle)


def _check_member(handle: int, first: int, member: str, place: str) -> None:
    """Refuse a shard that is no longer the one that its list was made for.

    The header in front of a member holds its name, but for names that are long or not ASCII.
    """
    if not (member and member.isascii() and len(member) <= TAR_NAME):
        return
    header = os.pread(handle, TAR_BLOCK, first - TAR_BLOCK) if first >= TAR_BLOCK else b""
    found = header[:TAR_NAME].rstrip(b"\0").decode("ascii", "replace").removeprefix("./")
    if found != member.removeprefix("./"):
        raise DataError(
            f"{place}: is not {member}, the shard has changed since its list was made; make the list anew with "
            "utils/make_shards.py --index"
        )


def _bytes_at(handle: int, first: int, number: int, place: str) -> bytes:
    """`number` bytes from `first` on; one read may give less than it was asked for."""
    parts = []
    while number > 0:
        try:
            part = os.pread(handle, number, first)
        except OSError as error:
            raise DataError(f"{place}: cannot be read ({error}); correct the file or the list") from None
        if not part:
            raise DataError(f"{place}: truncated, {number} bytes are missing; {COPY_AGAIN}")
        parts.append(part)
        first, number = first + len(part), number - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


# ---- The header ------------------------------------------------------------------------------------------------------


def _find_part(file: soundfile.SoundFile, source: Clip | Path | str | bytes, place: str) -> tuple[int, AudioInfo]:
    """First sample of what is meant, at the file's own rate, and the header; refuses what it shows to be unusable."""
    rate, total = file.samplerate, file.frames
    if total >= UNKNOWN_LENGTH:
        raise DataError(f"{place}: empty, or its header gives no length; {ENCODE_AGAIN}")
    if total == 0:
        raise DataError(f"{place}: zero samples; remove it from the list")
    if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
        low, high = SAMPLE_RATES
        raise DataError(f"{place}: {rate} Hz is not within {low} to {high} Hz, the header is damaged; {COPY_AGAIN}")
    if file.format not in ("FLAC", "MP3"):  # their decoders notice, and libsndfile's remarks cost time
        _check_truncation(file.extra_info, place)
    first = 0
    if isinstance(source, Clip) and (source.start is not None or source.seconds is not None):
        begin, whole = source.start or 0.0, total / rate
        seconds = whole - begin if source.seconds is None else source.seconds
        if not (0 <= begin < whole and seconds > 0 and begin + seconds <= whole + BEYOND):
            raise DataError(
                f"{place}: {begin:g} s + {seconds:g} s of a recording of {whole:g} s; correct offset and duration"
            )
        first, end = round(begin * rate), total if source.seconds is None else round((begin + seconds) * rate)
        total = end - first
        if first >= file.frames or total < 1:
            raise DataError(f"{place}: the part has no sample; correct offset and duration, or remove it")
    return first, AudioInfo(file.format, file.subtype, rate, file.channels, total)


# How libsndfile mentions, without an error, that there is less audio than the header says. Ogg has no such number:
# there the rest of a page that was cut off is the sign (whether a last page is marked as such is not always noticed).
_CUT = re.compile(r"^ *(?:data|SSND|BODY|riff|Data Size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
_CUT_RF64 = re.compile(r"Calculated frame count (\d+) does not match value from 'ds64' chunk of (\d+)")
_CUT_OGG = re.compile(r"^Ogg *: Junk after the last page", re.MULTILINE)


def _check_truncation(remarks: str, place: str) -> None:
    """Refuse a file that is shorter than its header says."""
    if _CUT_OGG.search(remarks):
        raise DataError(f"{place}: truncated, or other data follow its last page; copy it again, or {ENCODE_AGAIN}")
    if found := _CUT_RF64.search(remarks):
        left, promised, unit = int(found[1]), int(found[2]), "samples"
    elif found := _CUT.search(remarks):
        promised, left, unit = int(found[1]), int(found[2]), "bytes of audio"
    else:
        return
    if left < promised < STREAMED:
        raise DataError(f"{place}: truncated, {left} of {promised} {unit} are left; {COPY_AGAIN}")


def _other_duration(info: AudioInfo, sample_rate: int, num_samples: int) -> str:
    """Why the duration of a manifest is not that of the file."""
    return (
        f"has {info.num_samples(sample_rate) / sample_rate:.3f} s, but a duration of {num_samples / sample_rate:.3f} s "
        'is given; correct it, or give an "offset" too where a part is meant'
    )


def _other_length(info: AudioInfo, sample_rate: int, num_samples: int) -> str:
    """Why the listed length is not that of the file."""
    true = info.num_samples(sample_rate)
    if info.sample_rate == sample_rate:
        return f"has {true} samples, but {num_samples} are listed; the file has changed since: {MAKE_LIST}"
    if num_samples == info.num_frames:
        return (
            f"the list counts the file's own {num_samples} samples at {info.sample_rate} Hz; lists count at the "
            f"model's {sample_rate} Hz, {true} here: {MAKE_LIST} --sample_rate {sample_rate}"
        )
    return (
        f"has {true} samples at {sample_rate} Hz, but {num_samples} are listed; the file has changed since, or the "
        f"list is for another rate: {MAKE_LIST} --sample_rate {sample_rate}"
    )


# ---- Samples ---------------------------------------------------------------------------------------------------------


def _resampled_piece(
    file: soundfile.SoundFile, first: int, info: AudioInfo, sample_rate: int, start: int, frames: int, place: str
) -> np.ndarray:
    """Samples `start` to `start + frames` of the part from `first` on, resampled: (frames,) float32.

    Decoded is the piece with a margin, from a place where a sample of one rate falls on one of the other.
    """
    common = math.gcd(info.sample_rate, sample_rate)
    own_step, step = info.sample_rate // common, sample_rate // common
    margin = MARGIN * max(1.0, sample_rate / info.sample_rate)
    steps = max(0, start - math.ceil(margin)) // step
    begin = steps * own_step
    end = math.ceil((start + frames + margin) * info.sample_rate / sample_rate)
    wave = _decode(file, first + begin, min(end, info.num_frames) - begin, place)
    offset = start - steps * step
    return _fitted(_resample(wave, info.sample_rate, sample_rate)[offset:], frames)


def _resample(wave: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    """Band-limited resampling of (S,) float32."""
    import librosa  # takes a second and more, so only where something is to be resampled

    return librosa.resample(wave, orig_sr=rate, target_sr=sample_rate, res_type="soxr_hq", fix=False)


def _decode(file: soundfile.SoundFile, first: int, frames: int, place: str) -> np.ndarray:
    """Samples `first` to `first + frames`, channels averaged: (frames,) float32 at the file's own rate, or a DataError.

    Zeros stand behind the end of the file, and for the few samples that a codec promises and does not give.
    """
    stop = min(first + frames, file.frames)
    position = _seek(file, first)
    blocks: list[np.ndarray] = []
    while position < stop:
        wanted = (first if position < first else stop) - position
        block = file.read(min(wanted, BLOCK // file.channels), dtype="float32")
        if not len(block):
            if file.subtype in LOSSY and file.frames - position <= MISSING:
                break
            raise DataError(
                f"{place}: truncated, its header promises {file.frames} samples and {position} are there; {COPY_AGAIN}"
            )
        if position >= first:
            blocks.append(_mixed_down(block))
        position += len(block)
    wave = blocks[0] if len(blocks) == 1 else np.concatenate([np.empty(0, np.float32), *blocks])
    if not file.subtype.startswith("PCM") and not np.isfinite(wave).all():
        raise DataError(f"{place}: has NaN or infinite samples; remove it from the list or repair it")
    return _fitted(wave, frames)


def _seek(file: soundfile.SoundFile, first: int) -> int:
    """Go to a place from where decoding gives at `first` what decoding from the beginning gives, and return it."""
    import soundfile

    # Ogg: an Opus decoder remembers for seconds where it began, and libsndfile's seeks in Vorbis are at times a packet
    # off up to the next page. Some telephone codecs only run forwards.
    if first == 0 or file.format == "OGG" or not soundfile.SoundFile.seekable(file):
        return 0
    place = max(0, first - round(PRE_ROLL * file.samplerate)) if file.subtype in LOSSY else first
    return file.seek(place) if place else 0


def _mixed_down(block: np.ndarray) -> np.ndarray:
    """The mean of all channels: (S,) or (S, channels) -> (S,). Many times faster than numpy's mean over few columns."""
    if block.ndim == 1:
        return block
    mono = block[:, 0].copy()
    for channel in range(1, block.shape[1]):
        mono += block[:, channel]
    mono /= block.shape[1]
    return mono


def _fitted(wave: np.ndarray, length: int) -> np.ndarray:
    """Cut to `length` samples, or zeros behind."""
    return wave[:length] if len(wave) >= length else np.pad(wave, (0, length - len(wave)))
