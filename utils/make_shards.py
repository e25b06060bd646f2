"""Packs the clips of a file list into tar shards of WebDataset's layout, or makes the lists of existing shards."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

from common.data.audio import Clip, read_audio, read_info
from common.data.manifest import JSON_SUFFIXES, Manifest, Utterance, read_manifest
from common.data.shards import AUDIO, META, ShardClip, expand_pattern, index_shard
from common.errors import ConfigError, DataError
from common.labels import spell, words
from common.rng import numpy_rng
from utils import program

SHARD_SIZE = 1000
EXTENSIONS = {"WAVEX": "wav", "RF64": "wav", "MPEG": "mp3"}  # of libsndfile's containers, where they are not the name
AGAIN = "regenerate the list with utils/generate_filelist.py"


# ---- Writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """Which clips go into which shard: shard i holds, in this order, the clips shares[i] of the manifest."""

    manifest: Manifest
    shares: Sequence[np.ndarray]
    keys: Mapping[int, str]  # of the clips whose own key is taken
    sample_rate: int
    stem: Path

    def path(self, number: int) -> Path:
        """The name of a shard."""
        return self.stem.with_name(f"{self.stem.name}-{number:06d}.tar")


def write_shard(plan: Plan, number: int) -> None:
    """Write a shard and, last of all, its list; one that has its list is kept."""
    path, clips = plan.path(number), plan.shares[number]
    if _is_complete(path, len(clips)):
        return
    lengths: list[int] = []
    with _whole(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for position in clips.tolist():
            utterance = plan.manifest[position]
            members, num_samples = _members(utterance, plan.sample_rate)
            lengths.append(num_samples)
            for extension, content in members.items():
                _add(tar, f"{plan.keys.get(position) or key_of(utterance.id)}.{extension}", content)
    found = index_shard(path)
    if len(found) != len(clips):
        raise DataError(f"{path}: has {len(found)} clips instead of {len(clips)}; its folder may be full or damaged")
    write_list(path.with_suffix(".tsv"), ".", [clip.path(path.name) for clip in found], lengths, found)


def key_of(name: str) -> str:
    """The key of a clip: its path, without dots in the base name, at the first of which webdataset ends a key."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")] or ["clip"]
    key = "/".join([*parts[:-1], parts[-1].replace(".", "_")])
    return f"clip{key}" if META.match(key) else key  # which webdataset would pass over


def unique_keys(names: Iterable[str]) -> dict[int, str]:
    """Other keys, by position, for clips whose key an earlier one has."""
    taken: set[str] = set()
    others = {}
    for position, name in enumerate(names):
        key = own = key_of(name)
        copy = 1
        while key in taken:
            copy += 1
            key = f"{own}_{copy}"
        taken.add(key)
        if key != own:
            others[position] = key
    return others


def _members(utterance: Utterance, sample_rate: int) -> tuple[dict[str, bytes], int]:
    """Contents by extension of the members of a clip, the audio first, and its samples at the model's rate."""
    clip, where = utterance.clip, utterance.where
    info = read_info(Clip(clip.path, clip.span), where)
    total = info.num_samples(sample_rate)
    whole = abs(total - utterance.num_samples) <= utterance.tolerance and not clip.start
    if whole:
        audio, extension = _bytes_of(clip, where), EXTENSIONS.get(info.container, info.container.lower())
        entry: dict[str, Any] = {"duration": info.num_frames / info.sample_rate, "sample_rate": info.sample_rate}
    elif clip.start is None:
        raise DataError(f"{where}: {clip.path}: has {total} samples, but {utterance.num_samples} are listed; {AGAIN}")
    if not whole or extension not in AUDIO:
        wave = read_audio(
            clip, sample_rate=sample_rate, num_samples=utterance.num_samples, tolerance=utterance.tolerance, where=where
        )
        audio, extension, total = _as_flac(wave, sample_rate), "flac", len(wave)
        entry = {"duration": total / sample_rate, "sample_rate": sample_rate}
    members = {extension: audio}
    if utterance.text is not None:
        text = words(utterance.text)
        members["txt"] = text.encode()
        entry["text"] = text
    members["json"] = json.dumps(entry, ensure_ascii=False).encode()
    return members, total


