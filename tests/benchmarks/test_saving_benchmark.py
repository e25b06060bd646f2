"""benchmarks/saving.py: what it times, and its file."""

from __future__ import annotations

import json
import time

from benchmarks import saving
from common import checkpoint


def test_a_slow_disk_is_seen_by_who_waits_for_it_only(monkeypatch, tmp_path):
    real = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, state: time.sleep(0.5) or real(path, state))
    out = tmp_path / "out.json"
    argv = ["--size", "tiny", "--seconds", "1", "--rounds", "2", "--folder", str(tmp_path / "disk"), "--json", str(out)]
    saving.main(argv)
    found = json.loads(out.read_text())
    assert found["seconds"]["waiting"]["median"] > 0.5
    assert found["seconds"]["beside"]["median"] < 0.4
    assert found["seconds"]["written"]["median"] > 0.5
    assert found["step"]["ratio"] > 0
    assert found["bytes"] > 3 * 4 * 1000
    assert list((tmp_path / "disk").iterdir()) == []
