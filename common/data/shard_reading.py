"""Reads shards one after another: address -> members -> the clips of one worker, which are not decoded yet.

An address is a path, `pipe:COMMAND`, an http(s) address, or another one that the webdataset library opens.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import http.client
import importlib
import logging
import re
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.data.audio import AudioInfo, read_audio, read_info
from common.data.dataset import Sample, Waveforms
from common.data.manifest import Manifest
from common.data.selection import LengthLimits
from common.data.shards import COMPRESSED, REPACK, is_audio, shards_of_rank, split_name, text_of
from common.errors import ConfigError, DataError, one_line
from common.labels import spell
from common.rng import numpy_rng

log = logging.getLogger(__name__)

RETRIES = 5  # one after another without a new clip
WAIT = 0.5  # seconds before the first, twice as many before every further one
TIMEOUT = 60.0  # seconds without an answer of a server
BLOCK = 1 << 16
SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):")
BROKEN = (OSError, http.client.HTTPException, tarfile.TarError, EOFError)


# ---- Address -> members ----------------------------------------------------------------------------------------------


class Source:
    """What an address gives, to be read from beginning to end; knows at the end whether that was all."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._promised: int | None = None
        self._stream: Any
        if address.startswith(("http:", "https:")):
            self._stream = urllib.request.urlopen(address, timeout=TIMEOUT)
            length = self._stream.headers.get("Content-Length")
            self._promised = int(length) if length else None
        else:
            self._stream = _open(address)
        self._received, self._start, self._tail = 0, b"", b""

    def __str__(self) -> str:
        return self.address

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        block = self._stream.read(size)
        self._received += len(block)
        self._start = (self._start + block[:8])[:8]
        self._tail = (self._tail + block)[-tarfile.BLOCKSIZE :]
        return block

    def finish(self) -> None:
        """Read what stands behind the last member; OSError if it is not the end of a whole tar file.

        tarfile takes a stream that breaks off between two members, or a damaged header, for the end.
        """
        rest = bytearray()
        while block := self.read(BLOCK):
            rest += block.strip(b"\0")
        self.close()
        if rest or (self._tail.strip(b"\0") and not self._start.startswith(COMPRESSED)):
            raise OSError(f"truncated or damaged, after {self._received} bytes")

    def close(self) -> None:
        """End the connection or the command; OSError for a command that failed, or a connection that broke."""
        self._stream.close()
        if self._promised is not None and self._received < self._promised:
            raise OSError(f"the connection broke after {self._received} of {self._promised} bytes")


