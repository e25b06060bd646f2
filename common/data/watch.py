"""What is to be told of the files while they are read: conversions, bad files, and why training waits for data."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import distributed
from common.data.collate import Batch
from common.errors import DataError

log = logging.getLogger(__name__)
WAIT_SHARE = 0.1  # of the time; from there on its cause is told
OCCUPIED = 0.7  # share of the time in which workers work, from where on there are too few of them
MOSTLY = 0.5


class BadFiles:
    """The files that were left out: counted, listed in `path`, and too many in one pass end the run."""

    def __init__(self, path: Path | None, *, utterances: float, max_share: float) -> None:
        """`path`: where they are listed, one message a line (None: nowhere); `utterances` of this rank in a pass.

        What `path` lists already, from before the run was resumed, is not listed again.
        """
        self._path, self._utterances, self._max_share = path, utterances, max_share
        self._of_pass: set[str] = set()
        self._listed = set(path.read_text(encoding="utf-8").splitlines()) if path and path.exists() else set()

    def __len__(self) -> int:
        return len(self._of_pass)

    def begin_pass(self) -> None:
        """Count anew: the files come again."""
        self._of_pass.clear()

    def add(self, messages: Iterable[str]) -> None:
        """Take note of files. DataError where too many of a pass are bad."""
        new = [message for message in dict.fromkeys(messages) if message not in self._of_pass]
        if not new:
            return
        self._of_pass.update(new)
        unlisted = [message for message in new if message not in self._listed]
        self._listed.update(unlisted)
        for message in unlisted:
            log.warning("left out: %s", message)
        if self._path is not None and unlisted:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(f"{message}\n" for message in unlisted)
        if len(self._of_pass) > self._max_share * self._utterances:
            raise DataError(
                f"{new[-1]}; {len(self._of_pass)} of {round(self._utterances)} files cannot be used, more than "
                f"--max_bad_share {self._max_share:g} allows; check the data with utils/check_data.py, or raise it"
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
        """Log how many there were on all ranks, the first time that this is called, which all ranks do together."""
        if not self._told:
            for kind, number in sum(distributed.gather_objects(self._counts), Counter()).most_common():
                log.info("converted in the first epoch: %s files %s -> %s", f"{number:,}", kind, self._target)
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
