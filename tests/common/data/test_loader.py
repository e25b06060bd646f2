"""Loaders: the same batches for any layout, any number of workers and after any interruption."""

# SPDX-License-Identifier: Apache-2.0
import logging
import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from common.data import workers as workers_module
from common.data.audio import normalize as normalized
from common.data.collate import Batch
from common.data.manifest import read_manifest
from common.data.masking import SpanMasking
from common.data.prepare import train_loader, valid_loader
from common.data.selection import LengthLimits
from common.errors import ConfigError, DataError

RATE = 16000
ROOT = Path(__file__).resolve().parents[3]


def num_frames(samples):
    return (samples - 400) // 320 + 1


def encode(line, where):
    symbols = {"A": 4, "B": 5, "|": 6}
    try:
        return [symbols[symbol] for symbol in line.split()]
    except KeyError as error:
        raise DataError(f"{where}: {error} is not in the dictionary") from None


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A list of 41 utterances whose samples tell their number and place."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    lengths = rng.integers(1000, 6000, 41)
    lengths[::5] = 5500
    lines = ["."]
    for number, length in enumerate(lengths.tolist()):
        wave = (number * 10_000 + np.arange(length)) / 2**20
        soundfile.write(folder / f"{number}.wav", wave.astype(np.float32), RATE, subtype="FLOAT")
        lines.append(f"{number}.wav\t{length}")
    (folder / "train.tsv").write_text("\n".join(lines) + "\n")
    (folder / "train.ltr").write_text("".join(f"{'A ' * (n % 4)}B |\n" for n in range(41)))
    return folder


def training(corpus, **changes):
    settings = {
        "sample_rate": RATE,
        "normalize": False,
        "num_frames": num_frames,
        "seed": 5,
        "max_tokens": 16_000,
        "crop": True,
        "max_sample_size": 5000,
        "time_mask": SpanMasking(0.65, 3, min_masks=2),
        "update_freq": 4,
    }
    return train_loader(read_manifest(corpus / "train.tsv"), **settings | changes)


def validation(corpus, labels=None, **changes):
    settings = {"sample_rate": RATE, "normalize": False, "num_frames": num_frames, "seed": 5, "max_tokens": 16_000}
    return valid_loader(read_manifest(corpus / "train.tsv", labels), **settings | changes)


def content(batches):
    """Everything in some batches, sub-batch by sub-batch, without the padding of joining."""
    found = {}
    for batch in batches:
        row = 0
        for part in batch.sub_batches:
            rows = slice(row, row + part.rows)
            row += part.rows
            assert not batch.audio_BS[rows, part.samples :].any()
            found[part.index] = (
                part,
                batch.ids[rows],
                batch.audio_BS[rows, : part.samples].numpy().tobytes(),
                batch.mask_BT[rows, : part.frames].numpy().tobytes(),
            )
    return found


def same(first, second):
    return content(first) == content(second)


def test_every_utterance_is_validated_once_whole_and_on_one_rank(corpus):
    for world in (1, 3, 50):
        ids, samples = [], 0
        for rank in range(world):
            loader = validation(corpus, rank=rank, world=world)
            batches = list(loader)
            assert len(loader) == len(batches)
            ids += [name for batch in batches for name in batch.ids]
            samples += sum(batch.num_samples for batch in batches)
            assert list(loader) == [] or same_ids(batches, list(loader))
        assert sorted(ids, key=int) == [str(n) for n in range(41)]
        assert samples == read_manifest(corpus / "train.tsv").num_samples.sum()


def same_ids(first, second):
    return [batch.ids for batch in first] == [batch.ids for batch in second]


def test_an_utterance_above_the_budget_is_validated_alone(corpus):
    manifest = read_manifest(corpus / "train.tsv")
    batches = list(validation(corpus, max_tokens=4000))
    assert sum(batch.num_samples for batch in batches) == manifest.num_samples.sum()
    assert all(batch.num_rows == 1 or batch.audio_BS.numel() <= 4000 for batch in batches)
    assert {1, 2} <= {batch.num_rows for batch in batches}
    sizes = [list(validation(corpus, max_tokens=None, max_sentences=8))[place].num_rows for place in (0, -1)]
    assert sizes == [8, 1]


