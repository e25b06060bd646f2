"""Lengths of utterances as in LibriSpeech, for made data."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np

# Quantiles of LibriSpeech's utterance lengths in seconds, roughly; their mean is 12.3 s.
QUANTILES = (0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
SECONDS = (1.3, 3.2, 5.0, 11.0, 13.9, 15.2, 16.0, 17.0)
LONGEST = SECONDS[-1]


def seconds_at(share: float | np.ndarray) -> np.ndarray:
    """Seconds that this share of the utterances is below; for a uniform draw from 0 to 1, a drawn length."""
    return np.asarray(np.interp(share, QUANTILES, SECONDS))
