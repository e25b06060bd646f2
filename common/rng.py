"""Randomness by key: every draw is a pure function of what it belongs to, so there is no state to save.

What belongs to a sub-batch is keyed by (seed, update, index of the sub-batch in the update), so it does not
change with ranks, concatenation or accumulation; crops and masks by (seed, epoch, utterance or sub-batch);
LayerDrop by (seed, update); only dropout by (seed, update, micro-batch, rank).
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib

import numpy as np
import torch


def key(*parts: int | str) -> int:
    """A 63-bit number that is the same on every machine for the same parts."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_rng(*parts: int | str) -> np.random.Generator:
    """An independent NumPy generator for this key."""
    return np.random.Generator(np.random.PCG64(key(*parts)))


def torch_rng(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """An independent torch generator for this key, on `device`."""
    return torch.Generator(device=device).manual_seed(key(*parts))


def seed_all(*parts: int | str) -> None:
    """Seed torch's global generators (dropout, weight initialisation) with this key."""
    torch.manual_seed(key(*parts))
