"""Every message in the README's "When something goes wrong" is one that the program can print."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

# What differs from case to case (single capitals and words in capitals), what the system says, and punctuation.
CHANGES = re.compile(
    r"\b[A-Z]\b|\b(?:LIST|LINE|FILE|RULE|SIG[A-Z0-9]+)\b|\bwav2vec2_update\w+\.pt|^launcher|\b60 s\b"
    r"|loss, grad_norm|No space left on device|Permission denied|[][.;:,()=/]+"
)


def messages() -> list[str]:
    """The first column of the table."""
    section = (ROOT / "README.md").read_text().split("## When something goes wrong")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)


def source() -> str:
    """All code, as its messages are printed: pieces of one string joined, what is filled in as one mark."""
    paths = [ROOT / "train.py", *(ROOT / "common").rglob("*.py"), *(ROOT / "wav2vec2").rglob("*.py")]
    text = "\n".join(path.read_text() for path in [*paths, *(ROOT / "utils").glob("*.py")])
    text = re.sub(r'"\s*\n\s*f?"', "", text)
    return re.sub(r"\{[^{}]*\}|%\.?\d?[a-z]", "...", text)


def fragments(message: str) -> list[str]:
    """What of a message is the same in every case: several words, or the only one that there is."""
    parts = [part.strip() for part in CHANGES.split(message) if part.strip(" -")]
    return [part for part in parts if " " in part] or parts[-1:]


def test_the_table_is_found():
    assert len(messages()) > 35


@pytest.mark.parametrize("message", messages())
def test_a_message_of_the_readme_is_one_of_the_code(message):
    code, parts = source(), fragments(message)
    assert parts or message == "LIST:LINE: FILE: ..."  # has nothing that is always the same
    assert [part for part in parts if part not in code] == []
