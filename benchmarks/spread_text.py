"""Whether RoLoRA at twice the rate goes as fast as FedAvg on a Llama with AdamW too, as
`benchmarks.spread` finds on digits: 50 clients with an even split, 12 rounds, B zero at the start,
a random head that stays frozen, a rate that is small for so few rounds.

    python -m benchmarks.spread_text             # writes results/spread_text.json
    python -m benchmarks.spread_text --smoke     # one round of each, written nowhere
    python -m benchmarks.spread_text table

The built-in model and text; runs that are in the file are not repeated.
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
_RATE = 0.005
WAYS: dict[str, dict[str, Any]] = {
    "fedavg": {"method": "fedavg", "lr": _RATE},
    "rolora": {"method": "rolora", "lr": _RATE},
    "rolora, twice the rate": {"method": "rolora", "lr": 2 * _RATE},
}
SEEDS = (0,)
_ROUNDS = 12
_JOB: dict[str, Any] = dict(
    clients=50, local_steps=4, batch_size=4, max_length=32, partition="iid", carry_moments=False
)
_JOB |= dict(train_head=False, lr_schedule="constant", device="cpu", threads=1, engine="batched")
_JOB |= dict(exchange_dtype="bf16")


def measured(way: str, seed: int, rounds: int) -> dict[str, list[float]]:
    """The accuracy and the loss after every third round on 600 held-out examples."""
    from rolora import config
    from rolora.run.federation import build_server
    from rolora.run.job import prepare

    options = _JOB | WAYS[way] | dict(seed=seed, rounds=rounds, eval_max_examples=600, eval_every=3)
    rows: list[dict[str, Any]] = []
    build_server(prepare(config.resolve(options, preset="builtin")), on_round=rows.append).run()
    evaluated = [row["eval"] for row in rows if row["eval"]]
    return {name: [round(found[name], 4) for found in evaluated] for name in ("accuracy", "loss")}


def measure(smoke: bool) -> None:
    torch.set_num_threads(1)
    stored: dict[str, Any] = {"stamp": records.stamp(), "runs": []}
    if RESULTS.is_file() and not smoke:
        stored = json.loads(RESULTS.read_text(encoding="utf-8"))
    known = {(run["way"], run["seed"]) for run in stored["runs"]}
    for seed in SEEDS[: 1 if smoke else None]:
        for way in WAYS:
            if (way, seed) in known:
                continue
            made = measured(way, seed, 1 if smoke else _ROUNDS)
            stored["runs"].append({"way": way, "seed": seed} | made)
            print(stored["runs"][-1], flush=True)
            if not smoke:
                lines = ",\n".join(json.dumps(run) for run in stored["runs"])
                head = json.dumps({"stamp": stored["stamp"]})[:-1]
                RESULTS.write_text(f'{head}, "runs": [\n{lines}\n]}}\n', encoding="utf-8")


def table() -> None:
    """A line for each way."""
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
    print(
        "| method | rate | loss before | after 3 rounds | 6 | 9 | 12 | accuracy after 12 | runs |"
    )
    print("|---" * 9 + "|")
    for way, options in WAYS.items():
        found = [run for run in runs if run["way"] == way]
        if not found:
            continue
        losses = zip(*(run["loss"] for run in found), strict=True)
        shown = " | ".join(f"{statistics.mean(point):.3f}" for point in losses)
        ends = [run["accuracy"][-1] for run in found]
        spread = f" ± {statistics.stdev(ends):.3f}" if len(ends) > 1 else ""
        print(
            f"| {way} | {options['lr']:g} | {shown} | {statistics.mean(ends):.3f}{spread} | "
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