@pytest.mark.parametrize("pad", [False, True])
def test_rows_are_pieces_of_their_files_within_the_budget(corpus, pad):
    loader = training(corpus, crop=not pad, update_freq=1)
    sizes = read_manifest(corpus / "train.tsv").num_samples
    starts = set()
    for _ in range(loader.updates_per_epoch * 3):
        (batch,) = loader.next_update()
        assert batch.num_rows * batch.audio_BS.shape[1] <= 16_000
        assert batch.padded == (len(set(batch.lengths_B.tolist())) > 1)
        if not pad:
            assert not batch.padded
        for name, row, length in zip(batch.ids, batch.audio_BS, batch.lengths_B.tolist(), strict=True):
            assert length <= 5000
            assert length == min(5000, sizes[int(name)]) or not pad
            numbers = (row[:length] * 2**20).round().long()
            start = int(numbers[0]) - int(name) * 10_000
            assert 0 <= start <= sizes[int(name)] - length
            assert torch.equal(numbers, int(numbers[0]) + torch.arange(length))
            assert not row[length:].any()
            if sizes[int(name)] == 5500:
                starts.add(start)
    assert len(starts) > 5  # crops are random


def test_an_utterance_is_normalized_before_it_is_cropped(corpus):
    loader, plain = (training(corpus, normalize=flag, update_freq=1) for flag in (True, False))
    (batch,), (raw,) = loader.next_update(), plain.next_update()
    for name, row, piece in zip(batch.ids, batch.audio_BS, raw.audio_BS, strict=True):
        whole, _ = soundfile.read(corpus / f"{name}.wav", dtype="float32")
        start = int((piece[0] * 2**20).round()) - int(name) * 10_000
        np.testing.assert_array_equal(row, normalized(whole)[start : start + len(row)])


@pytest.mark.parametrize(("world", "concat", "update_freq"), [(1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1), (1, 2, 2)])
def test_every_layout_reads_the_same_sub_batches_crops_and_masks(corpus, world, concat, update_freq):
    single = training(corpus)
    ranks = [training(corpus, rank=rank, world=world, concat=concat, update_freq=update_freq) for rank in range(world)]
    for _ in range(single.updates_per_epoch * 2):
        expected = content(single.next_update())
        found = {}
        for loader in ranks:
            batches = loader.next_update()
            assert len(batches) == update_freq
            assert all(len(batch.sub_batches) == concat for batch in batches)
            found |= content(batches)
        assert list(expected) == [0, 1, 2, 3]
        assert found == expected


