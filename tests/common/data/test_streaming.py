"""Streams of shards: every clip exactly once per pass, the same after an interruption, and nothing lost in silence."""

# SPDX-License-Identifier: Apache-2.0
import functools
import http.server
import io
import json
import logging
import sys
import tarfile
import threading
from collections import Counter

import numpy as np
import pytest
import soundfile

from common.data import shard_reading, streaming
from common.data.audio import normalize
from common.data.manifest import read_manifest
from common.data.masking import SpanMasking
from common.data.selection import LengthLimits
from common.data.shard_reading import Tally, read_shard, shuffled
from common.data.shards import index_shard
from common.data.streaming import stream_loader
from common.errors import ConfigError, DataError

webdataset = pytest.importorskip("webdataset")
RATE = 16000
CLIPS = 61


def num_frames(samples):
    return (samples - 400) // 320 + 1


def encode(line, where):
    symbols = {"A": 4, "B": 5, "|": 6}
    try:
        return [symbols[symbol] for symbol in line.split()]
    except KeyError as error:
        raise DataError(f"{where}: {error} is not in the dictionary") from None


def wave(number, length):
    """Samples that tell the clip and the place."""
    return ((number * 10_000 + np.arange(length)) / 2**20).astype(np.float32)


def length_of(number):
    return 1000 + 97 * (number * 31 % CLIPS)


def audio_of(samples):
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@functools.cache  # libsndfile writes the time into float WAV
def members_of(number):
    text = f"{'A ' * (number % 4)}B"
    entry = (f"{number}.txt", text.encode()) if number % 2 else (f"{number}.json", json.dumps({"text": text}).encode())
    return [(f"{number}.wav", audio_of(wave(number, length_of(number)))), entry]


