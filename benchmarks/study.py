"""The study on one machine: which rule, which variant, on the digits and on the built-in job; what
the tables of results/study/methods.md are made of.

    python -m rolora.experiments.toy --split 10x1 --methods … --output-dir benchmarks/results/toy
    # of the built-in job
    python -m rolora.compare --methods … --rates … --seeds 5 --output-dir DIR
    # DIR's runs → benchmarks/results/builtin.json, and the picture
    python -m benchmarks.study collect DIR
    python -m benchmarks.study table              # both, as Markdown

The commands of the committed results, methods and rates in full, are in
benchmarks/results/study/methods.md.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
BUILTIN, TOY, PICTURE = (
    RESULTS / "builtin.json",
    RESULTS / "toy" / "toy.json",
    RESULTS / "builtin.png",
)
_DRAWN = ("rolora", "rolora+carry-moments=false", "fedavg", "ffa", "flexlora", "flora", "fedex")


def collect(folder: Path) -> None:
    """Every finished run of a comparison joins those of other comparisons; the picture is drawn
    where all of its methods are there.
    """
    from rolora import report
    from rolora.run import plots

    found, drawn = [], defaultdict(list)
    for place in sorted(folder.glob("runs/*")) + sorted(folder.glob("tuning/*")):
        if not (place / "summary.json").is_file():
            continue
        run, named = (
            report.read(place),
            re.fullmatch(r"(.+)-lr([^-]+(?:-\d+)?)-seed(\d+)(?:-x(\d+))?", place.name),
        )
        name, lr, seed, times = named.groups()
        found.append(
            {
                "method": name,
                "lr": float(lr),
                "seed": int(seed),
                "on": "validation" if place.parent.name == "tuning" else "held-out",
                "rounds": run.rows[-1]["round"],
                "diverged": run.diverged,
                "accuracy": round(run.final, 4),
                "curve": {
                    row["round"]: round(row["eval"]["accuracy"], 4)
                    for row in run.rows
                    if row["eval"]
                },
                "bytes_up": sum(row["bytes_up"] for row in run.rows),
                "bytes_down": sum(row["bytes_down"] for row in run.rows),
            }
        )
        if name in _DRAWN and times is None and place.parent.name == "runs":
            drawn[name].append(run.rows)
    key = ("method", "lr", "seed", "on", "rounds")
    new = {tuple(row[k] for k in key) for row in found}
    kept = (
        [row for row in json.loads(BUILTIN.read_text()) if tuple(row[k] for k in key) not in new]
        if BUILTIN.exists()
        else []
    )
    rows = sorted(kept + found, key=lambda row: tuple(str(row[k]) for k in key))
    BUILTIN.write_text("[" + ",\n".join(json.dumps(row) for row in rows) + "]\n")
    if set(_DRAWN) <= set(drawn):
        plots.draw_together({name: drawn[name] for name in _DRAWN}, "accuracy", PICTURE)
    print(f"{len(found)} runs of {folder}, {len(rows)} in {BUILTIN}")


def held_out() -> dict[tuple[int, str, float], list[dict]]:
    """(rounds, method, rate) → runs on held-out text, best first."""
    groups = defaultdict(list)
    for row in json.loads(BUILTIN.read_text()):
        if row["on"] == "held-out":
            groups[row["rounds"], row["method"], row["lr"]].append(row)
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], -_mean(item[1]))))


def digits() -> dict[tuple[str, int, str], tuple[str, list[dict]]]:
    """(split, rank, method) → (its best rate, `*` where that is the edge of the grid, runs of it on
    test digits).
    """
    toy = defaultdict(lambda: defaultdict(list))
    for row in json.loads(TOY.read_text()):
        toy[row["split"], row["rank"], row["method"]][row["on"], row["rate"]].append(row)
    found = {}
    for key, runs in toy.items():
        scores = {
            rate: statistics.mean(row["score"] for row in rows)
            for (on, rate), rows in runs.items()
            if on == "held" and len(rows) > 1
        }
        if scores and ("test", rate := max(scores, key=scores.get)) in runs:
            found[key] = (
                f"{rate:g}" + ("*" if rate in (min(scores), max(scores)) else ""),
                runs["test", rate],
            )
    return found


def table() -> None:
    print("Built-in job\n")
    builtin()
    print(
        "\nDigits\n\n| split, rank | method | rate | round 30 | round 50 | round 100 | kB up, down "
        "a client |\n|---|---|---|---|---|---|---|"
    )
    for (split, rank, method), (rate, final) in digits().items():
        at = [[row["accuracy"][n - 1] for row in final] for n in (30, 50, 100)]
        shown = " | ".join(
            f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" for values in at
        )
        print(
            f"| {split}, {rank} | {method} | {rate} | {shown} | "
            f"{sum(final[0]['bytes_up']) / 1e3:,.0f}, "
            f"{sum(final[0]['bytes_down']) / 1e3:,.0f} |"
        )


def builtin(methods: Sequence[str] | None = None, only: int | None = None) -> None:
    """The built-in job's runs; of `methods` only, and of `only` so many rounds, where given."""
    print(
        "| method | lr | rounds | accuracy, mean ± std | round 8 | MB up | MB down | runs "
        "|\n|---|---|---|---|---|---|---|---|"
    )
    for (rounds, method, lr), runs in held_out().items():
        if methods is not None and method not in methods:
            continue
        if only is not None and rounds != only:
            continue
        early = (
            f"{statistics.mean(run['curve']['8'] for run in runs):.3f}"
            if all("8" in run["curve"] for run in runs)
            else "–"
        )
        up, down = (
            statistics.mean(run[way] for run in runs) / 1e6 for way in ("bytes_up", "bytes_down")
        )
        name = {"ffa+alpha=1e-9": "the head alone (`ffa+alpha=1e-9`)"}.get(method, method)
        print(
            f"| {name} | {lr:g} | {rounds} | {_mean(runs):.3f} ± {_std(runs):.3f} | {early} | "
            f"{up:.2f} | {down:.2f} | {len(runs)} |"
        )


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
