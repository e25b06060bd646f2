"""Faults: damaged checkpoints, temporary files left behind, full disks."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import random
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.fault_kills import Try, finish, newest
from benchmarks.fault_runs import PATIENCE, HungError, SkippedError, Training, WrongError
from benchmarks.faults_made import PRETRAIN, SAVED, UPDATES, Bench, Recipe, Reference
from common import checkpoint
from common.errors import CheckpointError
from common.torch_file import DamagedError

BEFORE, NEWEST = UPDATES - 6, UPDATES - 3  # updates of the checkpoints in a folder to which damage is done
BYTES_OF_TABLES = 2**14  # at the beginning and at the end of a file, where its tables lie
TMPFS_CHECKPOINTS = 12  # that the small disk has room for
FULL_DISK = r"^error: .*(No space left|File too large|the disk has)"


def folder_of_two(bench: Bench, recipe: Recipe) -> tuple[Path, Path]:
    """A folder with two checkpoints of the uninterrupted run, and the newest of them."""
    folder = bench.new_folder()
    for update in (BEFORE, NEWEST):
        shutil.copy(checkpoint.update_path(bench.reference(recipe).folder, update), folder)
    return folder, checkpoint.update_path(folder, NEWEST)


def size_of_newest(bench: Bench) -> int:
    """Bytes of the newest one; those of other updates differ a little."""
    return checkpoint.update_path(bench.reference(PRETRAIN).folder, NEWEST).stat().st_size


# ---- Damage ---------------------------------------------------------------------------------------------------------


def truncated(bench: Bench, runs: int, read: int) -> Iterator[Try]:
    """The newest checkpoint ends too early: runs that go on, and files that are only read."""
    draws = random.Random(bench.seed)  # noqa: S311 - no secrets
    size = size_of_newest(bench)
    lengths = [size - 1, size // 2, 100, *(draws.randrange(1, size) for _ in range(max(runs, read)))]

    def cut(length: int) -> Callable[[Path], str]:
        def damage(path: Path) -> str:
            os.truncate(path, length)
            return f"{length} of {size} bytes"

        return damage

    yield from _damaged(bench, [cut(length) for length in lengths], runs, read)


def flipped(bench: Bench, runs: int, read: int) -> Iterator[Try]:
    """A bit of the newest checkpoint is another one: anywhere in the file, or in its tables."""
    draws = random.Random(bench.seed)  # noqa: S311 - no secrets
    size = size_of_newest(bench)

    def flip(number: int) -> Callable[[Path], str]:
        anywhere, near_an_end = draws.randrange(size), draws.randrange(min(size, BYTES_OF_TABLES))
        place, bit = (anywhere, near_an_end, size - 1 - near_an_end)[number % 3], draws.randrange(8)

        def damage(path: Path) -> str:
            content = bytearray(path.read_bytes())
            content[place] ^= 1 << bit
            path.write_bytes(content)
            return f"bit {bit} of byte {place} of {size}"

        return damage

    yield from _damaged(bench, [flip(number) for number in range(max(runs, read))], runs, read)


def emptied(bench: Bench) -> Iterator[Try]:
    """The newest checkpoint has no content, as after a power failure on some file systems."""

    def damage(path: Path) -> str:
        os.truncate(path, 0)
        return "0 bytes"

    yield from _damaged(bench, [damage], 1, 0)


def _damaged(bench: Bench, damages: list[Callable[[Path], str]], runs: int, read: int) -> Iterator[Try]:
    """Runs that go on in a folder whose newest checkpoint is damaged, and how reading alone takes it."""
    reference = bench.reference(PRETRAIN)
    for damage in damages[:read]:
        folder, path = folder_of_two(bench, PRETRAIN)
        note = damage(path)
        found = _outcome_of_reading(reference, path)
        yield Try(wrong="" if found in ("detected", "harmless") else found, note=f"{note}: read, {found}")
        shutil.rmtree(folder)
    for damage in damages[:runs]:
        folder, path = folder_of_two(bench, PRETRAIN)
        note = damage(path)
        found = _outcome_of_reading(reference, path)
        with bench.training(PRETRAIN, folder) as run:
            status, said, last = run.end(PATIENCE), run.said, run.last_words
        wrong = f"ended with status {status}: {last}" if status else ""
        if not wrong and found == "detected" and not re.search(rf"WARNING: .*{path.name}.*the checkpoint before", said):
            wrong = f"{path.name} was not reported"
        wrong = wrong or reference.wrong_at_end(folder)
        lost, repeated = UPDATES - reference.reached(folder), (NEWEST - BEFORE) * (found == "detected")
        yield Try(wrong=wrong, updates_lost=lost, repeated=repeated, note=f"{note}: run, {found}")


def _outcome_of_reading(reference: Reference, path: Path) -> str:
    """What reading a damaged file comes to: detected, harmless, or what is wrong."""
    try:
        where = reference.differs(path)
    except DamagedError:
        return "detected"
    except CheckpointError as error:  # the run would end instead of taking the one before
        return str(error)
    return f"was read, and differs in {where}" if where else "harmless"


def all_damaged(bench: Bench) -> Iterator[Try]:
    """No checkpoint is whole: the run must say so, and not begin anew over them."""
    folder, path = folder_of_two(bench, PRETRAIN)
    damaged = sorted(folder.glob("*.pt"))
    for one in damaged:
        os.truncate(one, one.stat().st_size - 1)
    with bench.training(PRETRAIN, folder) as run:
        status, said = run.end(), run.last_words
    refused = status == 1 and "none of the 2 checkpoints can be read" in said
    kept = sorted(folder.glob("*.pt")) == damaged
    yield Try(wrong="" if refused and kept else f"status {status}: {said}", note=f"{path.name} and the one before")


def left_behind(bench: Bench) -> Iterator[Try]:
    """A temporary file of a killed run lies beside the newest checkpoint."""
    reference = bench.reference(PRETRAIN)
    folder, path = folder_of_two(bench, PRETRAIN)
    temporary = path.with_name(f".wav2vec2_update{NEWEST + 1}.pt.tmp")
    temporary.write_bytes(path.read_bytes()[: reference.size // 2])
    wrong, lost = finish(bench, PRETRAIN, folder)
    yield Try(wrong=wrong or ("it is still there" if temporary.exists() else ""), updates_lost=lost)


# ---- Disk -----------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of its own in memory at a new folder. SkippedError where mounting is not permitted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError as error:
        raise SkippedError(f"no program to mount with: {error.strerror}") from error
    if done.returncode:
        raise SkippedError(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)  # noqa: S603, S607


def full_disk(bench: Bench, shares: Sequence[float] = (0.5, 0.0)) -> Iterator[Try]:
    """The disk fills up beside a run, but for such a share of a checkpoint; later there is room again."""
    size = bench.reference(PRETRAIN).size
    for share in shares:
        with small_disk(bench.new_folder() / "disk", TMPFS_CHECKPOINTS * size) as folder:
            filler = folder / "filler"
            with bench.training(PRETRAIN, folder) as run:
                run.until("rename", SAVED)
                fill(filler, int(share * size))
                wrong = wrong_after_full_disk(bench.reference(PRETRAIN), run)
            kept = newest(folder)
            filler.unlink()
            after, lost = finish(bench, PRETRAIN, folder)
            yield Try(wrong=wrong or after, updates_lost=lost, note=f"{share:.0%} of one left, checkpoint {kept} kept")


def fill(filler: Path, left: int) -> None:
    """Fill a disk with a file, to so many bytes."""
    free = shutil.disk_usage(filler.parent).free - left
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free, 1))


def size_limit(bench: Bench) -> Iterator[Try]:
    """Files may not grow to the size of a checkpoint any more (RLIMIT_FSIZE, as quotas do); later they may."""
    reference = bench.reference(PRETRAIN)
    folder = bench.new_folder()
    with bench.training(PRETRAIN, folder) as run:
        run.until("rename", SAVED)
        resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (reference.size // 2, resource.RLIM_INFINITY))
        wrong = wrong_after_full_disk(reference, run)
    before = newest(folder)
    after, lost = finish(bench, PRETRAIN, folder)
    yield Try(wrong=wrong or after, updates_lost=lost, note=f"checkpoint {before} kept")


def wrong_after_full_disk(reference: Reference, run: Training) -> str:
    """What is wrong with how a run ended that could not save; empty if nothing is."""
    try:
        status = run.end()
    except HungError:
        raise
    except WrongError as error:
        return str(error)
    lines = [line for line in run.lines if re.search(FULL_DISK, line)]
    if status not in (1, 2) or len(lines) != 1 or "Traceback" in run.said:
        return f"ended with status {status}: {run.last_words}"
    left = newest(run.folder)
    return "" if left and reference.reached(run.folder) == left else "the checkpoint before is not what it was"