def read_shard(address: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members by extension of all clips of a shard, in order.

    A stream that breaks is opened again, and what has been taken already is passed over. DataError, naming the
    shard and the cause, when this does not help.
    """
    taken = failures = 0
    while True:
        try:
            for number, sample in enumerate(_read_once(address)):
                if number >= taken:
                    taken, failures = number + 1, 0
                    yield sample
            return
        except BROKEN as error:
            failures += 1
            if failures > RETRIES or _is_final(error):
                tries = f" ({failures} times at the same place)" if failures > 1 else ""
                raise DataError(
                    f"{address}: {_cause(error)}{tries}; check the address or command, or {REPACK}"
                ) from None
            wait = WAIT * 2 ** (failures - 1)
            log.warning("%s: %s; it is opened again in %g s", address, _cause(error), wait)
            time.sleep(wait)
        except ValueError as error:  # webdataset's for a key that has two members of one name, or an unknown address
            raise DataError(f"{address}: {one_line(error.args[0])}; {REPACK}") from None


def _read_once(address: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The clips of a shard until its stream breaks; the last one, which may lack members, only if it does not."""
    iterators = webdataset("tariterators")
    source = Source(address)
    try:
        members = iterators.tar_file_expander([{"url": address, "stream": source}])
        last = None
        for group in iterators.group_by_keys(members, keys=lambda name: split_name(name) or (None, None)):
            if last is not None:
                yield last
            last = group.pop("__key__"), {name: value for name, value in group.items() if isinstance(value, bytes)}
        source.finish()
        if last is not None:
            yield last
    except BROKEN:
        source.close()  # which knows more of the cause
        raise
    finally:
        with suppress(OSError):
            source.close()


def _open(address: str) -> Any:  # noqa: ANN401 - a file, or the library's Pipe
    """What the library opens: paths, commands, and stores for which it knows a command."""
    gopen = webdataset("gopen")
    scheme = SCHEME.match(address)
    if scheme and scheme[1] not in ("file", *gopen.gopen_schemes):
        raise ConfigError(
            f"--tarred_filepaths {address}: {scheme[1]}: is no kind of address that can be read; give a command: "
            f'"pipe:aws s3 cp {address} -"'
        )
    return gopen.gopen(address)


def _is_final(error: Exception) -> bool:
    """Whether trying again is in vain."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500 and error.code not in (408, 429)  # time-out, too many requests
    not_run = re.search(r"exit 12[67] \(read\)", str(error))  # a shell's status for a command that there is not
    return isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)) or bool(not_run)


def _cause(error: Exception) -> str:
    """One line of what went wrong."""
    text = str(error) if isinstance(error, urllib.error.HTTPError) or not error.args else str(error.args[0])
    text = text.partition(" @ ")[0]  # where webdataset puts the address
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    failed = re.search(r"exit (-?\d+) \(read\)", text)  # as webdataset tells of a command
    return f"the command ended with status {failed[1]}" if failed else one_line(text)


def webdataset(module: str) -> Any:  # noqa: ANN401 - a module without types
    """A module of the library, which only streams need; ConfigError where it is not installed."""
    try:
        return importlib.import_module(f"webdataset.{module}")
    except ModuleNotFoundError:
        raise ConfigError("--streaming: needs the package webdataset; pip install webdataset") from None


# ---- Members -> the clips of one worker ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StreamedClip:
    """A clip that is not decoded yet: samples [start, start + num_samples) at the model's rate of `audio`.

    planned: the most samples that it gives in training; where, text_where: for messages.
    """

    id: str
    audio: bytes
    start: int
    num_samples: int
    planned: int
    text: str | None
    where: str
    text_where: str


@dataclass
class Tally:
    """What a worker left out since it was last asked: clips outside the limits of length, and bad ones."""

    left_out: int = 0
    bad: list[str] = field(default_factory=list)

    def clear(self) -> None:
        """Begin anew."""
        self.left_out = 0
        self.bad.clear()


@dataclass(frozen=True)
class Part:
    """Which clips of which shards are those of one worker of one rank.

    With "scatter" a rank has a block of the shuffled shards and its workers take turns in it; the shards that remain
    are read by all workers of all ranks, which take turns clip by clip. With "replicate" every rank reads all
    shards. Where a rank has fewer shards than workers, these read all of its shards and take turns clip by clip.
    """

    strategy: str
    rank: int
    world: int
    worker: int
    workers: int
    seed: int

    def shards(self, shards: Sequence[str], epoch_pass: int) -> list[tuple[list[str], int, int]]:
        """(shards, turn, turns): of all clips of these shards, those with number % turns == turn are the worker's."""
        replicated = (self.rank,) if self.strategy == "replicate" else ()
        rng = numpy_rng(self.seed, "shards", epoch_pass, *replicated)
        order = [shards[place] for place in rng.permutation(len(shards)).tolist()]
        block = shards_of_rank(order, self.strategy, self.rank, self.world)
        if len(block) >= self.workers:
            parts = [(block[self.worker :: self.workers], 0, 1)]
        else:
            parts = [(block, (self.worker + epoch_pass) % self.workers, self.workers)]
        if self.strategy == "scatter" and (rest := order[len(block) * self.world :]):
            turns = self.world * self.workers
            parts.append((rest, (self.rank * self.workers + self.worker + epoch_pass) % turns, turns))
        return parts

    def members(self, shards: Sequence[str], epoch_pass: int) -> Iterator[tuple[str, str, dict[str, bytes]]]:
        """Shard, key and members of the worker's clips in a pass."""
        for names, turn, turns in self.shards(shards, epoch_pass):
            number = 0
            for name in names:
                for clip, found in read_shard(name):
                    if number % turns == turn:
                        yield name, clip, found
                    number += 1


def shuffled(items: Iterable[Any], number: int, rng: np.random.Generator) -> Iterator[Any]:
    """The same in random order through a buffer of `number`: none comes more than number - 1 places early."""
    buffer: list[Any] = []
    for item in items:
        buffer.append(item)
        if len(buffer) >= number:
            pick = int(rng.integers(len(buffer)))
            buffer[pick], buffer[-1] = buffer[-1], buffer[pick]
            yield buffer.pop()
    yield from (buffer[place] for place in rng.permutation(len(buffer)).tolist())


class ClipReader:
    """Makes clips of members: which there are, which of them are trained on, and their samples."""

    def __init__(
        self,
        waveforms: Waveforms,
        *,
        limits: LengthLimits,
        num_frames: Callable[[Any], Any],
        max_sample_size: int | None,
        seed: int,
        encode: Callable[[str, str], list[int]] | None,
        manifest: Manifest | None,
        skip_bad: bool,
        max_tokens: int | None = None,
        short: str = "keep",
    ) -> None:
        """`manifest`: its utterances are trained on, and no others; it may cut recordings, and give texts.

        `max_tokens`: of a sub-batch, which a clip must fit; `short`: see --stream_short.
        """
        self._max_tokens, self._short = max_tokens, short
        self._waveforms, self._limits, self._num_frames = waveforms, limits, num_frames
        self._max_sample_size, self._seed, self._encode = max_sample_size, seed, encode
        self._manifest, self._entries = manifest, None if manifest is None else _entries(manifest)
        self._skip_bad = skip_bad

    def clips(self, shard: str, name: str, members: Mapping[str, bytes], tally: Tally) -> list[StreamedClip]:
        """The clips of a key that are trained on; what is left out is counted."""
        found: list[StreamedClip] = []
        for extension, audio in members.items():
            if is_audio(extension):
                stem = f"{name}.{extension}".rpartition(".")[0]
                try:
                    found += self._parts(f"{shard}: {name}.{extension}", stem, extension, audio, members, tally)
                except DataError as error:
                    if not self._skip_bad:
                        raise
                    tally.bad.append(str(error))
        return found

    def _parts(
        self, where: str, name: str, extension: str, audio: bytes, members: Mapping[str, bytes], tally: Tally
    ) -> Iterator[StreamedClip]:
        """The parts of one recording that are trained on: all of it, or what the manifest names."""
        places = [None] if self._entries is None else self._entries.get(name, [])
        if not places:
            return
        total = read_info(audio, where).num_samples(self._waveforms.sample_rate)
        for place in places:
            start, number, own_name, text, text_where = 0, total, name, None, where
            if place is not None and self._manifest is not None:
                utterance = self._manifest[place]
                own_name, text, text_where = utterance.id, utterance.text, self._manifest.text_where(place)
                if utterance.clip.start is not None:
                    start = round(utterance.clip.start * self._waveforms.sample_rate)
                    number = min(utterance.num_samples, total - start)
            if text is None and (words := text_of(members, extension, where)) is not None:
                text = spell(words)
            if not self._is_long_enough(number):
                tally.left_out += 1
                continue
            planned = self._planned(number, where)
            yield StreamedClip(own_name, audio, start, number, planned, text, where, text_where)

    def _is_long_enough(self, number: int) -> bool:
        """Whether so many samples are within all limits and give a frame."""
        kept = self._limits.kept(np.array([number]), self._waveforms.sample_rate).values()
        too_short = self._short == "skip" and number < (self._max_sample_size or 0)
        return not too_short and number > 0 and self._num_frames(number) > 0 and all(one.all() for one in kept)

    def _planned(self, number: int, where: str) -> int:
        """The most samples that a clip of so many gives in training. DataError where it cannot be trained on."""
        planned = int(self._waveforms.planned(np.array([number]))[0])
        if self._max_sample_size is not None:
            if self._encode is not None and planned > self._max_sample_size:
                raise DataError(
                    f"{where}: {planned} samples, and --max_sample_size {self._max_sample_size} would cut audio but "
                    "not its labels; leave out long clips with --max_duration"
                )
            planned = self._max_sample_size if self._short == "pad" else min(planned, self._max_sample_size)
        if self._max_tokens is not None and planned > self._max_tokens:
            raise DataError(
                f"{where}: {planned} samples, more than --max_tokens {self._max_tokens}; give a larger one, or leave "
                "out long clips with --max_duration"
            )
        return planned

    def sample(self, clip: StreamedClip, *, longest: int, epoch_pass: int) -> Sample:
        """The samples of a clip, at most `longest`, and its labels."""
        converted: list[AudioInfo] = []

        def read(start: int, frames: int) -> np.ndarray:
            return read_audio(
                clip.audio,
                sample_rate=self._waveforms.sample_rate,
                start=clip.start + start,
                frames=frames,
                where=clip.where,
                on_convert=converted.append,
            )

        labels = None
        if self._encode is not None:
            if clip.text is None:
                raise DataError(f'{clip.where}: no text (a .txt, or "text" in a .json), but labels are needed; add it')
            labels = self._encode(clip.text, clip.text_where)
        wave = self._waveforms.make(read, clip.num_samples, longest, (self._seed, epoch_pass, clip.where, clip.id))
        if self._short == "pad":
            wave = np.pad(wave, (0, longest - len(wave)))
        kinds = tuple({info.kind: None for info in converted})
        return Sample(id=clip.id, audio_S=wave, text=clip.text, labels=labels, converted=kinds)

    def usable(self, clips: Sequence[StreamedClip], longest: int, epoch_pass: int, tally: Tally) -> list[Sample]:
        """The samples of a sub-batch that can be read; others are an error, or go to the tally."""
        samples = []
        for clip in clips:
            try:
                samples.append(self.sample(clip, longest=longest, epoch_pass=epoch_pass))
            except DataError as error:
                if not self._skip_bad:
                    raise
                tally.bad.append(str(error))
        return samples


def _entries(manifest: Manifest) -> dict[str, list[int]]:
    """Places in the manifest by key; entries of one file (their ids end in -sub1, ...) have the key of the first."""
    keys: dict[Path, str] = {}
    entries: dict[str, list[int]] = {}
    for place in range(len(manifest)):
        utterance = manifest[place]
        one_file = utterance.clip.span is None
        name = keys.setdefault(utterance.clip.path, utterance.id) if one_file else utterance.id
        entries.setdefault(name.removeprefix("./"), []).append(place)
    return entries
