"""Output symbols of Hugging Face transformers <-> those of this toolkit: which row stands where, and its name.

Here the first four rows are always the blank, `<pad>`, `</s>` and `<unk>`. There the blank is the row of the padding
symbol, and the others stand anywhere or nowhere. The official models have our rows in our order, and only the names
of the first two are swapped: that is what vocabulary() writes.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import CheckpointError, shown
from common.labels import BLANK, SPECIAL_SYMBOLS, WORD_BOUNDARY
from wav2vec2.convert.contents import listed, symbols_of

# The bias of a row that the other side lacks: exp() of it is 0 beside any logit, and float16 can hold it, so that
# the symbol is never chosen and the probabilities of the others stay what they are.
NEVER = -1e4

FILES = ("vocab.json", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")

# File -> its content, of those of FILES that are there.
Tables = Mapping[str, Mapping[str, Any]]

# What transformers takes where no file names a symbol, ...
_NAMES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "word_delimiter_token": WORD_BOUNDARY,
}
# ... which of them stand where here, and the usual spelling of an official file, ...
_SLOTS = (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
_WRITTEN = ("<pad>", "<s>", "</s>", "<unk>")
# ... and how it makes text of symbols; the first of each is what this toolkit does, too.
_SPELLING: dict[str, tuple[Any, ...]] = {
    "tokenizer_class": ("Wav2Vec2CTCTokenizer", "Wav2Vec2Tokenizer"),
    "do_lower_case": (False,),
    "replace_word_delimiter_char": (" ",),
}


@dataclass(frozen=True)
class Rows:
    """Where the rows of our output layer come from."""

    sources: tuple[int | None, ...]  # the row over there; None for one that it lacks
    labels: tuple[str, ...] | None
    remarks: tuple[str, ...] = ()

    def arrange(self, rows: Tensor, missing: float) -> Tensor:
        """The rows in our order, filled with a constant where they are missing."""
        nothing = torch.full_like(rows[0], missing)
        return torch.stack([nothing if source is None else rows[source] for source in self.sources])


def find_rows(where: str, number: int, config: Mapping[str, Any], tables: Tables) -> Rows:
    """What becomes of the `number` rows of lm_head, by config.json and the tokenizer's files.

    Raises CheckpointError where it cannot be told which row is the blank, or rows have no symbol, or two the same.
    """
    names = _names(where, tables)
    symbols = _symbols(where, tables)
    blank = _blank(where, number, config, symbols, names)
    if "vocab.json" not in tables:
        others = [row for row in range(number) if row != blank]
        moved = (f"without vocab.json: the other rows keep their order behind the blank, row {blank}",) if blank else ()
        return Rows((blank, *others), None, moved)
    _check_pad(where, blank, symbols, names, tables)
    left = {row: symbol for row, symbol in sorted(symbols.items()) if row < number and row != blank}
    nameless = [str(row) for row in range(number) if row not in left and row != blank]
    if nameless:
        raise CheckpointError(
            f"{where}: rows {listed(nameless)} of its output layer have no symbol in {FILES[0]} or {FILES[1]}; "
            f"complete {FILES[0]}"
        )
    specials = [_taken(left, (names[name], usual)) for name, usual in _SLOTS]
    labels = [WORD_BOUNDARY if symbol == names["word_delimiter_token"] else symbol for symbol in left.values()]
    twice = [shown(symbol) for symbol, times in Counter([*SPECIAL_SYMBOLS, *labels]).items() if times > 1]
    if twice:
        raise CheckpointError(
            f"{where}: {listed(twice)} would name two rows of the output layer here, where {SPECIAL_SYMBOLS[0]} is the "
            f"blank and {WORD_BOUNDARY} the word boundary; rename one of them in {FILES[0]}"
        )
    sources = (blank, *specials, *left)
    symbols_here = symbols_of(where, (*SPECIAL_SYMBOLS, *labels), len(sources))
    return Rows(sources, symbols_here, tuple(_remarks(number, symbols, names, tables)))


def vocabulary(labels: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """File -> content of a tokenizer that gives the same text."""
    specials = {name: symbol for name, symbol in _NAMES.items() if name != "word_delimiter_token"}
    return {
        "vocab.json": {symbol: row for row, symbol in enumerate((*_WRITTEN, *labels[len(_WRITTEN) :]))},
        "special_tokens_map.json": specials,
        "tokenizer_config.json": {
            **_NAMES,
            **{name: usual[0] for name, usual in _SPELLING.items()},
            "clean_up_tokenization_spaces": False,
            "processor_class": "Wav2Vec2Processor",
        },
    }


def special_rows() -> dict[str, int]:
    """The options of config.json that go with it."""
    return {"pad_token_id": BLANK, "bos_token_id": _WRITTEN.index("<s>"), "eos_token_id": _WRITTEN.index("</s>")}


def _names(where: str, tables: Tables) -> dict[str, str | None]:
    """What the symbols of _NAMES are: by tokenizer_config.json, else special_tokens_map.json, else transformers."""
    names: dict[str, str | None] = dict(_NAMES)
    for file in FILES[2:]:
        for name in names.keys() & tables.get(file, {}).keys():
            value = tables[file][name]
            value = value.get("content") if isinstance(value, Mapping) else value
            if not (value is None or isinstance(value, str)):
                raise CheckpointError(f"{where}: {file}: its {name} is not text; use another folder")
            names[name] = value
    return names


def _symbols(where: str, tables: Tables) -> dict[int, str]:
    """Row -> symbol, of the vocabulary and what was added to it."""
    added = tables.get("tokenizer_config.json", {}).get("added_tokens_decoder")
    decoder = added if isinstance(added, Mapping) else {}
    found = [(file, symbol, row) for file in FILES[:2] for symbol, row in tables.get(file, {}).items()]
    for text, token in decoder.items():
        row = int(text) if len(text) < 10 and text.isascii() and text.isdigit() else text
        symbol = token.get("content") if isinstance(token, Mapping) else token
        found.append(("tokenizer_config.json", str(symbol), row))
    symbols: dict[int, str] = {}
    for file, symbol, row in found:
        if type(row) is not int or row < 0:
            raise CheckpointError(
                f"{where}: {file}: is not a table of symbols and their rows: {shown(symbol)} has {shown(row)}"
            )
        if symbols.setdefault(row, symbol) != symbol:
            raise CheckpointError(
                f"{where}: {file}: row {row} is both {shown(symbol)} and {shown(symbols[row])}; correct one of them"
            )
    return symbols


def _blank(
    where: str, number: int, config: Mapping[str, Any], symbols: Mapping[int, str], names: Mapping[str, str | None]
) -> int:
    """The row of the blank: what config.json takes for padding, else what the tokenizer takes."""
    blank = config.get("pad_token_id", 0)
    if blank is None:
        blank = next((row for row, symbol in symbols.items() if symbol == names["pad_token"]), None)
    if type(blank) is not int or not 0 <= blank < number:
        raise CheckpointError(
            f"{where}: config.json: pad_token_id {shown(blank)}: is not a row of the output layer, which has "
            f"{number}; set it to that of the blank"
        )
    return blank


def _check_pad(
    where: str, blank: int, symbols: Mapping[int, str], names: Mapping[str, str | None], tables: Tables
) -> None:
    """The model takes the blank from pad_token_id, the tokenizer from pad_token: they must mean the same row."""
    pad = names["pad_token"]
    rows = [row for row, symbol in symbols.items() if symbol == pad]
    is_said = pad is not None and any("pad_token" in tables.get(file, {}) for file in FILES[2:])
    if (rows and blank not in rows) or (is_said and symbols.get(blank, pad) != pad):
        symbol = shown(symbols[blank]) if blank in symbols else "without a symbol"
        raise CheckpointError(
            f"{where}: the blank is row {blank} ({symbol}) by pad_token_id in config.json, and {shown(pad)} by the "
            "tokenizer's pad_token; correct the wrong one"
        )


def _taken(left: dict[int, str], spellings: tuple[str | None, ...]) -> int | None:
    """Take the row with one of these symbols; None if there is none."""
    row = next((row for spelling in spellings for row, symbol in left.items() if symbol == spelling), None)
    if row is not None:
        del left[row]
    return row


def _remarks(number: int, symbols: Mapping[int, str], names: Mapping[str, str | None], tables: Tables) -> list[str]:
    """What the folder says about its symbols that has no place here."""
    settings = tables.get("tokenizer_config.json", {})
    remarks = [
        f"{name} is {shown(settings[name])}: transformers makes text of the symbols in another way"
        for name, usual in _SPELLING.items()
        if settings.get(name) is not None and settings[name] not in usual
    ]
    beyond = [
        shown(symbol) for row, symbol in sorted(symbols.items()) if row >= number and symbol not in names.values()
    ]
    if beyond:
        remarks.append(f"the output layer has no rows for the symbols {listed(beyond)}")
    return remarks