def test_workers_do_not_change_the_batches(corpus):
    loaders = [training(corpus, num_workers=workers, concat=2, update_freq=2) for workers in (0, 2)]
    for _ in range(loaders[0].updates_per_epoch * 2 + 1):
        first, second = (loader.next_update() for loader in loaders)
        assert same(first, second)
        assert all(torch.equal(a.masked_R, b.masked_R) for a, b in zip(first, second, strict=True))
    assert (loaders[0].epoch, loaders[0].position) == (loaders[1].epoch, loaders[1].position) == (3, 1)
    loaders[1].close()
    valid = [list(validation(corpus, num_workers=workers)) for workers in (0, 2)]
    assert same_ids(*valid)
    assert all(torch.equal(a.audio_BS, b.audio_BS) for a, b in zip(*valid, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_continues_the_uninterrupted_order(corpus, workers):
    whole = training(corpus)
    states, updates = [whole.state_dict()], []
    for _ in range(whole.updates_per_epoch + 2):
        updates.append(whole.next_update())
        states.append(whole.state_dict())
    for done in range(len(updates) if workers == 0 else 2):
        resumed = training(corpus, num_workers=workers)
        resumed.next_update()  # whatever was prefetched before is forgotten
        resumed.load_state_dict(states[done])
        for expected in updates[done : done + 2]:
            assert same(resumed.next_update(), expected)
        assert resumed.state_dict() == states[min(done + 2, len(updates))]
        resumed.close()


def test_the_position_counts_what_was_handed_out(corpus):
    loader = training(corpus, num_workers=2)
    assert (loader.epoch, loader.position, loader.at_epoch_end) == (1, 0, False)
    for update in range(1, loader.updates_per_epoch + 1):
        loader.next_update()
        assert (loader.epoch, loader.position) == (1, update)
    assert loader.at_epoch_end
    loader.next_update()
    assert (loader.epoch, loader.position) == (2, 1)
    assert loader.take_work().waited > 0
    assert loader.take_work().waited == 0
    loader.close()


def test_a_checkpoint_of_other_batches_starts_its_epoch_again(corpus, caplog):
    loader = training(corpus)
    loader.next_update()
    state = loader.state_dict() | {"epoch": 4}
    other = training(corpus, max_tokens=12_000)
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(state)
    assert "sub_batches" in caplog.text
    assert (other.epoch, other.position) == (4, 0)


def test_reading_does_not_touch_the_global_generators(corpus):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 2):
        loader = training(corpus, num_workers=workers)
        loader.next_update()
        loader.close()
    list(validation(corpus))
    assert torch.equal(before, torch.get_rng_state())


def test_short_utterances_are_dropped_in_training_only_and_reported(corpus, caplog):
    sizes = read_manifest(corpus / "train.tsv").num_samples
    with caplog.at_level(logging.INFO):
        loader = training(corpus, limits=LengthLimits(2500), update_freq=1)
    kept = int((sizes >= 2500).sum())
    assert f"{kept} utterances" in caplog.text
    assert f"{41 - kept} utterances" in caplog.text
    assert "hours" in caplog.text
    assert "cropping" in caplog.text
    ids = {name for _ in range(loader.updates_per_epoch) for name in loader.next_update()[0].ids}
    assert {int(name) for name in ids} == set(np.flatnonzero(sizes >= 2500).tolist())
    with pytest.raises(DataError, match="all 41 utterances of train are left out by --min_sample_size 9000"):
        training(corpus, limits=LengthLimits(9000))


def test_fine_tuning_pads_masks_and_encodes(corpus):
    manifest = read_manifest(corpus / "train.tsv", corpus / "train.ltr")
    loader = train_loader(
        manifest,
        sample_rate=RATE,
        normalize=False,
        num_frames=num_frames,
        seed=5,
        max_tokens=16_000,
        crop=False,
        time_mask=SpanMasking(0.5, 2, min_masks=2),
        channel_mask=SpanMasking(0.5, 8),
        channels=32,
        encode=encode,
        concat=2,
    )
    (batch,) = loader.next_update()
    assert batch.lengths_B.tolist() == [manifest.num_samples[int(name)] for name in batch.ids]
    assert batch.label_lengths == tuple(int(name) % 4 + 2 for name in batch.ids)
    assert batch.texts == tuple(manifest[int(name)].text for name in batch.ids)
    for row, length in zip(batch.labels_BL.tolist(), batch.label_lengths, strict=True):
        assert row[:length] == [4] * (length - 2) + [5, 6]
        assert set(row[length:]) <= {1}
    assert batch.channel_mask_BD.shape == (batch.num_rows, 32)
    frames = torch.tensor(batch.frame_lengths)
    assert not (batch.mask_BT & (torch.arange(batch.mask_BT.shape[1]) >= frames[:, None])).any()


def test_labels_are_checked_before_the_first_update(corpus, tmp_path):
    labels = tmp_path / "bad.ltr"
    labels.write_text("A |\n" * 20 + "A ? |\n" + "B |\n" * 20)
    with pytest.raises(DataError, match=r"bad.ltr:21: '\?' is not in the dictionary"):
        validation(corpus, labels, encode=encode)
    with pytest.raises(DataError, match="labels are needed"):
        validation(corpus, encode=encode)


def test_impossible_settings_name_their_flag(corpus):
    with pytest.raises(ConfigError, match="--max_tokens 4000"):
        training(corpus, max_tokens=4000)
    with pytest.raises(ConfigError, match="--max_sample_size 399"):
        training(corpus, max_sample_size=399)
    manifest = read_manifest(corpus / "train.tsv", corpus / "train.ltr")
    with pytest.raises(ConfigError, match="--max_sample_size 5000: would cut audio but not its labels"):
        train_loader(
            manifest,
            sample_rate=RATE,
            normalize=False,
            num_frames=num_frames,
            seed=5,
            max_tokens=16_000,
            crop=False,
            max_sample_size=5000,
            encode=encode,
        )


def test_an_utterance_below_the_receptive_field_is_refused_with_its_line(tmp_path):
    (tmp_path / "train.tsv").write_text(".\na.wav\t1000\nb.wav\t399\n")
    for make in (training, validation):
        with pytest.raises(DataError, match=r"train.tsv:3: .*b.wav has 399 samples, .*--min_sample_size"):
            make(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_arrives_as_it_is(tmp_path, workers):
    soundfile.write(tmp_path / "a.wav", np.zeros(1000), RATE)
    (tmp_path / "train.tsv").write_text(".\na.wav\t1000\nb.wav\t1000\n")
    loader = training(tmp_path, num_workers=workers, update_freq=1)
    with pytest.raises(DataError) as caught:
        [loader.next_update() for _ in range(3)]
    assert str(caught.value).startswith(f"{tmp_path / 'train.tsv'}:3: {tmp_path / 'b.wav'}: no such file;")
    assert "Traceback" not in str(caught.value)
    loader.close()
    with pytest.raises(DataError, match=r"train.tsv:3"):
        list(validation(tmp_path, num_workers=workers))


class FakeStream:
    """A stream of a GPU: how much work it was given, and how much of another's comes before what it is given next."""

    def __init__(self):
        self.given, self.behind = 0, {}

    def wait_stream(self, other):
        self.behind[other] = other.given


class FakeGpu:
    """A device whose copies are only noted: batch, place on the copying stream, work that was computed before."""

    device = torch.device("cuda", 0)

    def __init__(self, monkeypatch):
        self.compute, self.side, self.copies = FakeStream(), FakeStream(), []
        self._current = [self.compute]
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.side)
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self._current[-1])
        monkeypatch.setattr(Batch, "to", lambda batch, device: self._copy(batch, device))

    @contextmanager
    def _on(self, stream):
        self._current.append(stream)
        yield
        self._current.pop()

    def _copy(self, batch, device):
        assert (device, self._current[-1]) == (self.device, self.side)
        self.side.given += 1
        self.copies.append((batch, self.side.given, self.side.behind[self.compute]))
        return batch


