"""SIGSTOP, and the certainty that it has been obeyed: the kernel takes its time with processes of many threads."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

WAIT_S = 10.0


def stop(pid: int) -> None:
    """Stop a process; when this returns, none of its threads runs any more."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + WAIT_S
    while not all(_state(task) in "Tt" for task in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < deadline, f"process {pid} did not stop"
        time.sleep(0.001)


def _state(task: Path) -> str:
    """The letter behind the name, which stands in parentheses and may hold anything."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # this thread has ended
        return "T"
