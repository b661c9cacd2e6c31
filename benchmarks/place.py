"""Puts what was measured into the texts: every table and figure of README.md and of the texts
beside the results.

    python -m benchmarks.place            # rewrites them from benchmarks/results/*.json
    python -m benchmarks.place --check    # exits with 1 and says which are stale

A table stands between `<!-- table NAME -->` and `<!-- end -->`, a figure within a sentence between
`<!--= NAME -->` and `<!--/-->`; NAME is one of TABLES or of `figures()`.
"""

from __future__ import annotations

import io
import json
import re
import statistics
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from benchmarks import (
    bad_clients,
    cohort,
    exchange_study,
    flower_wait,
    flowertune,
    masked,
    packing,
    private_front,
    roofline,
    spread,
    spread_text,
    stragglers,
    study,
    summary,
    traffic,
    trials,
)
from benchmarks.gpu import figures as gpu
from benchmarks.models import operations, quantised, results, speed
from benchmarks.suite import goals
from benchmarks.suite import tables as suite

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TEXTS = (
    ROOT / "README.md",
    RESULTS / "README.md",
    RESULTS / "STUDY.md",
    *sorted((RESULTS / "study").glob("*.md")),
    ROOT / "docs" / "results.md",
    *sorted((ROOT / "docs" / "guides").glob("*.md")),
)
METHODS = (
    "rolora",
    "rolora+equal-factors=false",
    "rolora+carry-moments=false",
    "fedavg",
    "fedavg+carry-moments",
    "flexlora",
    "fedex",
    "fedex+carry-moments",
    "lora-a2",
    "lora-a2+carry-moments",
    "flora",
    "ffa",
    "ffa+carry-moments",
    "fedsvd",
    "ffa+alpha=1e-9",
)
FRONT = (
    "rolora",
    "rolora+equal-factors=false",
    "rolora+carry-moments=false",
    "fedavg",
    "fedavg+carry-moments",
    "ffa",
)
TABLES: dict[str, Callable[[], None]] = {
    "front": lambda: study.builtin(FRONT, only=20),
    "builtin": lambda: study.builtin(METHODS),
    "study": study.builtin,
    "clients": bad_clients.table,
    "exchange": exchange_study.table,
    "cohort": cohort.table,
    "layers": lambda: summary.table(RESULTS / "cpu.json"),
    "layers_merged": lambda: summary.table(RESULTS / "cpu_merged.json"),
    "layers_dropout": lambda: summary.dropout(RESULTS / "cpu_dropout.json"),
    "federation": lambda: summary.table(RESULTS / "federation.json"),
    "models": speed.table,
    "matmuls": operations.matmul_table,
    "attention": operations.attention_table,
    "quantised": quantised.table,
    "packing": packing.table,
    "traffic": traffic.table,
    "gpu": gpu.table,
    "stragglers": stragglers.table,
    "spread": spread.table,
    "spread_text": spread_text.table,
    "trials": trials.table,
    "roofline": roofline.table,
    "roofline_gpus": roofline.sweep,
    "flower_wait": flower_wait.table,
    "masked": masked.table,
    "flowertune": flowertune.table,
    "private_front": private_front.front,
    "private_differences": private_front.differences,
    "suite_jobs": suite.jobs,
    "suite_results": suite.results,
    "suite_goals": goals.table,
    "suite_summary": suite.summary,
}


def printed(table: Callable[[], None]) -> str:
    """The rows of what a table prints."""
    with redirect_stdout(io.StringIO()) as text:
        table()
    return "\n".join(line for line in text.getvalue().splitlines() if line.startswith("|"))