@pytest.fixture
def gpu(monkeypatch):
    return FakeGpu(monkeypatch)


def test_a_gpu_computes_an_update_behind_its_copy_and_beside_the_next(corpus, gpu):
    loader = training(corpus, update_freq=2)
    for update in range(loader.updates_per_epoch + 2):
        batches = loader.next_update(gpu.device)
        handed_out, following = gpu.copies[2 * update : 2 * update + 2], gpu.copies[2 * update + 2 :]
        assert [copy[0] for copy in handed_out] == batches
        assert len(following) == 2
        # what is computed next waits for its own copies and for no later ones
        assert handed_out[-1][1] == gpu.compute.behind[gpu.side] < following[0][1]
        # a copy may write where a batch lay that was let go: every computation on that comes before
        assert [before for _, _, before in following] == [update] * 2
        gpu.compute.given += 1


@pytest.mark.parametrize("workers", [0, 2])
def test_copying_ahead_changes_neither_the_batches_nor_the_position(corpus, gpu, workers):
    plain, ahead = training(corpus), training(corpus, num_workers=workers)
    for _ in range(plain.updates_per_epoch + 2):
        expected, found = plain.next_update(), ahead.next_update(gpu.device)
        assert same(expected, found)
        assert plain.state_dict() == ahead.state_dict()
        resumed = training(corpus)
        resumed.load_state_dict(ahead.state_dict())
        expected, found = resumed.next_update(gpu.device), ahead.next_update(gpu.device)
        assert same(expected, found)
        assert same(expected, plain.next_update())
    ahead.load_state_dict(ahead.state_dict() | {"epoch": 1, "position": 0})  # what was copied ahead is forgotten
    assert same(ahead.next_update(gpu.device), training(corpus).next_update())
    ahead.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_ahead_is_raised_when_its_update_is_due(tmp_path, gpu, workers):
    for name in "abdef":
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(1000), RATE)
    (tmp_path / "train.tsv").write_text(".\n" + "".join(f"{name}.wav\t1000\n" for name in "abcdef"))
    told = []
    for device in (torch.device("cpu"), gpu.device):
        loader = training(tmp_path, num_workers=workers, update_freq=1, max_tokens=1000)
        handed_out = []
        with pytest.raises(DataError, match=r"train.tsv:4") as caught:
            handed_out.extend(iter(lambda loader=loader, device=device: loader.next_update(device)[0].ids, None))
        told.append((handed_out, loader.state_dict(), str(caught.value)))
        loader.close()
    assert told[0] == told[1]
    assert 2 <= len(told[0][0]) < 6


def children():
    """Processes that this one has started and that still run."""
    folder = Path("/proc")
    if not folder.exists():
        pytest.skip("needs /proc")
    found = []
    for status in folder.glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.append(status.parent.name)
    return found


def test_closing_a_loader_stops_its_workers(corpus):
    before = children()
    loader = training(corpus, num_workers=2)
    loader.next_update()
    assert len(children()) == len(before) + 2
    loader.close()
    assert len(children()) == len(before)
    for batch in validation(corpus, num_workers=2):
        assert batch.num_rows
        break
    del batch
    assert len(children()) == len(before)


def test_a_program_ends_with_workers_still_reading(corpus):
    program = f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
        import test_loader
        from pathlib import Path
        loader = test_loader.training(Path({str(corpus)!r}), num_workers=2)
        valid = iter(test_loader.validation(Path({str(corpus)!r}), num_workers=2))
        loader.next_update()
        next(valid)
        print("read")
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "read\n")
    assert "Traceback" not in ended.stderr


def test_a_worker_gives_memory_back_once_in_a_while_and_training_does_not(corpus, monkeypatch, tmp_path):
    told = tmp_path / "told"
    monkeypatch.setattr(workers_module, "TIDY_EVERY", 2)
    monkeypatch.setattr(workers_module, "give_back_freed_memory", lambda: told.open("a").write("."))
    for workers in (0, 1):
        reading = training(corpus, num_workers=workers, update_freq=1)
        for _ in range(6):
            reading.next_update()
        reading.close()
        assert (len(told.read_text()) if told.exists() else 0) >= 3 * workers
        assert told.exists() == bool(workers)
