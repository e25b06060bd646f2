"""From a fine-tuned checkpoint and speech to transcripts: the recogniser, what it reads, writes and takes.

Stages: load_recognizer(), open_list() -> the pass itself, in inference.py -> gather() -> score(), save_*(), timing().
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from common import distributed
from common.data.audio import normalize, read_audio
from common.data.collate import Batch, Collator
from common.data.dataset import Sample
from common.data.loader import ValidLoader
from common.data.manifest import JSON_SUFFIXES, read_manifest
from common.data.prepare import valid_loader
from common.data.sampler import PlannedSubBatch
from common.errors import CheckpointError, ConfigError, DataError
from common.labels import Dictionary, words
from common.precision import to_half
from wav2vec2 import decoding
from wav2vec2.build import HALF, build_model, fp32_modules
from wav2vec2.config import ModelConfig, PrecisionConfig
from wav2vec2.convert.contents import MASK_EMBEDDING
from wav2vec2.convert.load_any import load_any, with_dictionary
from wav2vec2.model import Wav2Vec2Ctc
from wav2vec2.norms import at_least_fp32
from wav2vec2.start import load_weights
from wav2vec2.task import FinetuneTask

log = logging.getLogger(__name__)

LOGITS_FORMAT = "wav2vec2-log-probs"
LOGITS_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Recognizer:
    """A fine-tuned model, its dictionary, and what it expects of audio (all from one checkpoint)."""

    task: FinetuneTask
    dictionary: Dictionary
    model: ModelConfig

    def num_frames(self, samples: Any) -> Any:
        """Frames of a waveform of so many samples."""
        return self.task.model.w2v.num_frames(samples)

    def log_probs(self, batch: Batch) -> Tensor:
        """Log-probabilities [B, T, K] of every symbol in every frame, in float32 whatever the model computes in."""
        return torch.log_softmax(at_least_fp32(self.task.logits(batch)), -1)

    def texts(self, log_probs_BTK: Tensor, frame_lengths: Sequence[int]) -> list[str]:
        """The text of every row, by greedy decoding of its valid frames."""
        ids, _ = decoding.greedy(log_probs_BTK, frame_lengths)
        return [self.dictionary.decode(row) for row in ids]


def load_recognizer(
    path: str,
    *,
    device: torch.device,
    precision: PrecisionConfig,
    use_ema: bool,
    reference_padding: bool,
    dictionary: str = "",
) -> Recognizer:
    """The model of a fine-tuned checkpoint of any format, ready to run; CheckpointError for any other file.

    Half precision is that of training: the operations that stay in fp32 by default do so here as well.
    `dictionary`: the symbols, for files that have none. Raises DataError if they do not fit.
    """
    contents = load_any(path)
    if contents.config.mode != "finetune":
        raise CheckpointError(
            f"{path}: is a pre-trained model, which has no output symbols; fine-tune it first (train.py finetune)"
        )
    if dictionary:
        contents = with_dictionary(contents, path, dictionary)
    if contents.labels is None:
        raise CheckpointError(
            f"{path}: does not tell the symbols of its output layer; name its dictionary with --dictionary "
            "(fairseq's is dict.ltr.txt)"
        )
    config = replace(contents.config, precision=precision)
    symbols = Dictionary(contents.labels)  # checked when they were read
    model = build_model(config, symbols)
    assert isinstance(model, Wav2Vec2Ctc), "fine-tuning gives a CTC model"  # noqa: S101
    weights = contents.inference_weights() if use_ema else contents.weights
    load_weights(model, {**_masks_unused(model), **weights}, path)
    if precision.name in HALF:
        to_half(model, HALF[precision.name], fp32_modules(model, precision.kept_in_fp32()))
    task = FinetuneTask(model.requires_grad_(False), seed=0, reference_padding=reference_padding).to(device).eval()
    model.w2v.encoder.pos_conv.fold()  # its weights neither change nor move any more
    log.info(
        "%s: %.2f M parameters%s, %d symbols, %s, %s",
        path,
        sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        ", averaged weights" if use_ema and contents.averaged else "",
        len(symbols),
        device,
        precision.name,
    )
    return Recognizer(task, symbols, config.model)


def _masks_unused(model: Wav2Vec2Ctc) -> dict[str, Tensor]:
    """The mask embedding, which some files leave out and inference has no use for."""
    return {f"w2v.{MASK_EMBEDDING}": model.w2v.mask_emb.detach()}


# ---- What is transcribed --------------------------------------------------------------------------------------------


class FileList:
    """This process's batches of a file list, each with the places of its rows in the list.

    Utterances are batched by length, whole, every one once over all processes. Places, not ids, lead back to the
    order of the list: a list may name a file twice.
    """

    def __init__(self, loader: ValidLoader, *, hours: float, scored: bool) -> None:
        """`hours`: audio of the whole list; `scored`: it has labels."""
        self._loader = loader
        self.hours, self.scored = hours, scored

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Batch, list[int]]]:
        for batch in self._loader:
            yield batch, list(batch.places)


class SingleFile:
    """One audio file as a batch of one, read anew in every pass; process 0 alone transcribes it."""

    def __init__(self, path: str, recognizer: Recognizer) -> None:
        self._path, self._recognizer = path, recognizer
        self.scored = False
        self.hours = len(self._read()) / recognizer.model.sample_rate / 3600

    def __len__(self) -> int:
        return int(distributed.is_main())

    def __iter__(self) -> Iterator[tuple[Batch, list[int]]]:
        for _ in range(len(self)):
            wave_S = self._read()
            if self._recognizer.model.normalize:
                wave_S = normalize(wave_S)
            sample = Sample(Path(self._path).stem, wave_S, text=None, labels=None)
            collate = Collator(self._recognizer.num_frames, seed=0)
            yield collate([PlannedSubBatch(0, 0, 0)], [[sample]]), [0]

    def _read(self) -> Any:
        wave_S = read_audio(self._path, sample_rate=self._recognizer.model.sample_rate)
        if self._recognizer.num_frames(len(wave_S)) < 1:
            raise DataError(
                f"{self._path}: has {len(wave_S)} samples, too short for one frame of the model; give a longer file"
            )
        return wave_S


Speech = FileList | SingleFile


def open_list(
    tsv: Path,
    labels: Path | None,
    recognizer: Recognizer,
    *,
    max_tokens: int,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
) -> FileList:
    """The utterances of a list; `labels` are texts to score against and need not be spelt with the dictionary.

    Where a JSON manifest has no such file beside it, its own texts are the labels.

    A batch has at most `max_tokens` samples, padding included, or one utterance, and at most `batch_size`
    utterances; 0 is no limit.

    Raises DataError for a malformed list, an utterance shorter than one frame, and labels without any word.
    """
    own_texts = labels is not None and tsv.suffix in JSON_SUFFIXES and not labels.exists()
    rate = recognizer.model.sample_rate
    manifest = read_manifest(tsv, None if own_texts else labels, sample_rate=rate, text=own_texts)
    if labels is not None:
        references = [words(manifest.text(i) or "") for i in range(len(manifest))]
        _check_references(references, tsv if own_texts else labels, recognizer.dictionary)
    loader = valid_loader(
        manifest,
        sample_rate=recognizer.model.sample_rate,
        normalize=recognizer.model.normalize,
        num_frames=recognizer.num_frames,
        seed=0,
        max_tokens=max_tokens or None,
        max_sentences=batch_size or None,
        rank=distributed.rank(),
        world=distributed.world_size(),
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
    hours = manifest.hours(recognizer.model.sample_rate)
    return FileList(loader, hours=hours, scored=labels is not None)


def _check_references(references: Sequence[str], labels: Path, dictionary: Dictionary) -> None:
    """Say what makes a score look worse than the model is; refuse references that give none."""
    empty = sum(not reference for reference in references)
    if empty == len(references):
        raise DataError(f"{labels}: holds no words, so there is no WER; use --transcribe_filelist for transcripts")
    if empty:
        log.warning("%s: %d empty lines; every word recognised there counts as an error", labels, empty)
    unknown = sorted(set("".join(references)) - set(dictionary.symbols) - {" "})
    if unknown:
        log.warning(
            "%s: %d characters that the model cannot write, such as %r (U+%04X); words with them count as errors",
            labels,
            len(unknown),
            unknown[0],
            ord(unknown[0]),
        )


# ---- What comes out -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Transcript:
    """What was recognised in one utterance; `place` is its position in the list, from 0."""

    place: int
    id: str
    text: str
    reference: str | None
    log_probs_TK: Tensor | None  # on the CPU, only where they are asked for


def transcripts(
    batch: Batch, places: Sequence[int], texts: Sequence[str], log_probs_BTK: Tensor | None
) -> list[Transcript]:
    """The transcripts of one batch, with the log-probabilities of valid frames where they are given."""
    kept: list[Tensor | None] = [None] * batch.num_rows
    if log_probs_BTK is not None:
        # clone(): a view would drag its whole batch into every file and message
        kept = [row[:frames].clone() for row, frames in zip(log_probs_BTK.cpu(), batch.frame_lengths, strict=True)]
    lines: Sequence[str | None] = batch.texts or [None] * batch.num_rows
    return [
        Transcript(place, name, text, None if line is None else words(line), log_probs)
        for place, name, text, line, log_probs in zip(places, batch.ids, texts, lines, kept, strict=True)
    ]


def gather(share: list[Transcript]) -> list[Transcript]:
    """The transcripts of all processes in the order of the list, on process 0 (elsewhere: none)."""
    found: list[Transcript] = []
    for source in range(distributed.world_size()):  # one after the other: nobody but 0 holds more than one share
        part = distributed.broadcast_object(share, source)
        if distributed.is_main():
            found += part
    return sorted(found, key=lambda transcript: transcript.place)


@dataclass(frozen=True)
class Score:
    """Errors (substitutions, deletions, insertions) and totals, over all utterances."""

    word_errors: int
    words: int
    character_errors: int
    characters: int

    @property
    def wer(self) -> float:
        """Word errors in percent of the reference words."""
        return 100 * self.word_errors / self.words

    @property
    def cer(self) -> float:
        """Character errors in percent of the reference characters; spaces between words are characters."""
        return 100 * self.character_errors / self.characters


def score(found: Sequence[Transcript]) -> Score:
    """Compare texts with references, at least one of which has words."""
    references = [transcript.reference or "" for transcript in found]
    hypotheses = [transcript.text for transcript in found]
    return Score(
        *decoding.word_errors(references, hypotheses),
        *decoding.symbol_errors(references, hypotheses),
    )


def save_predictions(path: Path, found: Sequence[Transcript]) -> None:
    """Write one line `id<TAB>text` per utterance, in the order of the list."""
    text = "".join(f"{transcript.id}\t{transcript.text}\n" for transcript in found)
    write_file("save_predictions", path, lambda file: file.write(text.encode()))


def save_logits(path: Path, found: Sequence[Transcript], dictionary: Dictionary) -> None:
    """Write log-probabilities for another decoder, as a torch file that loads with weights_only=True.

    The file is a dict:
        format: "wav2vec2-log-probs", format_version: 1
        ids: list of N utterance ids, in the order of the file list
        lengths: list of N frame counts T_i
        log_probs: list of N float32 tensors [T_i, K], natural logarithm, every frame sums to 1 after exp()
        symbols: list of the K output symbols; number 0 is the CTC blank, "|" the boundary between words
    """
    log_probs = [transcript.log_probs_TK for transcript in found if transcript.log_probs_TK is not None]
    content = {
        "format": LOGITS_FORMAT,
        "format_version": LOGITS_FORMAT_VERSION,
        "ids": [transcript.id for transcript in found],
        "lengths": [len(log_probs_TK) for log_probs_TK in log_probs],
        "log_probs": log_probs,
        "symbols": list(dictionary.symbols),
    }
    write_file("save_logits", path, lambda file: torch.save(content, file))  # noqa: TID251 - no checkpoint


def check_writable(flag: str, path: Path) -> None:
    """Refuse a file that write_file() could not write, before hours of work are put into it."""
    if path.is_dir():
        raise ConfigError(f"--{flag} {path}: is a folder; name a file")
    write_file(flag, path, lambda file: None, keep=False)


def write_file(flag: str, path: Path, write: Callable[[BinaryIO], object], *, keep: bool = True) -> None:
    """Write a file so that the old or the new one is there, whole; ConfigError naming the flag if it fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
        if keep:
            temporary.replace(path)
        else:
            temporary.unlink()
    except (OSError, RuntimeError) as error:  # torch's writer hides the system's error in a RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0][:100]
        raise ConfigError(f"--{flag} {path}: cannot be written ({reason}); choose another file") from error
