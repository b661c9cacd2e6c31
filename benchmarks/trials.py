"""Ideas tried in one process before anybody builds them, on jobs of the suite that choose.

    python -m benchmarks.trials --job builtin --method rolora+dtype=fp32+beta2=0.95
    python -m benchmarks.trials --texts DIR --job reviews-d.3-tenth-6 --rates 0.003,0.01 --seeds 2
    python -m benchmarks.trials --table

Adds to results/trials.json. Seeds are those that choose rates (1000, 1001, …), quality is on
held-out rows. A run that is there is not repeated.

Trials that changed the engine from outside were in this file while they ran. What won became an
option, what lost is in its history, and the table names it: head-in-A and head-in-B
(the head trains and travels in every second round), first-A-forgotten (A becomes its first change;
commit bb2562e), rows-and-columns and blocks (second moments that the server averages, FedAdamW,
arXiv 2510.27486; commit 3a9def9). svd-hand-over (048c801, with --balance in the method) became
--equal-factors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from benchmarks.suite import records
from benchmarks.suite.jobs import CHOOSE, chosen
from benchmarks.suite.running import HELD_OUT, Contender, Runner
from rolora import variants
from rolora.errors import BadInput

RESULTS = Path(__file__).parent / "results" / "trials.json"
_FIRST_SEED = 1000

_TRIAL = "none"  # that the engine is changed from outside


def run(runner: Runner, name: str, method: str, rate: float, seed: int) -> dict:
    """One run's record."""
    job = next((job for job in chosen(CHOOSE, name) if job.name == name), None)
    if job is None:
        names = ", ".join(job.name for job in chosen(CHOOSE, None))
        raise BadInput(f"--job {name}: expected one that chooses: {names}")
    who = Contender(method, "bf16")
    if job.split is None:
        made = runner._trained(runner.configuration(job, who, rate, seed, HELD_OUT))
    else:
        made = runner._two_layer_run(job, who, rate, seed, HELD_OUT)
    return {
        **{"trial": _TRIAL, "job": name, "method": method, "rate": rate, "seed": seed},
        **{"quality": made["curve"][-1][3], "loss": made["loss"], "mb_up": made["curve"][-1][1]},
        **records.stamp(),
    }


def read() -> list[dict]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []


def key(record: dict) -> tuple:
    return tuple(record[name] for name in ("job", "trial", "method", "rate", "seed"))


def table() -> None:
    """Means over seeds."""
    groups: dict[tuple, list[dict]] = {}
    for record in sorted(read(), key=key):
        groups.setdefault(key(record)[:-1], []).append(record)
    print("| job | trial | method | rate | quality, by seed | loss, by seed | MB up | date |")
    print("|---" * 8 + "|")
    for (job, trial, method, rate), found in groups.items():
        each = ", ".join(f"{record['quality']:.3f}" for record in found)
        mean = statistics.mean(record["quality"] for record in found)
        losses = ", ".join(f"{record['loss']:.3f}" for record in found)
        print(
            f"| {job} | {trial} | {method} | {rate:g} | {mean:.3f}: {each} | {losses} | "
            f"{found[0]['mb_up']:.2f} | {found[-1]['date']} |"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--job", default="builtin", help="the whole name of a job that chooses")
    add("--method", default="rolora")
    add("--rates", default="0.01", help="separated by commas")
    add("--seeds", type=int, default=2)
    add("--texts", type=Path, metavar="DIR", help="as for benchmarks.suite")
    add("--table", action="store_true", help="print what is recorded, and stop")
    asked = parser.parse_args(arguments)
    if asked.table:
        table()
        return 0
    runner = Runner(asked.texts)
    torch.set_num_threads(1)
    try:
        rates = variants.rates(asked.rates)
        for seed in range(_FIRST_SEED, _FIRST_SEED + asked.seeds):
            for rate in rates:
                wanted = (asked.job, _TRIAL, asked.method, rate, seed)
                if wanted in map(key, read()):
                    continue
                record = run(runner, asked.job, asked.method, rate, seed)
                RESULTS.write_text(json.dumps([*read(), record], indent=0) + "\n")
                print(*wanted, record["quality"], record["loss"], flush=True)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
