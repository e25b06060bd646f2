"""Shards: patterns, who reads which shard, and an index that finds the very bytes of every clip."""

# SPDX-License-Identifier: Apache-2.0
import gzip
import io
import json
import os
import tarfile

import numpy as np
import pytest
import soundfile

from common.data.audio import read_audio
from common.data.manifest import read_manifest
from common.data.shards import ShardClip, expand_pattern, index_shard, shards_of_rank, split_name
from common.errors import ConfigError, DataError


def write_tar(path, members, **options):
    """A tar file of (name, bytes)."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_patterns_and_shares_of_the_golden_cases(shared):
    cases = json.loads(shared("golden_ssl/data_pipeline.json").read_text())["shards"]
    assert len(cases) >= 6
    for case in cases:
        names = expand_pattern(case["pattern"])
        world = case["world_size"]
        shares = [shards_of_rank(names, case["strategy"], rank, world) for rank in range(world)]
        assert shares == case["per_rank"], case["pattern"]


@pytest.mark.parametrize(
    "pattern",
    [
        *("s_{0..7}.tar", "s_{00..11}.tar", "s_{8..11}.tar", "s_{3..0}.tar", "s_{0..9..3}.tar", "{a,b}/s_{0..2}.tar"),
        *(
            "s_{a,b{1..3},c}.tar",
            "s_{a}.tar",
            "plain.tar",
            "s_{x{1..2}}.tar",
            "{01..02}{a,}.tar",
            "s_{-1..1}",
        ),
    ],
)
def test_braces_expand_as_in_a_shell(pattern):
    braceexpand = pytest.importorskip("braceexpand")
    assert expand_pattern(pattern) == list(braceexpand.braceexpand(pattern, escape=False))


def test_brackets_of_nemo_commas_and_commands(tmp_path, monkeypatch):
    assert expand_pattern("a_OP_0..1_CL_.tar,b[2..3].tar, c<4,5>.tar") == [
        *("a0.tar", "a1.tar", "b2.tar", "b3.tar", "c4.tar", "c5.tar")
    ]
    assert expand_pattern("my (old) shards/s_(0..1).tar") == ["my (old) shards/s_0.tar", "my (old) shards/s_1.tar"]
    command = "pipe:cut -f 1,2 < (s_{0..1}.tar)"
    assert expand_pattern(command) == [command.replace("{0..1}", "0"), command.replace("{0..1}", "1")]
    assert expand_pattern("x.tar,pipe:cat a,b,pipe:cat c") == ["x.tar", "pipe:cat a,b", "pipe:cat c"]
    there = tmp_path / "a (1,2).tar"
    there.touch()
    (tmp_path / "b.tar").touch()
    (tmp_path / "b.tsv").touch()
    monkeypatch.chdir(tmp_path)
    assert expand_pattern(there.name) == [there.name]  # it exists, so its brackets are only brackets
    assert expand_pattern("b (1,2).tar") == ["b 1.tar", "b 2.tar"]
    assert expand_pattern("s_{a.tar") == ["s_{a.tar"]
    assert expand_pattern(str(tmp_path)) == [str(there), str(tmp_path / "b.tar")]
    assert expand_pattern(f"s_{{{','.join(map(str, range(1000)))}}}") == [f"s_{n}" for n in range(1000)]
    (tmp_path / "empty").mkdir()
    for nothing in ("", " , ", "empty"):
        with pytest.raises(ConfigError, match="--tarred_filepaths"):
            expand_pattern(nothing)


def test_a_process_without_a_shard_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"--tarred_shard_strategy scatter: 2 shards for 3 .*--num_shards.*replicate"):
        shards_of_rank(["a", "b"], "scatter", 0, 3)
    assert shards_of_rank(["a", "b"], "replicate", 2, 3) == ["a", "b"]
    with pytest.raises(ConfigError, match="--tarred_shard_strategy both"):
        shards_of_rank(["a", "b"], "both", 0, 1)


LONG = "folder/" * 30 + "日本.wav"


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_the_index_finds_the_bytes_and_texts_of_every_clip(tmp_path, form):
    members = [
        *(("a/1.flac", b"one" * 400), ("a/1.txt", b"  HI  YOU\n"), ("a/1.json", b'{"text": "not this"}')),
        *(("./b.WAV", b"two"), ("b.json", '{"text": "É A", "x": 1}'.encode())),
        *((LONG, b""), ("__meta__", b"x"), ("notes", b"y"), ("._a.flac", b"z"), ("__x__/c.flac", b"z")),
        *(("c.left.flac", b"l"), ("c.right.flac", b"r"), ("c.left.txt", b"LEFT"), ("c.txt", b"BOTH")),
        *(("d.mp3", b"m"), ("d.json", b"[1]"), ("e.txt", b"no audio"), ("f.cls", b"3")),
    ]
    shard = write_tar(tmp_path / "s.tar", members, format=form)
    clips = index_shard(shard)
    whole = shard.read_bytes()
    found = [(clip.name, whole[clip.offset : clip.offset + clip.size], clip.text) for clip in clips]
    assert found == [
        *(("a/1.flac", b"one" * 400, "HI YOU"), ("b.WAV", b"two", "É A"), (LONG, b"", None)),
        *(("c.left.flac", b"l", "LEFT"), ("c.right.flac", b"r", "BOTH"), ("d.mp3", b"m", None)),
    ]
    assert clips[0].path("x.tar") == f"x.tar:{clips[0].offset}:1200:a/1.flac"
    assert ShardClip("k.flac", 5, 7, None).path("x/y.tar") == "x/y.tar:5:7:k.flac"


def test_keys_are_split_as_webdataset_splits_them():
    iterators = pytest.importorskip("webdataset.tariterators")
    for name in ("a.flac", "x/a.b.flac", "x.y/a.flac", "./c.WAV", "a..flac", "__m__.txt", "noext", ".hidden.flac"):
        key, extension = iterators.base_plus_ext(name)
        expected = None if key is None else (key.removeprefix("./"), extension.lower())
        assert split_name(name) == expected, name
    for name in ("folder/._a.flac", "__meta__", "__meta__/a.flac"):  # hidden files of macOS, and what webdataset skips
        assert split_name(name) is None


def test_shards_that_cannot_be_indexed_are_refused_with_the_remedy(tmp_path):
    members = [(f"{n}.flac", bytes([n]) * 3000) for n in range(1, 5)]
    good = write_tar(tmp_path / "good.tar", members).read_bytes()
    assert len(index_shard(tmp_path / "good.tar")) == 4

    def refused(content, message, name="bad.tar"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            index_shard(path)
        assert str(caught.value).startswith(f"{path}: ")

    refused(gzip.compress(good), "compressed.*gunzip")
    refused(good, "ends in .tar; rename", "bad.tgz")
    for cut in (0, 100, 512, 600, 512 + 3072, 512 + 3072 + 10, 2 * 3584, 3 * 3584 + 700, 4 * 3584):
        refused(good[:cut], "truncated or damaged.*copy it again")
    damaged = bytearray(good)
    damaged[2 * 3584 : 2 * 3584 + 20] = b"x" * 20  # the third header: tarfile would stop there in silence
    refused(bytes(damaged), "truncated or damaged at byte 7168")
    for json_text in (b"{", b"\xff"):
        path = write_tar(tmp_path / "json.tar", [("a.flac", b"x"), ("a.json", json_text)])
        with pytest.raises(DataError, match="a.flac: its .txt or .json"):
            index_shard(path)
    with pytest.raises(DataError, match="a tab or a line end"):
        index_shard(write_tar(tmp_path / "tab.tar", [("a\tb.flac", b"x")]))
    with pytest.raises(DataError, match="none.tar: cannot be read"):
        index_shard(tmp_path / "none.tar")


def test_links_and_sparse_members_are_refused(tmp_path):
    (tmp_path / "a.flac").write_bytes(b"abc")
    os.link(tmp_path / "a.flac", tmp_path / "b.flac")
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        for name in ("a.flac", "b.flac"):  # tar keeps the second name as a link to the first
            tar.add(tmp_path / name, name)
    with pytest.raises(DataError, match=r"b\.flac.* is stored as a link; .*make_shards"):
        index_shard(tmp_path / "links.tar")
    with tarfile.open(tmp_path / "sparse.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("s.wav")
        info.type, info.size = tarfile.GNUTYPE_SPARSE, 0
        tar.addfile(info)
    with pytest.raises(DataError, match="stored as a sparse file"):
        index_shard(tmp_path / "sparse.tar")


def test_a_shard_that_changed_behind_its_list_is_noticed(tmp_path):
    """Two members of one length that change places: the bytes are audio, but of another clip."""

    def write(names):
        contents = {}
        for name in names:
            content = io.BytesIO()
            soundfile.write(content, np.full(1000, 0.1 if name == "a" else 0.2), 16000, format="WAV")
            contents[f"{name}.wav"] = content.getvalue()
        return write_tar(tmp_path / "s.tar", contents.items())

    lines = [".", *(f"{clip.path('s.tar')}\t1000" for clip in index_shard(write("ab")))]
    (tmp_path / "l.tsv").write_text("\n".join(lines) + "\n")
    clips = [read_manifest(tmp_path / "l.tsv")[place].clip for place in range(2)]
    assert [round(float(read_audio(clip, sample_rate=16000)[0]), 2) for clip in clips] == [0.1, 0.2]
    write("ba")
    for clip, name in zip(clips, "ab", strict=True):
        with pytest.raises(DataError, match=f"is not {name}.wav, the shard has changed since its list was made"):
            read_audio(clip, sample_rate=16000)
