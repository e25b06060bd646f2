"""From CTC scores to symbols, and the errors against a reference."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from torch import Tensor

BLANK = 0


def greedy(logits_BTK: Tensor, frame_lengths: Sequence[int]) -> tuple[list[list[int]], int]:
    """Best path of every row: the best symbol of each valid frame, repeats collapsed, blanks dropped.

    Returns the symbol ids and the number of frames that chose the blank. Reads the device once.
    """
    best = logits_BTK.argmax(-1).tolist()
    paths = [row[:length] for row, length in zip(best, frame_lengths, strict=True)]
    ids = [[symbol for symbol, _ in groupby(path) if symbol != BLANK] for path in paths]
    return ids, sum(path.count(BLANK) for path in paths)


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> tuple[int, int]:
    """Word errors (substitutions, deletions and insertions) and reference words, over all pairs."""
    return _errors([text.split() for text in references], [text.split() for text in hypotheses])


def symbol_errors(
    references: Sequence[Sequence[int | str]], hypotheses: Sequence[Sequence[int | str]]
) -> tuple[int, int]:
    """The same for sequences of symbols: ids, or the characters of a text."""
    return _errors(references, hypotheses)


def _errors(references: Sequence[Sequence[int | str]], hypotheses: Sequence[Sequence[int | str]]) -> tuple[int, int]:
    import jiwer  # only here: training steps and benchmarks on made batches need no more than torch

    errors = total = 0
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        total += len(reference)
        if not reference or not hypothesis:  # jiwer takes no empty references
            errors += max(len(reference), len(hypothesis))
            continue
        # One word per symbol, so that symbols of any kind, spaces too, are compared as they are.
        number: dict[int | str, str] = {}
        words = [
            " ".join(number.setdefault(symbol, f"s{len(number)}") for symbol in part)
            for part in (reference, hypothesis)
        ]
        result = jiwer.process_words(words[0], words[1])
        errors += result.substitutions + result.deletions + result.insertions
    return errors, total
