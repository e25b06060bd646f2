"""Speech synthesis by the eSpeak NG library of the wheel espeakng-loader, called by ctypes.

eSpeak NG keeps state from one utterance to the next (phases, its own random numbers), so equal calls in one
process do not sound equal. What should be reproducible gets a process of its own.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path

import numpy as np

from common.errors import ConfigError, DataError

SYNCHRONOUS, DONT_EXIT, UTF8, BY_CHARACTER = 2, 0x8000, 1, 1  # constants of espeak-ng/speak_lib.h
RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4
BUFFER = 500  # milliseconds per callback
MAX_DATA_PATH = 120  # characters; the library cuts paths at about 160 without a word
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def check_installed() -> tuple[str, str]:
    """Paths of the library and of its data; ConfigError when the wheel is absent."""
    try:
        import espeakng_loader  # noqa: PLC0415 - only this corpus needs it
    except ImportError as error:
        raise ConfigError(
            "eSpeak NG: the package espeakng-loader is not installed; run: python -m pip install espeakng-loader"
        ) from error
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


class Synthesizer:
    """One voice of eSpeak NG; one object per process, because the library is a single global."""

    def __init__(self, voice: str, seed: int) -> None:
        library, data = check_installed()
        self._library = ctypes.CDLL(library)
        self._library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        self._library.espeak_Synth.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            *[ctypes.c_uint] * 4,
            *[ctypes.c_void_p] * 2,
        ]
        self._library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        with tempfile.TemporaryDirectory() as folder:
            if len(data) > MAX_DATA_PATH:
                link = Path(folder) / "espeak-ng-data"
                link.symlink_to(data)
                data = str(link)
            self.sample_rate = self._library.espeak_Initialize(SYNCHRONOUS, BUFFER, data.encode(), DONT_EXIT)
            if self.sample_rate <= 0:
                raise DataError(f"{data}: eSpeak NG cannot read its data; install espeakng-loader again")
            if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
                raise DataError(f"{data}: eSpeak NG has no voice {voice}; install espeakng-loader again")
        self._chunks: list[bytes] = []
        self._callback = CALLBACK(self._collect)  # kept: the library holds only its address
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_ng_SetRandSeed(seed)

    def _collect(self, samples: ctypes._Pointer[ctypes.c_short], count: int, _events: int) -> int:
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0  # go on

    def say(self, text: str, *, rate: int, pitch: int, pitch_range: int) -> np.ndarray:
        """Speech as float32 (S,) at `sample_rate`; rate in words per minute, pitch and its range 0..100."""
        for parameter, value in ((RATE, rate), (PITCH, pitch), (RANGE, pitch_range), (VOLUME, 80)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._chunks.clear()
        encoded = text.encode()
        status = self._library.espeak_Synth(encoded, len(encoded) + 1, 0, BY_CHARACTER, 0, UTF8, None, None)
        wave = np.frombuffer(b"".join(self._chunks), np.int16)
        if status != 0 or not wave.any():
            raise DataError(f"eSpeak NG made no sound for {text!r} (status {status}); install espeakng-loader again")
        return wave.astype(np.float32) / 32768
