"""The built-in job, studied: learning rates chosen on a validation slice, then 5 seeds on the held-out text.

    python -m benchmarks.builtin_study choose     # every method × rate on a validation slice of the training text
    python -m benchmarks.builtin_study final      # the chosen rates, 5 seeds, 1 × and 3 × the rounds, on the held-out text
    python -m benchmarks.builtin_study table | figure

Results go to benchmarks/results/builtin_study.json after every run, and runs that are there are not repeated.
`head` trains the classification head alone: the same rounds with factors that do not move (scaling too small to matter).
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "builtin_study.json"
METHODS = ("rolora", "ffa", "fedavg", "head")
RATES = (5e-3, 1e-2, 2e-2, 4e-2)
TUNING_SEEDS = (100,)
SEEDS = range(5)


def run(method: str, lr: float, seed: int, rounds: int, validate: bool) -> dict:
    """One run in this process; its final metrics and bytes."""
    import torch

    from rolora import config, job
    from rolora.federated.server import QuorumMissed
    from rolora.session import build_server

    start, rows = time.time(), []
    flags = dict(method="ffa" if method == "head" else method, lr=lr, seed=seed, rounds=rounds, eval_every=rounds,
                 validation_fraction=0.15 if validate else 0.0)
    if method == "head":
        flags["alpha"] = 1e-9
    server = build_server(job.prepare(config.resolve(flags, preset="builtin")), on_round=rows.append)
    try:
        server.run()
        accuracy, loss = rows[-1]["eval"]["accuracy"], rows[-1]["eval"]["loss"]
    except QuorumMissed as error:  # every client diverged
        accuracy, loss = 0.0, str(error)
    return {"method": method, "lr": lr, "seed": seed, "rounds": rounds, "on": "validation" if validate else "held-out",
            "accuracy": accuracy, "loss": loss, "bytes_up": sum(r["bytes_up"] for r in rows),
            "bytes_down": sum(r["bytes_down"] for r in rows), "seconds": time.time() - start, "torch": torch.__version__,
            "machine": platform.machine()}


def load() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def complete(results: list[dict], wanted: list[tuple]) -> dict[tuple, dict]:
    """The stored results of the wanted runs (method, lr, seed, rounds, validate), those that are missing run now."""
    def key(row):
        return row["method"], row["lr"], row["seed"], row["rounds"], row["on"] == "validation"

    done = {key(row): row for row in results}
    for wanted_key in wanted:
        if wanted_key not in done:
            row = done[wanted_key] = run(*wanted_key)
            results.append(row)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(sorted(results, key=lambda r: str(key(r))), indent=1) + "\n")
            print(f"{row['on']} {row['method']} lr {row['lr']} seed {row['seed']} rounds {row['rounds']}: {row['accuracy']:.4f} "
                  f"in {row['seconds']:.0f} s", flush=True)
    return {k: done[k] for k in wanted}


def base_rounds() -> int:
    from rolora.presets import PRESETS

    return PRESETS["builtin"]["rounds"]


def choose(results: list[dict]) -> dict[str, float]:
    """The rate with the best mean validation accuracy over seeds that the final runs do not use."""
    done = complete(results, [(m, lr, seed, base_rounds(), True) for m in METHODS for lr in RATES for seed in TUNING_SEEDS])
    best = {}
    for method in METHODS:
        means = {lr: statistics.mean(done[method, lr, seed, base_rounds(), True]["accuracy"] for seed in TUNING_SEEDS) for lr in RATES}
        best[method] = max(means, key=means.get)
        print(method, {lr: round(m, 4) for lr, m in means.items()}, "chosen", best[method], flush=True)
    return best


def final(results: list[dict]) -> None:
    chosen = choose(results)
    for factor in (1, 3):
        complete(results, [(m, chosen[m], seed, factor * base_rounds(), False) for seed in SEEDS for m in METHODS])


def table(results: list[dict]) -> None:
    print("| method | lr | rounds | accuracy, mean ± std over 5 seeds | MB up | MB down |\n|---|---|---|---|---|---|")
    held = [r for r in results if r["on"] == "held-out"]
    for rounds in sorted({r["rounds"] for r in held}):
        for method in METHODS:
            rows = [r for r in held if r["method"] == method and r["rounds"] == rounds]
            if rows:
                accuracy = [r["accuracy"] for r in rows]
                print(f"| {method} | {rows[0]['lr']:g} | {rounds} | {statistics.mean(accuracy):.3f} ± {statistics.stdev(accuracy):.3f} "
                      + ("| – | – |" if method == "head" else  # its still factors travelled, which says nothing
                         f"| {rows[0]['bytes_up'] / 1e6:.1f} | {rows[0]['bytes_down'] / 1e6:.1f} |"))


def figure(results: list[dict]) -> None:
    """Held-out accuracy, mean and spread over the seeds, at 1 × and 3 × the rounds: benchmarks/results/builtin_study.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    held = [r for r in results if r["on"] == "held-out"]
    lengths = sorted({r["rounds"] for r in held})
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for place, method in enumerate(METHODS):
        for shift, rounds in enumerate(lengths):
            accuracy = [r["accuracy"] for r in held if r["method"] == method and r["rounds"] == rounds]
            x = place + 0.36 * (shift - 0.5)
            axes.bar(x, statistics.mean(accuracy), 0.34, color=f"C{shift}", label=f"{rounds} rounds" if place == 0 else None, alpha=0.75)
            axes.scatter([x] * len(accuracy), accuracy, color="k", s=8, zorder=3)
    axes.set_xticks(range(len(METHODS)), ["RoLoRA", "FFA-LoRA", "FedAvg-LoRA\n(1.7 × the bytes)", "head only"])
    axes.set_ylabel("held-out accuracy")
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(RESULTS.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    {"choose": choose, "final": final, "table": table, "figure": figure}[sys.argv[1]](load())
