"""What is to be told of the files while they are read: conversions, bad files, and why training waits for data."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.data.collate import Batch
from common.errors import DataError

log = logging.getLogger(__name__)
WAIT_SHARE = 0.1  # of the time; from there on its cause is told
OCCUPIED = 0.7  # share of the time in which workers work, from where on there are too few of them
MOSTLY = 0.5


class BadFiles:
    """The files that were left out: counted, listed in `path`, and too many end the run."""

    def __init__(self, path: Path | None, *, utterances: int, max_share: float) -> None:
        """`path`: where they are listed, one message a line (None: nowhere); `utterances`: of the whole list."""
        self._path, self._utterances, self._max_share = path, utterances, max_share
        self._found: set[str] = set()

    def __len__(self) -> int:
        return len(self._found)

    def add(self, messages: Iterable[str]) -> None:
        """Take note of files. DataError where more than max_share of the utterances are bad."""
        new = [message for message in dict.fromkeys(messages) if message not in self._found]
        if not new:
            return
        for message in new:
            log.warning("left out: %s", message)
        self._found.update(new)
        if self._path is not None:
            with self._path.open("a" if len(self._found) > len(new) else "w", encoding="utf-8") as file:
                file.writelines(f"{message}\n" for message in new)
        if len(self._found) > self._max_share * self._utterances:
            raise DataError(
                f"{new[-1]}; {len(self._found)} of {self._utterances} files cannot be used, which is more than "
                f"--max_bad_share {self._max_share:g}; check the data with utils/check_data.py"
            )


class Conversions:
    """Tells every kind of recording that is converted: when it comes first, and once how many there were."""

    def __init__(self, sample_rate: int) -> None:
        self._target = f"{sample_rate / 1000:g} kHz mono"
        self._counts: Counter[str] = Counter()
        self._told = False

    def add(self, kinds: Iterable[str]) -> None:
        """Take note of recordings of these kinds, one entry each."""
        for kind in kinds:
            if kind not in self._counts:
                log.info("recordings are converted when they are read: %s -> %s", kind, self._target)
            self._counts[kind] += 1

    def tell(self) -> None:
        """Log how many there were, the first time that this is called."""
        if not self._told:
            for kind, number in self._counts.most_common():
                log.info("%s files %s -> %s", f"{number:,}", kind, self._target)
        self._told = True


@dataclass
class Work:
    """Seconds that workers took to make batches, a processor's part of them, and those for which training waited."""

    num_workers: int
    waited: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    converted: bool = False

    def add(self, batches: Sequence[Batch], waited: float) -> None:
        """Take note of batches that were handed out."""
        self.waited += waited
        for batch in batches:
            self.seconds += batch.news.seconds
            self.cpu_seconds += batch.news.cpu_seconds
            self.converted |= bool(batch.news.converted)

    def cause_of_waiting(self, seconds: float, cpus: int) -> str:
        """Why training waited for data in these seconds, and which flag helps; "" where it did not wait long.

        `cpus`: processors for this training process and its workers.
        """
        if self.waited <= WAIT_SHARE * seconds:
            return ""
        if self.num_workers == 0:
            return "audio is read between the updates; set --num_workers to 1 or more"
        if self.seconds < OCCUPIED * seconds * self.num_workers:
            return "the workers are idle most of the time: they have just started, or an update needs many sub-batches"
        if self.cpu_seconds < MOSTLY * self.seconds:
            return (
                "the workers wait for the storage; copy the data to a local disk, pack them with utils/make_shards.py, "
                f"or raise --num_workers (now {self.num_workers})"
            )
        if self.num_workers < cpus - 1:
            return f"too few workers decode; raise --num_workers (now {self.num_workers}; there are {cpus} processors)"
        if self.converted:
            return "decoding and resampling take all processors; convert the audio to FLAC or WAV of the model's rate"
        return "decoding takes all processors; WAV is decoded fastest, or use a machine with more of them per GPU"