def figures() -> dict[str, str]:
    """Every figure that a sentence may hold."""
    found: dict[str, str] = {}
    runs = study.held_out()
    accuracy = {
        (method, rounds): statistics.mean(r["accuracy"] for r in rows)
        for (rounds, method, _), rows in runs.items()
    }
    sent = {
        (method, rounds): statistics.mean(r["bytes_up"] for r in rows)
        for (rounds, method, _), rows in runs.items()
    }
    for (method, rounds), value in accuracy.items():
        found[f"builtin {method} {rounds}"] = _fraction(value, 3)
    for rounds in (20, 60):
        ours, anew = (accuracy[f"rolora{own}", rounds] for own in ("", "+carry-moments=false"))
        found[f"points over the paper's {rounds}"] = f"{100 * (ours - anew):.0f}"
        found[f"builtin equal factors {rounds}"] = _by_seed(
            *(runs[rounds, f"rolora{own}", 0.02] for own in ("", "+equal-factors=false"))
        )
        found[f"points of fedavg carrying {rounds}"] = (
            f"{100 * (accuracy['fedavg+carry-moments', rounds] - accuracy['rolora', rounds]):.0f}"
        )
    found["points of fedex carrying 20"] = (
        f"{100 * (accuracy['fedex+carry-moments', 20] - accuracy['rolora', 20]):.0f}"
    )
    found["points over lora-a2 carrying 20"] = (
        f"{100 * (accuracy['rolora', 20] - accuracy['lora-a2+carry-moments', 20]):.0f}"
    )
    found["bytes fedavg / rolora"] = f"{sent['fedavg', 20] / sent['rolora', 20]:.1f}"
    found["bytes rolora / fedavg"] = _fraction(sent["rolora", 20] / sent["fedavg", 20], 2)
    digits = study.digits()
    ends = {}
    for (split, rank, method), (_, rows) in digits.items():
        ends[split, rank, method] = statistics.mean(row["accuracy"][99] for row in rows)
        found[f"digits {split} {rank} {method}"] = _fraction(ends[split, rank, method], 3)
    theirs, ours = (digits["10x1", 8, name][1] for name in ("fedavg", "rolora"))
    budget = statistics.mean(sum(row["bytes_up"]) for row in ours)
    found["digits bytes fedavg / rolora"] = (
        f"{statistics.mean(sum(row['bytes_up']) for row in theirs) / budget:.1f}"
    )
    found["digits fedavg at rolora's bytes"] = _fraction(
        statistics.mean(_within(row, budget) for row in theirs), 3
    )
    layer = [
        row
        for row in json.loads((RESULTS / "cpu.json").read_text())["benchmarks"]
        if row["group"].startswith("layer") and row["params"]["contender"] == "ours"
    ]
    over = [row["extra_info"]["ratio_to_frozen"] for row in layer]
    found["layer least, most over frozen"] = (
        f"{100 * min(over) - 100:.0f} to {100 * max(over) - 100:.0f} %"
    )
    for dtype in ("fp32", "bf16"):
        over = [
            row["extra_info"]["ratio_to_peft_phase"]
            for row in layer
            if row["params"]["dtype"] == dtype
        ]
        found[f"layer {dtype} over peft"] = (
            f"{_fraction(min(over), 2)} to {_fraction(max(over), 2)}"
        )
    whole = results.rows("speed")
    for shape in ("Llama", "RoBERTa"):
        for dtype in ("float32", "bfloat16"):
            ratios = [
                row["peft_over_ours_phase"]
                for row in whole
                if row["model"].startswith(shape) and row["dtype"] == dtype
            ]
            found[f"models {shape} {dtype}"] = f"{min(ratios):.2f} to {max(ratios):.2f} ×"
    packed = {
        row["params"]["contender"]: row
        for row in json.loads((RESULTS / "federation.json").read_text())["benchmarks"]
        if row["group"].startswith("packing")
    }["fp32_copy"]["extra_info"]
    for name in ("pack_fp32", "pack_bf16", "pack_fp16", "pack_int8", "unpack_fp32"):
        found[name] = _fraction(packed[f"ratio_to_{name}"], 2)
    for name in ("fp32", "bf16", "int8"):
        found[f"factors alone {name}"] = _fraction(exchange_study.factors_alone(name), 3)
    return found | roofline.figures() | private_front.figures() | suite.figures()


def placed(text: str) -> str:
    """`text` with every table and figure as the results have it.

    Raises KeyError for a name that there is not.
    """
    known = figures()
    text = re.sub(
        r"(<!-- table (\w+) -->\n).*?(\n<!-- end -->)",
        lambda m: f"{m[1]}\n{printed(TABLES[m[2]])}\n{m[3]}",
        text,
        flags=re.S,
    )
    return re.sub(r"(<!--= (.+?) -->).*?(<!--/-->)", lambda m: m[1] + known[m[2]] + m[3], text)


def _fraction(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".removeprefix("0") if 0 <= value < 1 else f"{value:.{digits}f}"


def _by_seed(mine: list[dict], theirs: list[dict]) -> str:
    """The mean difference of accuracies by seed, and its standard error."""
    other = {run["seed"]: run["accuracy"] for run in theirs}
    gaps = [run["accuracy"] - other[run["seed"]] for run in mine]
    return f"{statistics.fmean(gaps):+.3f} ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.3f}"


def _within(row: dict, budget: float) -> float:
    """The accuracy of a run at the last round that its bytes up allow."""
    sent, last = 0.0, row["accuracy"][0]
    for bytes_up, accuracy in zip(row["bytes_up"], row["accuracy"], strict=True):
        sent += bytes_up
        if sent > budget:
            break
        last = accuracy
    return last


def main() -> None:
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    stale = []
    for path in TEXTS:
        before = path.read_text(encoding="utf-8")
        after = placed(before)
        if after != before:
            stale.append(str(path.relative_to(ROOT)))
            if not sys.argv[1:]:
                path.write_text(after, encoding="utf-8")
    if stale:
        print(
            ("stale, run `python -m benchmarks.place`: " if sys.argv[1:] else "rewritten: ")
            + ", ".join(stale)
        )
    sys.exit(1 if stale and sys.argv[1:] else 0)


if __name__ == "__main__":
    main()
