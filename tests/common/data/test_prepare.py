"""Loaders of real data: bad files, buckets, several lists, segments, conversions, and what a worker tells."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from common.data import dataset as dataset_module
from common.data.batching import Bucketing
from common.data.loader import MOST_REPLACED
from common.data.manifest import join_manifests, read_manifest
from common.data.masking import SpanMasking
from common.data.prepare import train_loader, valid_loader
from common.data.segment import RandomSegment
from common.data.selection import LengthLimits
from common.errors import DataError

RATE = 16000
ROOT = Path(__file__).resolve().parents[3]


def num_frames(samples):
    return (samples - 400) // 320 + 1


def make_corpus(folder: Path, lengths: list[int], name: str = "train") -> Path:
    """A list of utterances of noise; returns its path."""
    rng = np.random.default_rng(0)
    (folder / name).mkdir(parents=True)
    lines = [str(folder / name)]
    for number, length in enumerate(lengths):
        soundfile.write(folder / name / f"{name}{number}.wav", rng.uniform(-0.5, 0.5, length), RATE)
        lines.append(f"{name}{number}.wav\t{length}")
    (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder / f"{name}.tsv"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    lengths = np.random.default_rng(1).integers(1000, 6000, 40).tolist()
    return make_corpus(tmp_path_factory.mktemp("corpus"), lengths)


@pytest.fixture
def copied(corpus, tmp_path):
    """A corpus whose files can be spoilt."""
    shutil.copytree(corpus.parent, tmp_path, dirs_exist_ok=True)
    lines = corpus.read_text().splitlines()
    (tmp_path / "train.tsv").write_text("\n".join([str(tmp_path / "train"), *lines[1:]]) + "\n")
    return tmp_path / "train.tsv"


SETTINGS = {
    "sample_rate": RATE,
    "normalize": False,
    "num_frames": num_frames,
    "seed": 5,
    "max_tokens": 16_000,
    "crop": True,
    "update_freq": 2,
    "time_mask": SpanMasking(0.65, 3, min_masks=2),
}


def training(tsv, **changes):
    return train_loader(read_manifest(tsv), **SETTINGS | changes)


def epoch(loader):
    return [batch for _ in range(loader.updates_per_epoch) for batch in loader.next_update()]


def rows(batches):
    """Every row by its id."""
    return {
        name: row[:length].numpy().tobytes()
        for batch in batches
        for name, row, length in zip(batch.ids, batch.audio_BS, batch.lengths_B.tolist(), strict=True)
    }


# ---- Bad files -------------------------------------------------------------------------------------------------------


def spoil(tsv: Path, numbers) -> None:
    for number in numbers:
        (tsv.parent / "train" / f"train{number}.wav").write_bytes(b"no audio at all")


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_left_out_and_nothing_else_changes(copied, workers):
    settings = {"crop": False, "skip_bad": True, "max_bad_share": 0.1, "num_workers": workers}
    whole = rows(epoch(training(copied, **settings)))
    spoil(copied, (3, 17))
    listed = copied.parent / "bad_files.txt"
    loader = training(copied, bad_files=listed, **settings)
    left = rows(epoch(loader))
    assert left == {name: audio for name, audio in whole.items() if name not in ("train3", "train17")}
    lines = sorted(listed.read_text().splitlines())
    assert [line.split(": ")[0] for line in lines] == [f"{copied}:19", f"{copied}:5"]
    assert all("not audio, truncated or damaged" in line for line in lines)
    epoch(loader)
    assert len(listed.read_text().splitlines()) == 2
    loader.close()


def test_too_many_bad_files_end_the_run(copied):
    spoil(copied, range(5))
    loader = training(copied, skip_bad=True, max_bad_share=0.1)
    with pytest.raises(DataError, match=r"5 of 40 files cannot be used, more than --max_bad_share 0.1 allows"):
        epoch(loader)


def test_without_leave_a_bad_file_is_an_error(copied):
    spoil(copied, [7])
    with pytest.raises(DataError, match=rf"^{copied}:9: "):
        epoch(training(copied))


def test_a_sub_batch_without_a_usable_file_is_replaced_by_the_next(copied):
    loader = training(copied, skip_bad=True, max_bad_share=1.0, max_tokens=6000, update_freq=1)
    plan = loader._maker.sub_batches
    gone = int(np.argmax(plan.rows))
    assert plan.rows[gone] > 1
    names = [loader._maker._dataset.manifest[place].id for place in plan.utterances(gone)]
    spoil(copied, [name.removeprefix("train") for name in names])
    batches = epoch(loader)
    assert all(batch.num_rows for batch in batches)
    found = [name for batch in batches for name in batch.ids]
    instead = [loader._maker._dataset.manifest[place].id for place in plan.utterances((gone + 1) % len(plan))]
    assert not set(found) & set(names)
    assert [found.count(name) for name in instead] == [2] * len(instead)


def test_a_corpus_without_a_usable_file_ends_with_the_cause(copied):
    spoil(copied, range(40))
    assert MOST_REPLACED > 40
    with pytest.raises(DataError, match=r"not audio, .*; and so it is with all files of many sub-batches"):
        training(copied, skip_bad=True, max_bad_share=1.0).next_update()


def test_bad_files_of_validation_are_left_out_as_well(copied):
    settings = {name: SETTINGS[name] for name in ("sample_rate", "normalize", "num_frames", "seed", "max_tokens")}
    spoil(copied, [0, 1, 2])
    manifest = read_manifest(copied)
    with pytest.raises(DataError, match=r"train.tsv:[234]: "):
        list(valid_loader(manifest, **settings))
    for tokens in (16_000, 1000):  # in the second case every utterance is a batch
        listed = copied.parent / f"bad{tokens}.txt"
        loader = valid_loader(manifest, **settings | {"max_tokens": tokens}, skip_bad=True, bad_files=listed)
        batches = list(loader)
        names = [name for batch in batches for name in batch.ids]
        assert sorted(names) == sorted({f"train{number}" for number in range(3, 40)})
        assert [manifest[place].id for batch in batches for place in batch.places] == names
        assert len(listed.read_text().splitlines()) == 3
    spoil(copied, range(25))
    with pytest.raises(DataError, match="of 40 files cannot be used, more than --max_bad_share 0.5"):
        list(valid_loader(manifest, **settings, skip_bad=True))


# ---- Choosing, cutting, batching -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 3, 7])
def test_rows_are_padded_to_the_end_of_their_bucket(corpus, number):
    loader = training(corpus, crop=False, bucketing=Bucketing(number))
    lengths = read_manifest(corpus).num_samples
    ends = sorted({np.sort(lengths)[int(np.floor((len(lengths) - 1) * (i + 1) / number))] for i in range(number)})
    batches = epoch(loader)
    assert {batch.audio_BS.shape[1] for batch in batches} <= set(ends)
    for batch in batches:
        width = batch.audio_BS.shape[1]
        assert width == min(end for end in ends if end >= batch.lengths_B.max())
        assert batch.audio_BS.numel() <= 16_000
        assert batch.padded == bool((batch.lengths_B < width).any())
        assert batch.mask_BT.shape[1] == num_frames(width)
        for row, length in enumerate(batch.lengths_B.tolist()):
            assert not batch.audio_BS[row, length:].any()
            assert not batch.mask_BT[row, num_frames(length) :].any()


def test_weights_of_lists_say_how_often_they_come(tmp_path):
    first = read_manifest(make_corpus(tmp_path, [1000] * 20, "a"))
    second = read_manifest(make_corpus(tmp_path, [1000] * 20, "b"))
    loader = train_loader(
        join_manifests([first, second]), **SETTINGS | {"max_tokens": 1000, "update_freq": 1}, dataset_weights=[1, 0.25]
    )
    epochs = [[batch.ids[0] for batch in epoch(loader)] for _ in range(4)]
    for names in epochs:
        assert sum(name.startswith("a") for name in names) == 20
        assert sum(name.startswith("b") for name in names) == 5
    assert sorted(name for names in epochs for name in names if name.startswith("b")) == sorted(
        f"b{number}" for number in range(20)
    )


def test_a_temperature_lifts_the_small_list(tmp_path):
    first = read_manifest(make_corpus(tmp_path, [1000] * 32, "a"))
    second = read_manifest(make_corpus(tmp_path, [1000] * 8, "b"))
    counts = []
    for temperature in (1, 2, 1e9):
        loader = train_loader(
            join_manifests([first, second]),
            **SETTINGS | {"max_tokens": 1000, "update_freq": 1},
            dataset_temperature=temperature,
        )
        names = [batch.ids[0] for batch in epoch(loader)]
        counts.append((sum(name.startswith("a") for name in names), sum(name.startswith("b") for name in names)))
    assert counts[0] == (32, 8)
    assert counts[1] == (round(40 * 32**0.5 / (32**0.5 + 8**0.5)), round(40 * 8**0.5 / (32**0.5 + 8**0.5)))
    assert counts[2] == (20, 20)


def test_segments_shorten_what_is_planned(corpus):
    loader = training(corpus, crop=False, segment=RandomSegment(0.1))
    batches = epoch(loader)
    assert {batch.audio_BS.shape[1] for batch in batches} == {1600}
    assert max(batch.num_rows for batch in batches) == 10  # as many as the budget holds of them


def test_limits_and_joining_come_before_the_plan(corpus):
    lengths = read_manifest(corpus).num_samples
    loader = training(corpus, crop=False, limits=LengthLimits(min_sample_size=2000), join_short=0.9, update_freq=1)
    batches = epoch(loader)
    assert sum(batch.num_samples for batch in batches) == lengths[lengths >= 2000].sum()
    assert max(batch.audio_BS.shape[1] for batch in batches) > lengths.max()


# ---- What is told ----------------------------------------------------------------------------------------------------


def test_conversions_are_told(tmp_path, caplog):
    tsv = make_corpus(tmp_path, [8000] * 6)
    for number in range(4):
        soundfile.write(tmp_path / "train" / f"train{number}.wav", np.zeros((4000, 2)), 8000)
    loader = training(tsv, update_freq=1, max_tokens=8000)
    with caplog.at_level(logging.INFO):
        for _ in range(loader.updates_per_epoch + 1):
            loader.next_update()
    lines = [record.getMessage() for record in caplog.records if "->" in record.getMessage()]
    assert lines[0] == "recordings are converted when they are read: 8 kHz stereo -> 16 kHz mono"
    assert lines[1] == "converted in the first epoch: 4 files 8 kHz stereo -> 16 kHz mono"


def test_work_tells_the_storage_from_the_processor(corpus, monkeypatch):
    """A reader that sleeps is one that waits for the disk; one that computes is one that decodes."""
    original = dataset_module.read_audio

    def sleeping(*args, **options):
        time.sleep(0.02)
        return original(*args, **options)

    def computing(*args, **options):
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass
        return original(*args, **options)

    shares = {}
    for reader in (sleeping, computing):
        monkeypatch.setattr(dataset_module, "read_audio", reader)
        loader = training(corpus)
        epoch(loader)
        work = loader.take_work()
        assert work.seconds >= 0.02 * 35
        assert 0.5 * work.seconds < work.waited <= work.seconds  # all but the first update, which starts the workers
        shares[reader] = work.cpu_seconds / work.seconds
        assert loader.take_work().seconds == 0
    assert shares[sleeping] < 0.4
    assert shares[computing] > shares[sleeping] + 0.3


def test_a_worker_takes_one_processor_whatever_the_environment_says(tmp_path):
    """With OMP_NUM_THREADS=8, and files that must be resampled, a worker still has one computing thread."""
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    tsv = make_corpus(tmp_path, [16000] * 4)
    for number in range(4):
        soundfile.write(tmp_path / "train" / f"train{number}.wav", np.zeros(44100), 44100)
    program = f"""
        import sys, os
        sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
        import torch
        import test_prepare
        from common.data import dataset
        original = dataset.read_audio
        def telling(*args, **options):
            wave = original(*args, **options)
            torch.randn(512, 512) @ torch.randn(512, 512)
            print(torch.get_num_threads(), len(os.listdir("/proc/self/task")), flush=True)
            return wave
        dataset.read_audio = telling
        loader = test_prepare.training({str(tsv)!r}, num_workers=1, max_tokens=32000)
        loader.next_update()
        loader.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "16"},
    )
    assert done.returncode == 0, done.stderr
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert {threads for threads, _ in found} == {1}
    assert max(tasks for _, tasks in found) < 8  # itself, and some that wait


def test_another_plan_of_as_many_sub_batches_is_noticed(corpus, caplog):
    """Noise on the lengths, or the lines in another order: the numbers agree, and the sub-batches do not."""
    settings = {"max_tokens": 6000, "crop": False}
    first = training(corpus, **settings)
    for _ in range(3):
        first.next_update()
    state = first.state_dict()
    same = training(corpus, **settings)
    same.load_state_dict(state)
    assert same.position == 3
    for change in ({"seed": 6}, {"semi_sorted": 0.3}, {"segment": RandomSegment(0.2)}):
        other = training(corpus, **settings | change)
        caplog.clear()
        other.load_state_dict(state)
        assert other.position == 0
        assert "epoch 1 starts again" in caplog.text
    ended = training(corpus, **settings | {"semi_sorted": 0.3})
    ended.load_state_dict(state | {"position": state["updates_per_epoch"]})
    assert ended.at_epoch_end  # what is complete does not begin again
