"""Read a checkpoint of any program that this toolkit knows; which program wrote it is recognised."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from common import checkpoint, torch_file
from common.errors import CheckpointError, DataError, one_line, shown
from common.labels import SPECIAL_SYMBOLS, Dictionary
from wav2vec2.convert import fairseq, huggingface, native, nvidia
from wav2vec2.convert.contents import Contents
from wav2vec2.convert.stand_ins import stand_in

# Each makes a file (a folder for Hugging Face) that is not there yet, and raises CheckpointError for what its program
# does not have.
WRITERS: dict[str, Callable[[Path, Contents], None]] = {
    "native": native.write,
    "fairseq": fairseq.write,
    "nvidia": nvidia.write,
    "huggingface": huggingface.write,
}


def load_any(path: str | Path) -> Contents:
    """The contents of a file, or of a folder of Hugging Face, with all tensors on the CPU; nothing is executed.

    Raises CheckpointError in one line for what cannot be read or has no counterpart in this toolkit.
    """
    path = Path(path)
    folder = huggingface.folder_of(path)
    if folder:
        return replace(huggingface.to_contents(folder), origin=f"huggingface: {folder.name}")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder without config.json; name a checkpoint file in it")
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: says nothing but weights; name its folder, with config.json")
    content = torch_file.read(path, stand_in)
    if isinstance(content, Mapping) and content.get("format") == checkpoint.FORMAT:
        return native.to_contents(path, checkpoint.recognised(path, content))
    for program in (nvidia, fairseq):
        if program.recognises(content):
            contents = program.to_contents(path, content)
            return replace(contents, origin=f"{contents.source}: {path.name}")
    entries = ", ".join(map(shown, list(content)[:5])) if isinstance(content, Mapping) else "no table"
    raise CheckpointError(
        f"{path}: is a torch file, but not a checkpoint of {', '.join(WRITERS)} (it has {one_line(entries, 120)}); "
        "use another file"
    )


def with_dictionary(contents: Contents, where: str, dictionary: str | Path) -> Contents:
    """The same with the symbols of a dictionary file. Raises DataError if their number is another one."""
    if contents.config.mode != "finetune":
        raise DataError(f"{dictionary}: {where} is a pre-trained model without output layer; leave the dictionary out")
    symbols = tuple(Dictionary.read(dictionary).symbols)
    if contents.labels and contents.labels != symbols:
        raise DataError(f"{dictionary}: has other symbols than {where} itself; leave the dictionary out")
    if len(symbols) != contents.num_symbols:
        raise DataError(
            f"{dictionary}: has {len(symbols)} symbols (with the {len(SPECIAL_SYMBOLS)} special ones), the output "
            f"layer of {where} {contents.num_symbols} rows; name the dictionary that it was trained with"
        )
    return replace(contents, labels=symbols)
