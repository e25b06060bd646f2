"""Tiny corpora and command lines for tests."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import soundfile
from tiny_model import MODEL

MODEL_FLAGS = [
    *("--conv_feature_layers", MODEL.conv_feature_layers),
    *("--encoder_embed_dim", "24", "--encoder_ffn_embed_dim", "48", "--encoder_attention_heads", "4"),
    *("--conv_pos", "8", "--conv_pos_groups", "4", "--final_dim", "12", "--latent_vars", "10"),
    *("--hourglass_transformer", "[1,(1,2),1]"),
]
# A recipe's variables, small
SMALL = {
    "DEVICE": "cpu",
    "NUM_CONCAT_BATCHES": "1",
    "WORLD_BATCHES": "2",
    "MAX_TOKENS": "60000",
    "MAX_UPDATE": "2",
    "FREEZE_FINETUNE_UPDATES": "1",
    "MIN_SAMPLE_SIZE": "0",
    "NUM_WORKERS": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHON": sys.executable,
    "CONV_FEATURE_LAYERS": "[(16,10,5)]+[(16,3,2)]*4+[(16,2,2)]*2",
    "ENCODER_LAYERS": "2",
    "ENCODER_EMBED_DIM": "32",
    "ENCODER_FFN_EMBED_DIM": "32",
    "ENCODER_ATTENTION_HEADS": "4",
    "FINAL_DIM": "16",
    "LATENT_VARS": "8",
    "MASK_CHANNEL_LENGTH": "4",
    "TRAIN_SUBSET": "train",
    "VALID_SUBSET": "valid",
}
WORDS = ("ONE", "TWO", "SIX", "TEN")


def corpus(folder: Path, number: int = 12, seed: int = 0, low: float = 0.5, high: float = 1.0) -> Path:
    """A folder with train and valid lists of tones (one pitch per word) and their labels; returns the folder."""
    rng = np.random.default_rng(seed)
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"tsv": [str(folder / "audio")], "ltr": [], "wrd": []}
    for index in range(number):
        words = [WORDS[pick] for pick in rng.integers(len(WORDS), size=rng.integers(1, 4))]
        seconds = rng.uniform(low, high) / len(words)
        parts = []
        for word in words:
            time = np.arange(int(seconds * 16000)) / 16000
            parts.append(0.3 * np.sin(2 * np.pi * (200 + 150 * WORDS.index(word)) * time))
        wave = np.concatenate(parts) + 0.01 * rng.standard_normal(sum(map(len, parts)))
        soundfile.write(folder / "audio" / f"{index}.wav", wave, 16000)
        lines["tsv"].append(f"{index}.wav\t{len(wave)}")
        lines["ltr"].append(" ".join(" ".join(word) + " |" for word in words))
        lines["wrd"].append(" ".join(words))
    for subset in ("train", "valid"):
        for kind, content in lines.items():
            (folder / f"{subset}.{kind}").write_text("\n".join(content) + "\n")
    symbols = sorted({*"".join(WORDS), "|"})
    (folder / "dict.ltr.txt").write_text("".join(f"{symbol} 1\n" for symbol in symbols))
    return folder
