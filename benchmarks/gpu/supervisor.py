"""Watches over the process that measures: one that hangs is ended, one that dies is replaced, and
the contender that it was at loses its row.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.results import NOW, Results

GRACE = 20.0  # seconds after the deadline in which a contest that has begun may end
START = 180.0  # seconds in which a process has to begin with its first unit
FINISHED, BAD_INPUT = 0, 2
WORKER = ("-m", "benchmarks.gpu.worker")  # what Python runs


@dataclass(frozen=True)
class End:
    """How a process ended: `code` None where it had to be killed."""

    code: int | None
    why: str


def supervise(
    folder: Path, minutes: float, arguments: list[str], worker: Sequence[str] = WORKER
) -> int:
    """Runs workers until all is measured or the time is over; the exit code, 0 where results can be
    read.
    """
    end = time.monotonic() + 60 * minutes
    (folder / NOW).unlink(missing_ok=True)
    while time.monotonic() < end:
        (folder / NOW).unlink(missing_ok=True)
        left = str(end - time.monotonic())
        command = [sys.executable, *worker, "--seconds", left, *arguments]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            ended = _watch(process, folder / NOW, end)
        finally:
            _kill(process)
        if ended.code in (FINISHED, BAD_INPUT):
            return ended.code
        now, results = _read(folder / NOW), Results.load(folder)
        if ended.why == "late":
            print("time is over: what was being measured is left for another run", flush=True)
            return 0 if results else 1
        if now is None or results is None:
            print(f"the measuring process never began: {ended.why}", file=sys.stderr)
            return 1
        why = now["problem"] or ended.why
        print(f"lost {now['unit']} {now['contender'] or ''}: {why}", flush=True)
        if now["unit"] not in results.done:
            given_up = now["contender"] in results.lost.get(now["unit"], {})
            results.lose(now["unit"], None if given_up else now["contender"], why)
    return 0


def end_with_parent() -> None:
    """A process whose parent is killed must not go on beside its successor (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _watch(worker: subprocess.Popen, path: Path, end: float) -> End:
    seen, since = None, time.monotonic()
    while True:
        try:
            code = worker.wait(0.1)
            return End(code, f"the process ended with {_named(code)}")
        except subprocess.TimeoutExpired:
            pass
        now = _read(path)
        if now != seen:
            seen, since = now, time.monotonic()
        limit = now["limit"] if now else START
        if time.monotonic() > end + GRACE:
            return End(None, "late")
        if time.monotonic() - since > limit:
            return End(None, f"nothing came for {limit:g} s")


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _named(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"


def _kill(worker: subprocess.Popen) -> None:
    """Ends a worker and whatever it started (compilers)."""
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    worker.wait()
