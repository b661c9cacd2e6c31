"""The study on one machine: which rule, which variant, on the digits and on the built-in job; what the tables of STUDY.md are made of.

    python -m rolora.experiments.toy --split 10x1 --methods … --output-dir benchmarks/results/toy
    python -m rolora.compare --methods … --rates … --seeds 5 --output-dir DIR          # of the built-in job
    python -m benchmarks.study collect DIR        # DIR's runs → benchmarks/results/builtin.json, and the picture
    python -m benchmarks.study table              # both, as Markdown

The commands of the committed results, methods and rates in full, are in benchmarks/results/STUDY.md.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
BUILTIN, TOY, PICTURE = RESULTS / "builtin.json", RESULTS / "toy" / "toy.json", RESULTS / "builtin.png"
_DRAWN = ("rolora", "rolora+balance", "fedavg", "ffa", "flexlora", "flora", "fedex")


def collect(folder: Path) -> None:
    """Every finished run of a comparison, in one file."""
    from rolora import plots, report

    found, drawn = [], defaultdict(list)
    for place in sorted(folder.glob("runs/*")) + sorted(folder.glob("tuning/*")):
        if not (place / "summary.json").is_file():
            continue
        run, named = report.read(place), re.fullmatch(r"(.+)-lr([^-]+(?:-\d+)?)-seed(\d+)(?:-x(\d+))?", place.name)
        name, lr, seed, times = named.groups()
        found.append({
            "method": name, "lr": float(lr), "seed": int(seed), "on": "validation" if place.parent.name == "tuning" else "held-out",
            "rounds": run.rows[-1]["round"], "diverged": run.diverged, "accuracy": round(run.final, 4),
            "curve": {row["round"]: round(row["eval"]["accuracy"], 4) for row in run.rows if row["eval"]},
            "bytes_up": sum(row["bytes_up"] for row in run.rows), "bytes_down": sum(row["bytes_down"] for row in run.rows)})
        if name in _DRAWN and times is None and place.parent.name == "runs":
            drawn[name].append(run.rows)
    BUILTIN.write_text("[" + ",\n".join(json.dumps(row) for row in found) + "]\n")
    plots.draw_together({name: drawn[name] for name in _DRAWN if name in drawn}, "accuracy", PICTURE)
    print(f"{len(found)} runs in {BUILTIN}")


def table() -> None:
    rows = json.loads(BUILTIN.read_text())
    groups = defaultdict(list)
    for row in rows:
        if row["on"] == "held-out":
            groups[row["rounds"], row["method"], row["lr"]].append(row)
    print("Built-in job\n\n| method | lr | rounds | accuracy, mean ± std | round 8 | MB up | MB down | runs |")
    print("|---|---|---|---|---|---|---|---|")
    for (rounds, method, lr), runs in sorted(groups.items(), key=lambda item: (item[0][0], -_mean(item[1]))):
        early = statistics.mean(run["curve"]["8"] for run in runs)
        up, down = (statistics.mean(run[way] for run in runs) / 1e6 for way in ("bytes_up", "bytes_down"))
        print(f"| {method} | {lr:g} | {rounds} | {_mean(runs):.3f} ± {_std(runs):.3f} | {early:.3f} | {up:.2f} | {down:.2f} | {len(runs)} |")
    print("\nDigits\n\n| split, rank | method | rate | round 30 | round 50 | round 100 | kB up, down a client |\n|---|---|---|---|---|---|---|")
    toy = defaultdict(lambda: defaultdict(list))
    for row in json.loads(TOY.read_text()):
        toy[row["split"], row["rank"], row["method"]][row["on"], row["rate"]].append(row)
    for (split, rank, method), runs in toy.items():
        scores = {rate: statistics.mean(row["score"] for row in found) for (on, rate), found in runs.items() if on == "held" and len(found) > 1}
        if not scores or ("test", max(scores, key=scores.get)) not in runs:
            continue
        rate = max(scores, key=scores.get)
        final = runs["test", rate]
        at = [[row["accuracy"][n - 1] for row in final] for n in (30, 50, 100)]
        shown = " | ".join(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" for values in at)
        edge = "*" if rate in (min(scores), max(scores)) else ""
        print(f"| {split}, {rank} | {method} | {rate:g}{edge} | {shown} | {sum(final[0]['bytes_up']) / 1e3:,.0f}, "
              f"{sum(final[0]['bytes_down']) / 1e3:,.0f} |")


def _mean(runs: list[dict]) -> float:
    return statistics.mean(run["accuracy"] for run in runs)


def _std(runs: list[dict]) -> float:
    return statistics.stdev(run["accuracy"] for run in runs) if len(runs) > 1 else 0.0


if __name__ == "__main__":
    if sys.argv[1:2] == ["collect"] and len(sys.argv) == 3:
        collect(Path(sys.argv[2]))
    elif sys.argv[1:] == ["table"]:
        table()
    else:
        sys.exit(__doc__)
