"""Fixtures for all tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def console():
    """Programs that a test ran leave no handler that writes to the output captured for that test."""
    before = list(logging.getLogger().handlers)
    yield
    for handler in [handler for handler in logging.getLogger().handlers if handler not in before]:
        logging.getLogger().removeHandler(handler)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Path of reference data that a user's clone does not have; the test is skipped without it."""

    def find(name: str) -> Path:
        path = Path(os.environ.get("WAV2VEC2_SHARED", ROOT.parent / "shared")) / name
        if not path.exists():
            pytest.skip(f"reference data {name} is not here")
        return path

    return find
