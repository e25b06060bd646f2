"""Dictionary files: text to label ids and back."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from common.errors import DataError

SPECIAL_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")
BLANK, PAD, EOS, UNK = range(4)
WORD_BOUNDARY = "|"


class Dictionary:
    """The output symbols of a CTC model: id 0 is the CTC blank, the symbols of the file start at id 4."""

    def __init__(self, symbols: Sequence[str]) -> None:
        """Take all symbols in order of their ids, the four special ones included."""
        self.symbols = list(symbols)
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols) if i >= len(SPECIAL_SYMBOLS)}

    def __len__(self) -> int:
        return len(self.symbols)

    @classmethod
    def read(cls, path: str | Path) -> Dictionary:
        """Read a `dict.ltr.txt`: one `symbol count` per line. Raises DataError naming file:line."""
        symbols = list(SPECIAL_SYMBOLS)
        first_seen: dict[str, int] = {}
        for number, line in enumerate(_lines(path), start=1):
            where = f"{path}:{number}"
            symbol = _symbol(line, where)
            if symbol in SPECIAL_SYMBOLS:
                raise DataError(f"{where}: {symbol} is added by the toolkit itself; remove the line")
            if symbol in first_seen:
                raise DataError(
                    f"{where}: {_shown(symbol)} stands in line {first_seen[symbol]} already; remove one of them"
                )
            first_seen[symbol] = number
            symbols.append(symbol)
        if not first_seen:
            raise DataError(f"{path}: is empty; make it with utils/generate_dictionary.py")
        return cls(symbols)

    @classmethod
    def from_symbols(cls, symbols: Sequence[str]) -> Dictionary:
        """Take the list of symbols that a checkpoint holds. Raises DataError if it is not a dictionary."""
        if tuple(symbols[: len(SPECIAL_SYMBOLS)]) != SPECIAL_SYMBOLS:
            raise DataError(
                f"labels: begin with {list(symbols[:4])} instead of {list(SPECIAL_SYMBOLS)}; "
                "use a checkpoint of this toolkit"
            )
        if len(set(symbols)) != len(symbols) or len(symbols) == len(SPECIAL_SYMBOLS):
            raise DataError("labels: empty or with a symbol twice; use a checkpoint of this toolkit")
        return cls(symbols)

    def lines(self) -> list[str]:
        """A dictionary file of these symbols; its counts, which order the symbols and nothing else, are made up."""
        named = self.symbols[len(SPECIAL_SYMBOLS) :]
        return [f"{symbol} {len(named) - place}" for place, symbol in enumerate(named)]

    def encode(self, line: str, where: str) -> list[int]:
        """Turn a line of space-separated symbols into ids; `where` ("file:line") goes into the error."""
        try:
            return [self._ids[symbol] for symbol in line.split()]
        except KeyError as error:
            symbol = error.args[0]
        raise DataError(
            f"{where}: {_shown(symbol)} is not in the dictionary; "
            "correct the line, or make a new dictionary with utils/generate_dictionary.py"
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids (repeats and blanks already removed) into text.

        The word boundary becomes a space wherever it stands in the dictionary, `</s>` is dropped, the other
        special symbols are spelled out.
        """
        pieces = [self.symbols[i] for i in ids if i != EOS]
        return "".join(" " if piece == WORD_BOUNDARY else piece for piece in pieces).strip()


def words(line: str) -> str:
    """Turn a line of a `.ltr` file into text: "H I | Y O U |" is "HI YOU"."""
    return " ".join("".join(line.split()).replace(WORD_BOUNDARY, " ").split())


def spell(text: str) -> str:
    """Turn text into a line of a `.ltr` file: the inverse of `words`."""
    return " ".join(f"{' '.join(word)} {WORD_BOUNDARY}" for word in text.split())


def _lines(path: str | Path) -> list[str]:
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            return [line.rstrip("\n") for line in file]
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; make it with utils/generate_dictionary.py") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error


def _symbol(line: str, where: str) -> str:
    fields = line.split()
    # a count in other digits than 0-9 would be a symbol that somebody forgot to count
    if len(fields) != 2 or not (fields[1].isascii() and fields[1].isdigit()):
        raise DataError(
            f"{where}: {line.strip()[:40]!r} is not a symbol and its count (such as 'E 51860'); "
            "correct the line, or make the file anew with utils/generate_dictionary.py"
        )
    return fields[0]


def _shown(symbol: str) -> str:
    """The symbol with its code points: look-alikes and invisible characters must be told apart."""
    points = " ".join(f"U+{ord(character):04X}" for character in symbol[:8])
    return f"{symbol[:8]!r} ({points})"
