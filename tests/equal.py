"""States of runs that must be equal in every bit."""

from __future__ import annotations

from typing import Any

import torch


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Bit for bit, in tensors, dicts and sequences of any depth."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, item in enumerate(expected):
            assert_same(found[index], item, f"{where}/{index}")
    else:
        assert found == expected, where
