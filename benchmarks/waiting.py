"""What a busy neighbour costs: seconds of the built-in job by how long OpenMP's threads spin before
they sleep.

    python -m benchmarks.waiting

Runs `rolora train` for a few rounds, each way in turn, on the machine as it is and beside one
process that keeps a core busy. Writes benchmarks/results/waiting.json: seconds of the whole command
and of its rounds alone, their medians, and ratios.
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
# 300,000 spins are libgomp's own count where nothing is set.
WAYS = {
    "spinning": {"GOMP_SPINCOUNT": "300000"},
    "spinning briefly": {"GOMP_SPINCOUNT": "1000"},
    "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"},
}
_ROUNDS, _PATIENCE = 3, 120
# The cost on an idle machine is small, so it takes more runs to see.
_REPETITIONS = {"idle": 9, "one core busy": 3}


def busy() -> None:
    while True:
        pass


def seconds(way: str, folder: Path) -> tuple[float, float]:
    """Of one run: starting included, and of its rounds alone; the patience where it did not end."""
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
        return float(_PATIENCE), float(_PATIENCE)
    whole = time.monotonic() - start
    rows = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return whole, sum(json.loads(row)["seconds"] for row in rows)


def main() -> None:
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        seconds("sleeping", Path(folder) / "warm")
        for neighbour in ("idle", "one core busy"):
            process = multiprocessing.Process(target=busy, daemon=True)
            if neighbour != "idle":
                process.start()
            own = found[neighbour] = {way: [] for way in WAYS}
            for number in range(_REPETITIONS[neighbour]):
                for way in WAYS:
                    place = Path(folder) / f"{neighbour}-{way}-{number}"
                    own[way].append(seconds(way, place))
                    print(neighbour, way, own[way][-1], flush=True)
            if neighbour != "idle":
                process.kill()
    result = {
        "date": date.today().isoformat(),
        "machine": {"cpu": cpu(), "cores": psutil.cpu_count(logical=False)},
        "torch": torch.__version__,
        "rounds": _ROUNDS,
        "patience": _PATIENCE,
        "whole command": summary(found, 0),
        "rounds alone": summary(found, 1),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def summary(found: dict[str, dict[str, list[tuple[float, float]]]], part: int) -> dict:
    """Medians of seconds, and ratios of them, of one part of what was timed.

    Idle, a way's ratio is the median over the repetitions, each beside its neighbour in time.
    """
    spinning = [times[part] for times in found["idle"]["spinning"]]
    idle, taken = (
        {way: statistics.median(times[part] for times in own[way]) for way in WAYS}
        for own in (found["idle"], found["one core busy"])
    )
    return {
        way: {
            "idle": round(idle[way], 2),
            "one core busy": round(taken[way], 2),
            "busy / idle": round(taken[way] / idle[way], 2),
            "idle / spinning idle": round(
                statistics.median(
                    times[part] / beside
                    for times, beside in zip(found["idle"][way], spinning, strict=True)
                ),
                3,
            ),
        }
        for way in WAYS
    }


def cpu() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
