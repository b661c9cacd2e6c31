"""What a busy neighbour costs: seconds of the built-in job while OpenMP's threads spin or sleep.

    python -m benchmarks.waiting

Runs `rolora train` for a few rounds, spinning (libgomp's default) and sleeping (what the commands
set) in turn, on the machine as it is and beside one process that keeps a core busy. Writes
benchmarks/results/waiting.json: medians, and their ratios.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import psutil
import torch

RESULT = Path(__file__).parent / "results" / "waiting.json"
# 300,000 is libgomp's own count where nothing is set, which the commands do not leave so.
WAYS = {"spinning": {"GOMP_SPINCOUNT": "300000"}, "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"}}
_ROUNDS, _REPETITIONS, _PATIENCE = 3, 3, 120


def busy() -> None:
    while True:
        pass


def seconds(way: str, folder: Path) -> float:
    """Of one run, starting included; the patience where it did not end by then."""
    set_by_others = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in set_by_others}
    environment |= WAYS[way]
    command = [sys.executable, "-m", "rolora.train", "--rounds", str(_ROUNDS), "--quiet"]
    command += ["--engine", "sequential", "--output-dir", str(folder)]
    start = time.monotonic()
    try:
        subprocess.run(
            command, check=True, env=environment, timeout=_PATIENCE, stdout=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return float(_PATIENCE)
    return time.monotonic() - start


def main() -> None:
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        seconds("sleeping", Path(folder) / "warm")
        for neighbour in ("idle", "one core busy"):
            process = multiprocessing.Process(target=busy, daemon=True)
            if neighbour != "idle":
                process.start()
            own = found[neighbour] = {way: [] for way in WAYS}
            for number in range(_REPETITIONS):
                for way in WAYS:
                    place = Path(folder) / f"{neighbour}-{way}-{number}"
                    own[way].append(round(seconds(way, place), 1))
                    print(neighbour, way, own[way][-1], flush=True)
            if neighbour != "idle":
                process.kill()
    medians = {k: {w: statistics.median(v) for w, v in own.items()} for k, own in found.items()}
    idle, taken = medians["idle"], medians["one core busy"]
    result = {
        "date": date.today().isoformat(),
        "machine": {"cpu": cpu(), "cores": psutil.cpu_count(logical=False)},
        "torch": torch.__version__,
        "rounds": _ROUNDS,
        "patience": _PATIENCE,
        "seconds": found,
        "sleeping / spinning, idle": round(idle["sleeping"] / idle["spinning"], 3),
        "busy / idle, sleeping": round(taken["sleeping"] / idle["sleeping"], 2),
        "busy / idle, spinning": round(taken["spinning"] / idle["spinning"], 2),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def cpu() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