def _bytes_of(clip: Clip, where: str) -> bytes:
    """The bytes of a file, or of a member of another shard."""
    with clip.path.open("rb") as file:
        if clip.span is None:
            return file.read()
        file.seek(clip.span[0])
        content = file.read(clip.span[1])
    if len(content) < clip.span[1]:
        raise DataError(f"{where}: {clip.path} ends within this clip; copy the shard again")
    return content


def _as_flac(wave: np.ndarray, sample_rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, sample_rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a member; its header depends on its name and size only."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    tar.addfile(info, io.BytesIO(content))


@contextmanager
def _whole(path: Path) -> Iterator[Any]:
    """A binary file to write, whole or not at all."""
    partial_path = path.with_name(f".{path.name}.partial")
    with program.writing(path, partial_path):
        try:
            with partial_path.open("wb") as file:
                yield file
            partial_path.replace(path)
        finally:
            partial_path.unlink(missing_ok=True)


def _is_complete(path: Path, clips: int) -> bool:
    """Whether a shard is there with its list: that is written last."""
    tsv = path.with_suffix(".tsv")
    return path.exists() and tsv.exists() and tsv.read_bytes().count(b"\n") == clips + 1


def write_list(tsv: Path, root: str, paths: Sequence[str], lengths: Sequence[int], clips: Sequence[ShardClip]) -> bool:
    """Write a list and, before it, its labels where all clips have a text; returns whether there are labels."""
    texts = [clip.text for clip in clips if clip.text is not None]
    labelled = len(texts) == len(clips)
    if labelled:
        program.write_lines(tsv.with_suffix(".ltr"), map(spell, texts))
        program.write_lines(tsv.with_suffix(".wrd"), texts)
    elif texts:
        print(f"warning: {tsv}: {len(clips) - len(texts)} clips have no text: no labels are written", file=sys.stderr)
    lines = (f"{path}\t{samples}" for path, samples in zip(paths, lengths, strict=True))
    program.write_lines(tsv, [root, *lines])
    return labelled


def make_shards(args: argparse.Namespace) -> None:
    """Write the shards of a list, their lists, and the list of all of them."""
    source, folder = map(Path, args.paths)
    manifest, files = _read(source, args.sample_rate)
    stem = folder / (args.name or source.stem)
    joined = stem.with_name(stem.name + ".tsv")
    if any(program.same_file(joined.with_suffix(path.suffix), path) for path in files):
        raise ConfigError(f"{joined}: is the list to read; choose another folder or --name")
    number = args.num_shards or -(-len(manifest) // (args.shard_size or SHARD_SIZE))
    if number > len(manifest):
        raise ConfigError(f"--num_shards {number}: there are only {len(manifest)} clips; give at most as many")
    order = np.arange(len(manifest))
    if args.shuffle:
        order = numpy_rng(args.seed or 0, "shards").permutation(len(manifest))
    shares = np.array_split(order, number)
    if args.sort_by_length:
        shares = [share[np.argsort(manifest.num_samples[share], kind="stable")] for share in shares]
    settings = {
        "clips": len(manifest),
        "shards": number,
        "shuffle": args.shuffle,
        "seed": args.seed or 0,
        "sort_by_length": args.sort_by_length,
        "sample_rate": args.sample_rate,
        "list": _fingerprint(files),
    }
    _agree(stem.with_name(f"{stem.name}.shards.json"), settings)
    keys = unique_keys(manifest[position].id for position in range(len(manifest)))
    plan = Plan(manifest, shares, keys, args.sample_rate, stem)
    _in_parallel(write_shard, plan, number, args.workers)
    tars = [plan.path(shard) for shard in range(number)]
    _join_lists(joined, [tar.with_suffix(".tsv") for tar in tars])
    size = sum(tar.stat().st_size for tar in tars) / 2**20
    print(f"{joined}: {len(manifest)} clips in {number} shards, {size:.0f} MiB; {plan.path(0)} is the first")


def _read(source: Path, sample_rate: int) -> tuple[Manifest, list[Path]]:
    """The list with its labels, if there are any, and the files that it was read from."""
    labels = source.with_suffix(".ltr")
    if labels.exists():
        return read_manifest(source, labels, sample_rate=sample_rate), [source, labels]
    text = source.suffix in JSON_SUFFIXES and _has_text(source)
    return read_manifest(source, sample_rate=sample_rate, text=text), [source]


def _has_text(source: Path) -> bool:
    """Whether the first entry of a JSON manifest has a text."""
    with source.open(encoding="utf-8-sig") as file:
        try:
            entry = json.loads(file.readline())
        except ValueError:  # told by whoever reads the whole
            return False
    return isinstance(entry, dict) and isinstance(entry.get("text"), str)


def _fingerprint(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _agree(path: Path, settings: Mapping[str, Any]) -> None:
    """Store what decides the content of the shards; ConfigError if shards of another content are there."""
    if path.exists():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            stored = {}
        other = [
            f"{name} {stored.get(name)}, now {value}" for name, value in settings.items() if stored.get(name) != value
        ]
        if other:
            raise ConfigError(
                f"{path}: the shards there were made otherwise ({'; '.join(other)}); go on with the same list and "
                "settings, choose another folder or --name, or remove them and this file"
            )
    program.write_lines(path, [json.dumps(settings)])


def _join_lists(joined: Path, lists: Sequence[Path]) -> None:
    """Write the list of all shards and, where they have labels, these."""
    for suffix in (".ltr", ".wrd"):
        if all(path.with_suffix(suffix).exists() for path in lists):
            program.write_lines(joined.with_suffix(suffix), _lines(path.with_suffix(suffix) for path in lists))
    rows = (line for path in lists for line in list(_lines([path]))[1:])
    program.write_lines(joined, (line for part in (["."], rows) for line in part))


def _lines(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        yield from path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


# ---- Lists of shards that are there ----------------------------------------------------------------------------------


def read_shard(sources: tuple[Sequence[Path], int], number: int) -> tuple[list[tuple[ShardClip, int]], list[str]]:
    """The clips of a shard with their samples at the model's rate, and what is wrong with others, by their headers."""
    path, sample_rate = sources[0][number], sources[1]
    found, bad = [], []
    for clip in index_shard(path):
        try:
            info = read_info(Clip(path, (clip.offset, clip.size)), f"{path}: {clip.name}")
        except DataError as error:
            bad.append(str(error))
        else:
            found.append((clip, info.num_samples(sample_rate)))
    return found, bad


def list_shards(args: argparse.Namespace) -> None:
    """Write the list of every shard beside it or, with --output, one list of all."""
    shards = [Path(name) for pattern in args.paths for name in expand_pattern(pattern)]
    read = _in_parallel(read_shard, (shards, args.sample_rate), len(shards), args.workers)
    found, bad = [clips for clips, _ in read], [message for _, messages in read for message in messages]
    if bad and not args.skip_bad:
        raise DataError("\n  ".join((f"{len(bad)} clips cannot be listed; leave them out with --skip_bad", *bad[:10])))
    if bad:
        print("\n  ".join((f"{len(bad)} clips cannot be listed and are left out", *bad[:10])))
    empty = [path for path, clips in zip(shards, found, strict=True) if not clips]
    if empty:
        raise DataError(f"{empty[0]}: has no audio; its members should be named KEY.flac or KEY.wav")
    if args.output is None:
        for path, rows in zip(shards, found, strict=True):
            clips = [clip for clip, _ in rows]
            paths = [clip.path(path.name) for clip in clips]
            write_list(path.with_suffix(".tsv"), ".", paths, [samples for _, samples in rows], clips)
        print(f"{sum(map(len, found))} clips in {len(shards)} shards, each with its list beside it")
        return
    root = Path(os.path.commonpath([path.absolute().parent for path in shards]))
    places = [path.absolute().relative_to(root).as_posix() for path in shards]
    clips = [clip for rows in found for clip, _ in rows]
    paths = [clip.path(place) for place, rows in zip(places, found, strict=True) for clip, _ in rows]
    labelled = write_list(args.output, str(root), paths, [samples for rows in found for _, samples in rows], clips)
    print(f"{args.output}: {len(clips)} clips in {len(shards)} shards" + ("" if labelled else ", without labels"))


# ---- The program -----------------------------------------------------------------------------------------------------

_work: Callable[[int], Any] | None = None  # of a process of the pool


def _in_parallel(work: Callable[[Any, int], Any], shared: Any, number: int, workers: int) -> list[Any]:  # noqa: ANN401
    """work(shared, i) for i below `number`, in order, by so many processes, each of which is given `shared` once."""
    job = partial(work, shared)
    with program.bar(total=number, unit="shard") as bar:
        results = []
        if min(workers, number) <= 1:
            for result in map(job, range(number)):
                results.append(result)
                bar.update()
            return results
        forked = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        with ProcessPoolExecutor(min(workers, number), forked, _start_worker, (job,)) as pool:
            for result in pool.map(_run_work, range(number)):
                results.append(result)
                bar.update()
    return results


def _start_worker(work: Callable[[int], Any]) -> None:
    global _work  # what a process is given at its start can be kept nowhere else
    _work = work


def _run_work(number: int) -> Any:  # noqa: ANN401
    if _work is None:
        raise RuntimeError("a process of the pool was not started by it")
    return _work(number)


def main(argv: list[str] | None = None) -> None:
    """Write shards, or lists of shards."""
    parser = program.Parser(__doc__ or "")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="LIST OUT_DIR; with --index: shards, or patterns")
    parser.add_argument("--index", action="store_true", help="make the lists of shards that are there")
    parser.add_argument("--output", type=Path, metavar="LIST.tsv", help="with --index: one list of all shards")
    parser.add_argument("--skip_bad", action="store_true", help="with --index: leave out clips that cannot be read")
    parser.add_argument("--num_shards", type=_count, help="shards to write (default: as --shard_size gives)")
    parser.add_argument("--shard_size", type=_count, help=f"most clips of a shard (default: {SHARD_SIZE})")
    parser.add_argument("--name", help="beginning of the names of the shards (default: that of the list)")
    parser.add_argument("--shuffle", action="store_true", help="put the clips into the shards in random order")
    parser.add_argument("--seed", type=int, help="of --shuffle (default: 0)")
    parser.add_argument("--sort_by_length", action="store_true", help="shortest clip first within every shard")
    parser.add_argument("--sample_rate", type=_count, default=16000, help="of the model, in Hz: lengths count at it")
    parser.add_argument("--workers", type=_count, default=program.cpu_count(), help="processes")
    args = parser.parse(argv)
    names = ("num_shards", "shard_size", "name", "shuffle", "seed", "sort_by_length")
    writing = {name: getattr(args, name) for name in names}
    useless = [name for name, value in writing.items() if value is not None and value is not False]
    if args.index and useless:
        raise ConfigError(f"--{useless[0]}: has no effect with --index, which writes no shards; leave it out")
    if args.index and args.output and args.output.suffix != ".tsv":
        raise ConfigError(f"--output {args.output}: the name of a file list ends in .tsv")
    if args.skip_bad and not args.index:
        raise ConfigError("--skip_bad: only with --index; clean the list with utils/check_data.py --fix")
    if args.output and not args.index:
        raise ConfigError("--output: only with --index; the second path is the folder of the shards")
    if not args.index and len(args.paths) != 2:
        raise ConfigError("give two paths, LIST and OUT_DIR, or --index and shards; --help explains")
    if args.num_shards and args.shard_size:
        raise ConfigError("--num_shards: cannot be used together with --shard_size; leave one out")
    if args.seed is not None and not args.shuffle:
        raise ConfigError(f"--seed {args.seed}: has no effect without --shuffle; add that or leave it out")
    (list_shards if args.index else make_shards)(args)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


if __name__ == "__main__":
    program.run(main)
