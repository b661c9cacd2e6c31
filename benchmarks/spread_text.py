"""Whether what `benchmarks.spread` found on digits holds for a Llama with AdamW: the built-in model
and text, 50 clients with an even split, 12 rounds, a random head that stays frozen.

    python -m benchmarks.spread_text             # writes results/spread_text.json
    python -m benchmarks.spread_text --smoke     # one round of each, written nowhere
    python -m benchmarks.spread_text table

Every method has the rates RATES to choose from, by one seed on 15 % of the training text. Runs that
are in the file are not repeated.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite import records

RESULTS = Path(__file__).parent / "results" / "spread_text.json"
PAPER = {"method": "rolora", "carry_moments": False}
WAYS: dict[str, dict[str, Any]] = {
    "rolora, moments start anew": PAPER,
    "fedavg": {"method": "fedavg"},
    "rolora, B at a quarter of A's rate": PAPER,
    "rolora+local-alternation": PAPER | {"local_alternation": True},
}
RATES = (0.01, 0.03)
SEEDS, TUNING_SEED = (0, 1, 2, 3), 1000
_JOB: dict[str, Any] = dict(
    clients=50, rounds=12, local_steps=6, batch_size=4, max_length=32, partition="iid"
)
_JOB |= dict(train_head=False, lr_schedule="constant", dtype="fp32", device="cpu", threads=1)


def measured(way: str, rate: float, seed: int, on: str, rounds: int) -> list[float]:
    """The accuracy after six rounds and at the end, on the slice or on the held-out text."""
    from rolora import config
    from rolora.run.federation import build_server
    from rolora.run.job import prepare

    options = _JOB | WAYS[way] | dict(lr=rate, seed=seed, rounds=rounds, engine="batched")
    options["lr_b"] = rate / 4 if "quarter" in way else rate
    options["validation_fraction"] = 0.15 if on == "held" else 0.0
    options["eval_every"] = max(1, rounds // 2)
    rows: list[dict[str, Any]] = []
    build_server(prepare(config.resolve(options, preset="builtin")), on_round=rows.append).run()
    return [round(row["eval"]["accuracy"], 4) for row in rows if row["eval"]]


class Found:
    """The runs of the file, each made once."""

    def __init__(self, smoke: bool):
        self.smoke, self.stored = smoke, {"stamp": records.stamp(), "runs": []}
        if RESULTS.is_file() and not smoke:
            self.stored = json.loads(RESULTS.read_text(encoding="utf-8"))

    def run(self, way: str, rate: float, seed: int, on: str) -> list[float]:
        key = {"way": way, "rate": rate, "seed": seed, "on": on}
        for known in self.stored["runs"]:
            if key.items() <= known.items():
                return known["curve"]
        curve = measured(way, rate, seed, on, 1 if self.smoke else _JOB["rounds"])
        self.stored["runs"].append(key | {"curve": curve})
        print(key, curve, flush=True)
        if not self.smoke:
            lines = ",\n".join(json.dumps(run) for run in self.stored["runs"])
            head = json.dumps({"stamp": self.stored["stamp"]})[:-1]
            RESULTS.write_text(f'{head}, "runs": [\n{lines}\n]}}\n', encoding="utf-8")
        return curve


def measure(smoke: bool) -> None:
    torch.set_num_threads(1)
    found = Found(smoke)
    for way in WAYS:
        tried = {rate: found.run(way, rate, TUNING_SEED, "held")[-1] for rate in RATES}
        rate = max(tried, key=lambda rate: tried[rate])
        for seed in SEEDS[: 1 if smoke else None]:
            found.run(way, rate, seed, "test")


def table() -> None:
    """A line for each method that has all its seeds."""
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
    print("| method | rate | accuracy after 6 rounds | after 12 | lowest, highest | runs |")
    print("|---" * 6 + "|")
    for way in WAYS:
        found = [run for run in runs if (run["way"], run["on"]) == (way, "test")]
        if len(found) < 2:
            continue
        half, end = ([run["curve"][point] for run in found] for point in (-2, -1))
        shown = " | ".join(
            f"{statistics.mean(part):.3f} ± {statistics.stdev(part):.3f}" for part in (half, end)
        )
        print(
            f"| {way} | {found[0]['rate']:g} | {shown} | {min(end):.3f}, {max(end):.3f} | "
            f"{len(found)} |"
        )


def main() -> None:
    if sys.argv[1:] == ["table"]:
        return table()
    if sys.argv[1:] not in ([], ["--smoke"]):
        sys.exit(__doc__)
    measure("--smoke" in sys.argv)


if __name__ == "__main__":
    main()
