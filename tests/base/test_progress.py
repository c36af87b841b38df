"""Progress: a bar with ETA in a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

LOOP = """
import time
from shodh_moe.base.progress import progress
for _ in progress(range(3), 'working', 3): time.sleep(0.15)
"""


def test_a_terminal_gets_a_bar_with_an_eta_even_without_a_width():
    terminal_end, process_end = pty.openpty()  # a new pseudo-terminal has 0 columns
    process = subprocess.Popen([sys.executable, "-c", LOOP], stderr=process_end, env={**os.environ, "COLUMNS": "0"})
    os.close(process_end)
    shown = b""
    try:
        while block := os.read(terminal_end, 4096):
            shown += block
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    assert b"working" in shown
    assert b"3/3" in shown
    assert b"it/s" in shown
    assert b"\r" in shown


def test_a_log_file_gets_plain_lines():
    done = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, check=True)
    assert done.stderr == "working: 3/3 in 0:00\n"
