"""One run per folder."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

from common.errors import ConfigError
from common.lock import FolderLock

HOLD = """
import os, sys, time
from common.lock import FolderLock
lock = FolderLock(sys.argv[1])
if os.fork() == 0:  # as a data worker does, which outlives its parent for a while
    time.sleep(600)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder, with a child of its own."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def test_a_held_folder_is_refused_by_name_of_its_holder(holder, tmp_path):
    for patience in (0.0, 0.6):
        with pytest.raises(ConfigError, match=re.escape(f"process {holder.pid} on {socket.gethostname()}")):
            FolderLock(tmp_path, patience=patience)


def test_a_killed_holder_frees_it_though_its_children_live(holder, tmp_path):
    holder.kill()
    holder.wait()
    FolderLock(tmp_path).release()
    os.killpg(holder.pid, 0)  # its child is still there


def test_who_waits_gets_it(holder, tmp_path):
    threading.Timer(0.3, holder.kill).start()
    FolderLock(tmp_path, patience=60).release()


def test_a_released_folder_is_free_and_has_no_owner(tmp_path):
    FolderLock(tmp_path).release()
    assert (tmp_path / ".lock").read_text() == ""
    second = FolderLock(tmp_path)
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")
    second.release()
    second.release()
