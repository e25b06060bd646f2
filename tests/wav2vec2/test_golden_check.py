"""The acceptance checks against numbers of the original implementations, through tests/golden_adapter.py."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import ROOT

# What may be left out: behaviour of the originals that is corrected here, and what a file or a run does not tell.
LEFT_OUT = re.compile(
    r"form of the original not offered"
    r"|train_state\s+no 'train_state' in the result"
    r"|after_giving_up\s+the trace ends where the scaler gives up"
)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["golden", "golden_nvidia"])
def test_the_toolkit_passes_the_acceptance_checks(shared, family):
    command = [sys.executable, str(shared("acceptance") / "golden_check.py"), "--strict", "--failures"]
    command += ["--adapter", str(ROOT / "tests/golden_adapter.py"), str(shared(family))]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    *lines, total = run.stdout.splitlines() or [""]
    bad = [line for line in lines if line.startswith("FAIL") or (line.startswith("SKIP") and not LEFT_OUT.search(line))]
    assert bad == [], "\n".join([*bad, total, run.stderr[-2000:]])
    assert re.match(r"[1-9]\d+ passed, 0 failed", total), run.stdout[-2000:] + run.stderr[-2000:]
    assert run.returncode == 0
