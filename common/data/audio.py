"""Read one audio file, or a piece of it, as float32 samples, and refuse whatever would spoil a run."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.errors import DataError

if TYPE_CHECKING:  # imported where a file is opened: programs on made batches need no audio library
    import soundfile

CONTAINERS = ("WAV", "WAVEX", "RF64", "FLAC")
FLOATING = ("FLOAT", "DOUBLE")
UNKNOWN_LENGTH = 1 << 62  # libsndfile gives 2^63 - 1 where a FLAC header gives no length
STREAMED_WAV = 0x7FFFF000  # programs that write to a pipe put this much or more as the length of the data
BLOCK = 1 << 24  # samples per read: a header that promises too much must not exhaust the memory
MAKE_LIST = "regenerate the list with utils/generate_filelist.py"
CONVERT = "convert it, for example: ffmpeg -i IN -ac 1 -ar {rate} OUT.flac"


def read_audio(
    path: Path | str,
    *,
    sample_rate: int,
    num_samples: int | None = None,
    start: int = 0,
    frames: int = -1,
    where: str = "",
) -> np.ndarray:
    """Samples (S,) float32 of a mono WAV or FLAC file, judged by its content and not by its name.

    `num_samples` is the length that the list gives; `start` and `frames` read only a piece. DataError, with
    `where` and the file, for anything missing, damaged, of another length, rate, channel count or container,
    and for NaN or infinite samples.
    """
    place = f"{where}: {path}" if where else f"{path}"
    with _opened(Path(path), place) as file:
        _check_header(file, place, sample_rate, num_samples)
        wave = _read(file, start, file.frames - start if frames < 0 else frames, place)
        if file.subtype in FLOATING and not np.isfinite(wave).all():
            raise DataError(f"{place}: has NaN or infinite samples; remove it from the list or repair it")
    return wave


def normalize(wave: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance over the utterance: (wave - mean) / sqrt(var + 1e-5), biased; float32."""
    centred = wave.astype(np.float64)
    centred -= centred.mean()
    return (centred / np.sqrt(np.square(centred).mean() + 1e-5)).astype(np.float32)


@contextmanager
def _opened(path: Path, place: str) -> Iterator[soundfile.SoundFile]:
    """The file as libsndfile sees it; every error of opening and decoding becomes a DataError."""
    import soundfile

    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # a pipe would block for ever
            raise DataError(f"{place}: not a regular file; correct the list")
        if state.st_size == 0:
            raise DataError(f"{place}: zero bytes; copy the file again or remove it from the list")
        # Opened by number: by name, soundfile would guess a format from some extensions.
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise DataError(f"{place}: no such file; correct the root in line 1 or {MAKE_LIST}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: cannot be read ({error}); correct the file or the list") from None
    try:
        with soundfile.SoundFile(handle, closefd=False) as file:
            yield file
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".")
        raise DataError(
            f"{place}: not audio, truncated or damaged ({reason}); copy the file again or remove it from the list"
        ) from None
    finally:
        os.close(handle)


def _check_header(file: soundfile.SoundFile, place: str, sample_rate: int, num_samples: int | None) -> None:
    """Refuse what the header alone shows to be unusable."""
    convert = CONVERT.format(rate=sample_rate)
    if file.format not in CONTAINERS:
        raise DataError(f"{place}: {file.format} audio, only WAV and FLAC are read; {convert}")
    if file.samplerate != sample_rate:
        raise DataError(f"{place}: {file.samplerate} Hz instead of {sample_rate} Hz; {convert}")
    if file.channels != 1:
        raise DataError(f"{place}: {file.channels} channels instead of 1; {convert}")
    if file.frames >= UNKNOWN_LENGTH:
        raise DataError(f"{place}: empty, or its header gives no length; {convert}")
    if file.frames == 0:
        raise DataError(f"{place}: zero samples; remove it from the list")
    if file.format != "FLAC":
        _check_wav_length(file, place)
    if num_samples is not None and file.frames != num_samples:
        raise DataError(
            f"{place}: has {file.frames} samples, but {num_samples} are listed; the file has changed since: {MAKE_LIST}"
        )


def _check_wav_length(file: soundfile.SoundFile, place: str) -> None:
    """Refuse a WAV file that is shorter than its header says (libsndfile only mentions it)."""
    found = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    if found and int(found[2]) < int(found[1]) < STREAMED_WAV:
        raise DataError(
            f"{place}: truncated, {found[2]} of {found[1]} bytes of audio are left; "
            "copy the file again or remove it from the list"
        )


def _read(file: soundfile.SoundFile, start: int, frames: int, place: str) -> np.ndarray:
    """`frames` samples from `start` on, all of them or a DataError."""
    if frames < 1 or start + frames > file.frames:
        raise DataError(f"{place}: samples {start} to {start + frames} of {file.frames}; {MAKE_LIST}")
    file.seek(start)
    blocks: list[np.ndarray] = []
    missing = frames
    while missing > 0:
        block = file.read(min(missing, BLOCK), dtype="float32")
        if not len(block):
            raise DataError(
                f"{place}: truncated, {frames - missing} of {frames} samples could be read; "
                "copy the file again or remove it from the list"
            )
        blocks.append(block)
        missing -= len(block)
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
