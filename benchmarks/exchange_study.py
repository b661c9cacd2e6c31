"""What the wire's dtype costs in accuracy: the built-in job by RoLoRA with fp32, bf16 and int8
wires, beside FedAvg-LoRA in fp32.

    python -m benchmarks.exchange_study [run | table]

Five seeds, the rates that the first study chose, 20 rounds, held-out text. Bytes are
whole messages in both directions, resynchronisations and headers included. Results go to
benchmarks/results/exchange_study.json after every run, and runs that are there are not repeated.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "exchange_study.json"
CASES = (
    ("rolora", "fp32", 2e-2),
    ("rolora", "bf16", 2e-2),
    ("rolora", "int8", 2e-2),
    ("fedavg", "fp32", 2e-2),
)
SEEDS = range(5)


def run(method: str, dtype: str, lr: float, seed: int) -> dict:
    import torch

    from rolora import config
    from rolora.run import job
    from rolora.run.federation import build_server

    start, rows = time.time(), []
    flags = dict(
        carry_moments=False,
        method=method,
        exchange_dtype=dtype,
        lr=lr,
        seed=seed,
        validation_fraction=0.0,
    )
    settled = config.resolve(flags, preset="builtin")
    server = build_server(
        job.prepare(settled.with_values(eval_every=settled.federation.rounds)), on_round=rows.append
    )
    server.run()
    return {
        "method": method,
        "dtype": dtype,
        "lr": lr,
        "seed": seed,
        "accuracy": rows[-1]["eval"]["accuracy"],
        "loss": rows[-1]["eval"]["loss"],
        "rejected": sum(sum(r["rejected"].values()) for r in rows),
        "bytes_up": sum(r["bytes_up"] for r in rows),
        "bytes_down": sum(r["bytes_down"] for r in rows),
        "values_a_round": [server.layout.travelling_size(p) for p in ("B", "A", "BOTH")],
        "rounds": settled.federation.rounds,
        "seconds": time.time() - start,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def load() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def study() -> None:
    results = load()
    done = {(r["method"], r["dtype"], r["seed"]) for r in results}
    for seed in SEEDS:
        for method, dtype, lr in CASES:
            if (method, dtype, seed) not in done:
                results.append(run(method, dtype, lr, seed))
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                row = results[-1]
                print(
                    f"{method} {dtype} seed {seed}: {row['accuracy']:.4f} in {row['seconds']:.0f} "
                    "s",
                    flush=True,
                )


def table() -> None:
    results = load()
    base = statistics.mean(
        r["bytes_up"] + r["bytes_down"]
        for r in results
        if (r["method"], r["dtype"]) == ("fedavg", "fp32")
    )
    reference = {
        r["seed"]: r["accuracy"] for r in results if (r["method"], r["dtype"]) == ("rolora", "fp32")
    }
    print(
        "| method | wire | accuracy, mean ± std of 5 seeds | difference from fp32, mean ± standard "
        "error | MB up | MB down | bytes / "
        "FedAvg fp32 |\n|---|---|---|---|---|---|---|"
    )
    for method, dtype, _ in CASES:
        rows = [r for r in results if (r["method"], r["dtype"]) == (method, dtype)]
        accuracy = [r["accuracy"] for r in rows]
        paired = [r["accuracy"] - reference[r["seed"]] for r in rows]
        up, down = (statistics.mean(r[k] for r in rows) / 1e6 for k in ("bytes_up", "bytes_down"))
        difference = (
            f"{statistics.mean(paired):+.4f} ± {statistics.stdev(paired) / len(paired) ** 0.5:.4f}"
        )
        print(
            f"| {method} | {dtype} | {statistics.mean(accuracy):.3f} ± "
            f"{statistics.stdev(accuracy):.3f} | "
            f"{difference if method == 'rolora' and dtype != 'fp32' else '–'} | {up:.2f} | "
            f"{down:.2f} | {(up + down) * 1e6 / base:.3f} |"
        )
    print(
        "\nFactors alone (no head travels, headers aside), bytes / FedAvg fp32: "
        + ", ".join(f"{dtype} {factors_alone(dtype):.3f}" for dtype in ("fp32", "bf16", "int8"))
    )


def factors_alone(dtype: str) -> float:
    """Bytes of one factor in `dtype` over FedAvg's two in fp32."""
    from rolora_kernels.codecs import CODECS

    values = 10**6
    return CODECS[dtype].bytes(values) / CODECS["fp32"].bytes(2 * values)


if __name__ == "__main__":
    table() if sys.argv[1:] == ["table"] else study()