@pytest.fixture(autouse=True)
def small_pools(monkeypatch):
    """Several of them in a pass."""
    monkeypatch.setattr(streaming, "POOL", 4)
    monkeypatch.setattr(streaming, "POOL_OF_JOINED", 2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """8 shards of 7 or 8 clips."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, numbers in enumerate(np.array_split(np.arange(CLIPS), 8)):
        write_shard(folder / f"s_{shard}.tar", [entry for n in numbers.tolist() for entry in members_of(n)])
    return folder


def names(corpus, number=8):
    return [str(corpus / f"s_{shard}.tar") for shard in range(number)]


def opened(shards, **changes):
    settings = {
        "strategy": "scatter",
        "shuffle_n": 10,
        "epoch_size": 5,
        "sample_rate": RATE,
        "normalize": False,
        "num_frames": num_frames,
        "seed": 5,
        "max_tokens": 16_000,
        "crop": True,
        "max_sample_size": 5000,
        "time_mask": SpanMasking(0.65, 3, min_masks=2),
    }
    return stream_loader(shards, **settings | changes)


def ids_of(loader, worker, epoch_pass=1):
    return [clip.id for clip in loader._stream.clips(worker, epoch_pass, Tally())]


def updates(loader, number):
    return [content(loader.next_update()) for _ in range(number)]


def content(batches):
    return [
        (batch.ids, batch.audio_BS.numpy().tobytes(), batch.mask_BT.numpy().tobytes(), batch.sub_batches)
        for batch in batches
    ]


# ---- Reading a shard -------------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Serves bytes, of which it sends only `sent[i]` at the i-th request; the last entry holds for all that follow."""

    body: bytes
    sent: list
    status = 200
    promise = True
    requests = 0

    def do_GET(self):
        count = self.sent[min(self.requests, len(self.sent) - 1)]
        type(self).requests += 1
        self.send_response(self.status)
        if self.promise:
            self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body[:count])

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Start a server; its address, and its class for counting requests."""
    monkeypatch.setattr(shard_reading, "WAIT", 0.001)
    servers = []

    def start(body, sent=(None,), **more):
        handler = type("Handler", (Server,), {"body": body, "sent": list(sent), **more})
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/s.tar", handler

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_path_a_command_and_a_server_give_the_same_clips(corpus, serve):
    shard = corpus / "s_0.tar"
    address, _ = serve(shard.read_bytes())
    expected = [(str(n), {name.partition(".")[2]: data for name, data in members_of(n)}) for n in range(8)]
    for source in (str(shard), f"file://{shard}", f"pipe:cat {shard}", address):
        assert list(read_shard(source)) == expected


def test_a_connection_that_breaks_is_taken_up_where_it_was(corpus, serve, caplog):
    body = (corpus / "s_0.tar").read_bytes()
    expected = list(read_shard(str(corpus / "s_0.tar")))
    address, handler = serve(body, [100, len(body) // 3, len(body) // 3, len(body) // 2, len(body) - 1, None])
    with caplog.at_level(logging.WARNING):
        assert list(read_shard(address)) == expected
    assert handler.requests == 6
    assert caplog.text.count(f"{address}: ") == 5


@pytest.mark.parametrize("promise", [True, False])
def test_a_stream_that_is_cut_off_anywhere_is_an_error_and_never_the_end(corpus, serve, monkeypatch, promise):
    monkeypatch.setattr(shard_reading, "RETRIES", 0)
    body = (corpus / "s_0.tar").read_bytes()
    whole = len(list(read_shard(str(corpus / "s_0.tar"))))
    with tarfile.open(corpus / "s_0.tar") as tar:
        starts = [member.offset for member in tar]
    end = tar.offset  # of the members; from here on there are zeros only
    for cut in [0, 1, 511, *starts[1:4], *(start + 512 for start in starts[2:5]), starts[3] + 700, starts[-1], end]:
        address, _ = serve(body, [cut], promise=promise)
        found = []
        with pytest.raises(DataError, match=r"s.tar: .*; check the address or command, or copy it again") as caught:
            found.extend(read_shard(address))
        assert str(caught.value).startswith(address)
        for clip in read_shard(str(corpus / "s_0.tar")):
            assert clip[0] not in dict(found) or dict(found)[clip[0]] == clip[1]  # no clip without its text
        assert len(dict(found)) < whole


def test_a_server_that_keeps_breaking_is_given_up_with_the_cause(corpus, serve):
    body = (corpus / "s_0.tar").read_bytes()
    address, handler = serve(body, [len(body) // 2])
    with pytest.raises(DataError, match=rf"{address}: the connection broke after \d+ of {len(body)} bytes \(6 times"):
        list(read_shard(address))
    assert handler.requests == 1 + shard_reading.RETRIES
    for status, tries in ((404, 1), (503, 1 + shard_reading.RETRIES)):
        address, handler = serve(body, status=status)
        with pytest.raises(DataError, match=f"{address}: HTTP Error {status}"):
            list(read_shard(address))
        assert handler.requests == tries


def test_commands_that_fail_are_told(corpus, monkeypatch):
    monkeypatch.setattr(shard_reading, "WAIT", 0.001)
    shard = corpus / "s_0.tar"
    for command, message in (
        ("exit 7", "the command ended with status 7"),
        (f"cat {shard}; exit 3", "the command ended with status 3"),
        (f"head -c 9000 {shard}", "unexpected end of data|truncated"),
        ("printf ''", "empty"),
    ):
        with pytest.raises(DataError, match=rf"pipe:.*({message})"):
            list(read_shard(f"pipe:{command}"))
    with pytest.raises(DataError, match=r"missing.tar: No such file"):
        list(read_shard(str(corpus / "missing.tar")))
    with pytest.raises(ConfigError, match=r"--tarred_filepaths s3://b/x.tar: .*pipe:aws s3 cp"):
        list(read_shard("s3://b/x.tar"))


def test_a_damaged_shard_is_an_error_and_not_a_short_one(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_reading, "WAIT", 0.001)
    content = bytearray((corpus / "s_0.tar").read_bytes())
    with tarfile.open(corpus / "s_0.tar") as tar:
        third = tar.getmembers()[4].offset
    content[third : third + 100] = b"x" * 100  # tarfile would stop there in silence
    (tmp_path / "bad.tar").write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"bad.tar: truncated or damaged"):
        list(read_shard(str(tmp_path / "bad.tar")))
    twice = write_shard(tmp_path / "twice.tar", [("a.wav", b"1"), ("a.wav", b"2")])
    with pytest.raises(DataError, match=r"twice.tar: .*duplicate file name"):
        list(read_shard(str(twice)))


def test_compressed_shards_can_be_streamed(corpus, tmp_path):
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as tar:
        for name, data in members_of(3):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert [name for name, _ in read_shard(str(tmp_path / "s.tar.gz"))] == ["3"]


# ---- Which clips, in which order -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shards", "workers"), [(8, 2), (7, 2), (5, 2), (2, 2), (3, 3), (8, 1), (8, 5)])
def test_all_ranks_and_workers_together_have_every_clip_once_in_every_pass(corpus, shards, workers):
    sources = names(corpus, shards)
    expected = sorted(name for source in sources for name, _ in read_shard(source))
    loaders = [opened(sources, rank=rank, world=2, num_workers=workers) for rank in range(2)]
    shares = []
    for epoch_pass in (1, 2):
        shares.append([ids_of(loader, worker, epoch_pass) for loader in loaders for worker in range(workers)])
        assert sorted(name for share in shares[-1] for name in share) == expected
    assert shares[0] != shares[1]
    again = [ids_of(loader, worker, 2) for loader in loaders for worker in range(workers)]
    assert again == shares[1]


def test_scatter_reads_a_shard_on_one_rank_and_replicate_on_all(corpus):
    def both(**changes):
        loaders = [opened(names(corpus), rank=rank, world=2, num_workers=2, **changes) for rank in range(2)]
        return loaders, [
            [shard for worker in range(2) for shard, _, _ in loader._stream.parts[worker].shards(names(corpus), 1)]
            for loader in loaders
        ]

    _, parts = both()
    read = [shard for rank in parts for worker in rank for shard in worker]
    assert Counter(read) == Counter(names(corpus))
    loaders, _ = both(strategy="replicate")
    everything = sorted(str(n) for n in range(CLIPS))
    orders = [[name for worker in range(2) for name in ids_of(loader, worker)] for loader in loaders]
    assert sorted(orders[0]) == sorted(orders[1]) == everything
    assert orders[0] != orders[1]
    _, parts = both(strategy="replicate", shuffle_n=0)
    assert parts[0] != parts[1]
    with pytest.raises(ConfigError, match="--tarred_shard_strategy scatter: 2 shards for 3 processes"):
        opened(names(corpus, 2), world=3)


def test_the_blocks_of_the_ranks_change_between_passes(corpus):
    loader = opened(names(corpus), world=2, shuffle_n=0)
    assert len({frozenset(ids_of(loader, 0, epoch_pass)) for epoch_pass in range(1, 8)}) > 3


@pytest.mark.parametrize("number", [2, 5, 40, 1000])
def test_no_item_leaves_the_buffer_more_than_its_size_early(number):
    order = list(shuffled(range(300), number, np.random.default_rng(number)))
    assert sorted(order) == list(range(300))
    assert order != list(range(300))
    early = [item - place for place, item in enumerate(order)]
    assert number / 2 <= max(early) < number or number > 300


# ---- Batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [True, False])
def test_batches_hold_pieces_of_their_clips_within_the_budget(corpus, crop):
    loader = opened(names(corpus), crop=crop, concat=3)
    for _ in range(12):
        (batch,) = loader.next_update()
        assert len(batch.sub_batches) <= 3
        row = 0
        for part in batch.sub_batches:
            assert part.rows * part.samples <= 16_000
            for place in range(row, row + part.rows):
                number, size = int(batch.ids[place]), int(batch.lengths_B[place])
                numbers = (batch.audio_BS[place, :size] * 2**20).round().long().numpy() - number * 10_000
                assert (np.diff(numbers) == 1).all()
                assert 0 <= numbers[0] <= length_of(number) - size
                assert size == part.samples if crop else size == min(length_of(number), 5000)
            row += part.rows


def test_a_pass_of_batches_is_a_pass_over_the_clips(corpus):
    loader = opened(names(corpus), concat=2)
    seen = Counter()
    while (batch := loader.next_update()[0]).epoch_pass == 1:
        seen.update(batch.ids)
    assert seen == Counter(str(n) for n in range(CLIPS))


def test_no_two_sub_batches_share_their_masks_or_their_place_in_the_update(corpus):
    layout = {"world": 2, "concat": 2, "update_freq": 3, "num_workers": 2}
    loaders = [opened(names(corpus), rank=rank, **layout, time_mask=None) for rank in range(2)]
    planned = Counter()
    for loader in loaders:
        stream = loader._stream
        for worker in range(2):
            planned.update(number for parts in stream._planned(worker, 1, Tally()) for number, _, _ in parts)
    assert len(planned) > 10
    assert set(planned.values()) == {1}
    for _ in range(2):
        batches = [batch for loader in loaders for batch in loader.next_update()]
        indices = [[part.index for part in batch.sub_batches] for batch in batches]
        # micro-batch f, rank r, slot k: (f * world + r) * concat + k
        whole = [[(f * 2 + r) * 2 + k for k in range(2)] for r in range(2) for f in range(3)]
        assert all(found == expected[: len(found)] for found, expected in zip(indices, whole, strict=True))
    for loader in loaders:
        loader.close()


def test_labels_come_from_text_files_and_json(corpus):
    loader = opened(names(corpus), encode=encode, crop=False, max_sample_size=None, time_mask=None)
    for _ in range(6):
        (batch,) = loader.next_update()
        for row, name in enumerate(batch.ids):
            line = f"{'A ' * (int(name) % 4)}".replace("A ", "A | ") + "B |"
            assert batch.texts[row] == line
            assert batch.labels_BL[row, : batch.label_lengths[row]].tolist() == encode(line, "")


def test_what_cannot_be_labelled_is_refused(corpus, tmp_path):
    bare = write_shard(tmp_path / "bare.tar", [("a.wav", audio_of(wave(1, 2000)))])
    loader = opened([str(bare)], encode=encode, crop=False, max_sample_size=None)
    with pytest.raises(DataError, match=r"bare.tar: a.wav: no text .*but labels are needed"):
        loader.next_update()
    with pytest.raises(DataError, match="--max_sample_size 5000 would cut audio but not its labels"):
        opened(names(corpus), encode=encode, crop=False).next_update()


def test_with_normalize_the_whole_clip_is_normalised_before_it_is_cut(corpus):
    (batch,) = opened(names(corpus), normalize=True).next_update()
    for name, row in zip(batch.ids, batch.audio_BS.numpy(), strict=True):
        whole = normalize(wave(int(name), length_of(int(name))))
        places = np.flatnonzero(np.abs(whole[: len(whole) - len(row) + 1] - row[0]) < 1e-6)
        assert any(np.allclose(whole[place : place + len(row)], row, atol=1e-6) for place in places)


def test_limits_of_length_are_counted(corpus, caplog):
    limits = LengthLimits(2000, 0.0, 0.4)
    kept = {str(n) for n in range(CLIPS) if 2000 <= length_of(n) <= 6400}
    loader = opened(names(corpus), limits=limits, epoch_size=1, shuffle_n=0)
    seen, passes = set(), Counter()
    with caplog.at_level(logging.INFO):
        while (batch := loader.next_update()[0]).epoch_pass < 3:
            seen.update(batch.ids)
            passes[batch.epoch_pass] += batch.left_out
    assert seen == kept
    assert passes[2] == CLIPS - len(kept)
    assert "clips outside the limits of length" in caplog.text
    with pytest.raises(DataError, match="all are outside the limits of length"):
        opened(names(corpus), limits=LengthLimits(10**6, 0.0, 0.0)).next_update()


def test_bad_clips_are_an_error_or_left_out_and_listed(tmp_path, corpus):
    clips = [entry for n in range(9) for entry in members_of(n)]
    broken = audio_of(np.full(3000, np.nan))  # its header is good
    shard = str(write_shard(tmp_path / "s.tar", [*clips, ("x.wav", b"no audio"), ("y.wav", broken)]))
    with pytest.raises(DataError, match=r"s.tar: (x|y).wav"):
        updates(opened([shard]), 9)
    listed = tmp_path / "bad.txt"
    loader = opened([shard], skip_bad=True, max_bad_share=0.5, bad_files=listed, max_sentences=1)  # y is a batch
    ids = {name for _ in range(20) for batch in loader.next_update() for name in batch.ids}
    assert ids == {str(n) for n in range(9)}
    lines = listed.read_text().splitlines()
    assert [sum(name in line for line in lines) for name in ("x.wav", "y.wav")] == [1, 1]
    with pytest.raises(DataError, match="more than --max_bad_share 0.001"):
        updates(opened([shard], skip_bad=True, max_bad_share=0.001), 9)
    nothing = str(write_shard(tmp_path / "n.tar", [("x.wav", b"no audio")]))
    with pytest.raises(DataError, match=r"they cannot be used: .*x.wav"):
        opened([nothing], skip_bad=True, max_bad_share=1.0).next_update()


def test_a_manifest_chooses_clips_cuts_them_and_gives_their_text(corpus, tmp_path):
    entries = [
        {"audio_filepath": "3.wav", "duration": length_of(3) / RATE, "text": "B"},
        {"audio_filepath": "5.wav", "duration": 1600 / RATE, "offset": 0.0, "text": "A"},
        {"audio_filepath": "5.wav", "duration": 800 / RATE, "offset": 0.05, "text": "AB"},
        {"audio_filepath": "elsewhere.wav", "duration": 1.0, "text": "A"},
    ]
    path = tmp_path / "manifest.json"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    manifest = read_manifest(path, text=True)
    loader = opened(
        names(corpus), manifest=manifest, encode=encode, crop=False, max_sample_size=None, time_mask=None, shuffle_n=0
    )
    found = {}
    while (batch := loader.next_update()[0]).epoch_pass == 1:
        for row, name in enumerate(batch.ids):
            samples = batch.audio_BS[row, : batch.lengths_B[row]].numpy()
            found[name.rpartition("/")[2]] = (samples.tolist(), batch.texts[row])
    assert found == {
        "3": (wave(3, length_of(3)).tolist(), "B |"),
        "5": (wave(5, 1600).tolist(), "A |"),
        "5-sub1": (wave(5, 1600)[800:1600].tolist(), "A B |"),
    }


def test_lists_of_shards_choose_clips_too(corpus, tmp_path):
    lines = [
        ".",
        *(f"{clip.path('s_0.tar')}\t{length_of(int(clip.name[:-4]))}" for clip in index_shard(corpus / "s_0.tar")),
    ]
    (tmp_path / "some.tsv").write_text("\n".join(lines[:4]) + "\n")
    loader = opened(names(corpus), manifest=read_manifest(tmp_path / "some.tsv"))
    found = {clip.id: clip.audio for clip in loader._stream.clips(0, 1, Tally())}
    assert found == {str(number): members_of(number)[0][1] for number in range(3)}


# ---- Going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "shards", "stops"), [(0, 8, (1, 5, 12)), (2, 8, (1, 5)), (2, 7, (8,)), (2, 2, (11,))]
)
def test_a_resumed_stream_gives_the_same_batches(corpus, workers, shards, stops):
    layout = {"num_workers": workers, "concat": 2, "update_freq": 3, "world": 2, "rank": 1}
    straight = opened(names(corpus, shards), **layout)
    expected = updates(straight, max(stops) + 4)
    straight.close()
    for stop in stops:
        first = opened(names(corpus, shards), **layout)
        assert updates(first, stop) == expected[:stop]
        state = json.loads(json.dumps(first.state_dict()), object_hook=numbered)
        first.close()
        second = opened(names(corpus, shards), **layout)
        second.load_state_dict(state)
        assert (second.epoch, second.position) == ((stop - 1) // 5 + 1, (stop - 1) % 5 + 1)
        assert updates(second, 4) == expected[stop : stop + 4]
        second.close()


def numbered(table):
    """Keys that are numbers, which JSON has turned to text."""
    return {int(name) if name.isdigit() else name: value for name, value in table.items()}


def test_going_on_decodes_nothing_of_what_was_handed_out(corpus, monkeypatch):
    first = opened(names(corpus), epoch_size=100)
    updates(first, 12)
    state = first.state_dict()
    read = []

    def counted(audio, *, where, read_audio=shard_reading.read_audio, **options):
        read.append(where)
        return read_audio(audio, where=where, **options)

    monkeypatch.setattr(shard_reading, "read_audio", counted)
    second = opened(names(corpus), epoch_size=100)
    second.load_state_dict(state)
    (batch,) = second.next_update()
    assert len(read) == batch.num_rows


def test_another_stream_starts_the_epoch_again_with_another_pass(corpus, caplog):
    first = opened(names(corpus))
    updates(first, 13)
    state = first.state_dict()
    assert (state["epoch"], state["position"]) == (3, 3)
    for changes in ({"seed": 6}, {"max_tokens": 15_000}, {"num_workers": 2}, {"world": 2}, {"shuffle_n": 11}):
        other = opened(names(corpus), **changes)
        caplog.clear()
        other.load_state_dict(state)
        assert "epoch 3 starts again" in caplog.text
        assert (other.epoch, other.position) == (3, 0)
        (batch,) = other.next_update()
        assert batch.epoch_pass == max(place[0] for place in state["places"][0]) + 1
        other.close()


def test_an_epoch_is_so_many_updates(corpus):
    loader = opened(names(corpus), epoch_size=3)
    seen = []
    for _ in range(7):
        loader.next_update()
        seen.append((loader.epoch, loader.position, loader.at_epoch_end))
    assert seen == [
        (1, 1, False),
        (1, 2, False),
        (1, 3, True),
        (2, 1, False),
        (2, 2, False),
        (2, 3, True),
        (3, 1, False),
    ]
    assert loader.updates_per_epoch == 3
    assert loader.take_work().seconds > 0
    assert loader.take_work().seconds == 0


def test_an_error_in_a_worker_comes_when_its_update_is_due(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_reading, "WAIT", 0.001)
    loader = opened([str(tmp_path / "none_0.tar"), str(tmp_path / "none_1.tar")], num_workers=2)
    with pytest.raises(DataError, match=r"none_\d.tar: No such file"):
        loader.next_update()


def test_fewer_clips_than_workers_are_read_in_turns(tmp_path):
    shard = str(write_shard(tmp_path / "s.tar", members_of(0)))
    loader = opened([shard], num_workers=2)
    seen = [(loader.next_update()[0].epoch_pass, loader._stream.next_worker) for _ in range(6)]
    loader.close()
    assert sorted(epoch_pass for epoch_pass, _ in seen) == list(range(1, 7))  # one clip: a batch of one worker in each


def test_without_the_library_or_an_epoch_size_streaming_is_refused(corpus, monkeypatch):
    with pytest.raises(ConfigError, match="--epoch_size"):
        opened(names(corpus), epoch_size=0)
    for module in ("webdataset", "webdataset.tariterators", "webdataset.gopen"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match="--streaming: needs the package webdataset; pip install webdataset"):
        opened(names(corpus))


def test_what_the_library_writes_is_streamed(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "w-%d.tar"), maxcount=5, verbose=0) as writer:
        for number in range(12):
            writer.write({"__key__": f"a/{number}", "wav": audio_of(wave(number, length_of(number))), "txt": "A B"})
    shards = [str(tmp_path / f"w-{number}.tar") for number in range(3)]
    loader = opened(shards, encode=encode, crop=False, max_sample_size=None)
    found = list(loader._stream.clips(0, 1, Tally()))
    assert sorted(clip.id for clip in found) == sorted(f"a/{n}" for n in range(12))
    assert {clip.text for clip in found} == {"A | B |"}
    assert {len(clip.audio) for clip in found} == {len(audio_of(wave(n, length_of(n)))) for n in range(12)}


@pytest.mark.parametrize(("short", "widths"), [("keep", None), ("skip", {3000}), ("pad", {3000})])
def test_what_short_clips_do_is_chosen(corpus, short, widths):
    """With skip and pad all rows have one length, and pad keeps every clip."""
    loader = opened(names(corpus), max_sample_size=3000, short=short, crop=False, epoch_size=40)
    batches, seen = [], set()
    while (batch := loader.next_update()[0]).epoch_pass == 1:
        batches.append(batch)
        seen.update(batch.ids)
    long_enough = {str(n) for n in range(CLIPS) if length_of(n) >= 3000}
    assert seen == (long_enough if short == "skip" else {str(n) for n in range(CLIPS)})
    lengths = {length for batch in batches for length in batch.lengths_B.tolist()}
    if widths is None:
        assert min(lengths) == min(length_of(n) for n in range(CLIPS))
    else:
        assert lengths == widths
    if short == "pad":
        for batch in batches:
            for name, row in zip(batch.ids, batch.audio_BS, strict=True):
                assert not row[length_of(int(name)) :].any()


def test_a_clip_above_the_budget_is_a_bad_clip(corpus, tmp_path):
    """A stream has no list to shorten: such a clip is named, and left out where that is allowed."""
    shard = write_shard(tmp_path / "s.tar", [(f"{n}.wav", audio_of(wave(n, 1000 if n else 20_000))) for n in range(6)])
    settings = {"max_sample_size": None, "crop": False, "shuffle_n": 0}
    with pytest.raises(DataError, match=r"s.tar: 0.wav: 20000 samples, more than --max_tokens 16000; .*--max_duration"):
        opened([str(shard)], **settings).next_update()
    loader = opened([str(shard)], **settings, skip_bad=True, max_bad_share=0.1, bad_files=tmp_path / "bad.txt")
    assert set(loader.next_update()[0].ids) == {"1", "2", "3", "4", "5"}
    assert "--max_tokens" in (tmp_path / "bad.txt").read_text()
