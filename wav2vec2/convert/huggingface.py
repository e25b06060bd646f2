"""Folders of Hugging Face transformers <-> Contents."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

from wav2vec2.convert.contents import Contents


def folder_of(path: Path) -> Path | None:
    """The folder that a path means: itself, or that of a weights file; None if it has no config.json."""
    folder = path if path.is_dir() else path.parent
    named = path.is_dir() or path.name.startswith(("model", "pytorch_model"))
    return folder if named and (folder / "config.json").is_file() else None


def to_contents(folder: Path) -> Contents:
    """What a folder says. Raises CheckpointError naming the file."""
    raise NotImplementedError
