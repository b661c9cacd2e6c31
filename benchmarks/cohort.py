"""Clients trained one after another and together: clients and tokens a second, and memory, against
the number of clients.

    python -m benchmarks.cohort [run | table | figure]

Two models: the built-in one (batch 4 × up to 48 tokens), and one of RoBERTa-base's shape with
random weights (batch 4 × 32, rank 8, query and value, no text behind it). One optimizer step a
client; engines in rotation in one process, medians of pairs. Memory is the resident peak of a
process of its own that takes one such step. Results: benchmarks/results/cohort.json; `figure` draws
them.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "cohort.json"
COUNTS = (1, 4, 16, 50)
MODELS = ("built-in", "RoBERTa-base-shaped")


def trainer(name: str):
    """(local trainer, heads) of a model with 50 clients."""
    if name == "built-in":
        from rolora import config
        from rolora.run import job

        flags = {
            "clients": 50,
            "batch_size": 4,
            "local_steps": 1,
            "partition": "iid",
            "engine": "sequential",
        }
        made = job.prepare(config.resolve(flags, preset="builtin"))
        return made.trainer(), made.report.heads
    return shaped({}, 4, 32, "cpu")


def shaped(size: dict, batch: int, length: int, device: str):
    """The same for a RoBERTa of random weights; `size` is what its configuration differs in from
    RoBERTa-base's.
    """
    import numpy as np
    import torch
    import transformers

    from rolora import LoRAConfig, attach
    from rolora.adapter.frozen import speed_up
    from rolora.federated.client import LocalTrainer
    from rolora.federated.layout import Layout
    from rolora.federated.local import LocalConfig
    from rolora.recipes.classification import Classification, Labelled

    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(num_labels=2, max_position_embeddings=514, **size)
    ).to(device, dtype)
    report = attach(model, LoRAConfig(rank=8, alpha=16, target_modules=["query", "value"]))
    speed_up(model)
    rng = np.random.default_rng(0)
    examples = [
        Labelled([0, *rng.integers(3, 50_000, length - 2).tolist(), 2], int(rng.integers(2)))
        for _ in range(50 * batch)
    ]

    class Tokenizer:
        pad_token_id = 1

    recipe = Classification(Tokenizer(), ["a", "b"], length, "text", "label", device=device)
    local = LocalConfig(1, None, batch, 1, "adamw", 0.0, 1.0, 0)
    clients = np.arange(50 * batch).reshape(50, batch)
    return LocalTrainer(
        model, Layout.of(model, report.heads), recipe, examples, clients, local
    ), report.heads


def engines(made, count: int):
    """({"sequential", "batched"}: calls that train so many clients for a step of phase B, the
    tokens they process, bytes of the weights).
    """
    from rolora.cohort.batched import Batched
    from rolora.cohort.sequential import Sequential
    from rolora.federated.layout import fingerprint
    from rolora.federated.wire import Task

    local, heads = made
    published = local.layout.gather(local.model, tuple(local.layout.sizes))
    prints = {kind: fingerprint(flat) for kind, flat in published.items()}
    orders = [
        (Task("b", 1, "B", c, local.layout.hash, {}, prints, "bf16", 1e-2, {}, {}), published, {})
        for c in range(count)
    ]
    calls = {
        "sequential": lambda: list(Sequential(local).train(orders)),
        "batched": lambda: list(Batched(local, heads, count).train(orders)),
    }
    return (
        calls,
        lambda: sum(update.tokens for _, update, _ in calls["batched"]()),
        sum(p.numel() * p.element_size() for p in local.model.parameters()),
    )


def _pairs(name: str, count: int) -> int:
    """Fewer where a round takes long."""
    if name == "built-in":
        return 7
    return 3 if count < 50 else 1


def run() -> None:
    import torch

    from benchmarks.interleave import interleaved, ratio

    rows = []
    for name in MODELS:
        for count in COUNTS:
            calls, tokens, weights = engines(trainer(name), count)
            times = interleaved(calls, _pairs(name, count))
            row = {
                "model": name,
                "clients": count,
                "speedup": ratio(times, "sequential", "batched"),
                "tokens": tokens(),
                "weights_bytes": weights,
                "machine": platform.machine(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
            for engine, samples in times.items():
                row[f"{engine}_seconds"] = statistics.median(samples)
                peak = subprocess.run(
                    [sys.executable, "-m", "benchmarks.cohort", "peak", name, str(count), engine],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
                row[f"{engine}_peak_bytes"] = int(peak.splitlines()[-1])
            rows.append(row)
            print({k: v for k, v in row.items() if k not in ("machine", "torch")}, flush=True)
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def peak(name: str, count: str, engine: str) -> None:
    engines(trainer(name), int(count))[0][engine]()
    status = Path(
        "/proc/self/status"
    ).read_text()  # not getrusage, whose peak begins with the parent's
    print(1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]))


def table() -> None:
    print(
        "| model | clients | sequential: clients/s, tokens/s | together: clients/s, tokens/s | "
        "together / sequential | peak MB: sequential, "
        "together, a model copy each (computed) |\n|---|---|---|---|---|---|"
    )
    for row in json.loads(RESULTS.read_text()):

        def rate(engine, row=row):
            seconds = row[f"{engine}_seconds"]
            return f"{row['clients'] / seconds:.1f}, {row['tokens'] / seconds:,.0f}"

        copies = row["sequential_peak_bytes"] + (row["clients"] - 1) * row["weights_bytes"]
        print(
            f"| {row['model']} | {row['clients']} | {rate('sequential')} | {rate('batched')} | "
            f"{row['speedup']:.2f} × | "
            f"{row['sequential_peak_bytes'] / 1e6:,.0f}, {row['batched_peak_bytes'] / 1e6:,.0f}, "
            f"{copies / 1e6:,.0f} |"
        )


def figure() -> None:
    """Seconds of a step of all clients against their number: benchmarks/results/cohort.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = json.loads(RESULTS.read_text())
    drawn, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for place, name in zip(axes, MODELS, strict=True):
        own = [row for row in rows if row["model"] == name]
        for engine, label in (("sequential", "one after another"), ("batched", "together")):
            place.plot(
                [r["clients"] for r in own],
                [r[f"{engine}_seconds"] for r in own],
                marker="o",
                label=label,
            )
        place.set(
            title=name,
            xlabel="clients",
            ylabel="seconds of one step of all",
            xscale="log",
            yscale="log",
            xticks=COUNTS,
            xticklabels=COUNTS,
        )
        place.grid(alpha=0.3)
    axes[0].legend()
    drawn.savefig(RESULTS.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    {"run": run, "table": table, "figure": figure, "peak": peak}[
        sys.argv[1] if len(sys.argv) > 1 else "run"
    ](*sys.argv[2:])
