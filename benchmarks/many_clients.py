"""What thousands of clients and a million rows cost one process: memory, CPU time, disk.

    python -m benchmarks.many_clients NAME             # measures this checkout, as NAME
    python -m benchmarks.many_clients NAME --tree DIR  # another one, such as one of a commit before
    python -m benchmarks.many_clients NAME --only rows 100000
    python -m benchmarks.many_clients table

Two series of `rolora.train`, a process each, on two random blocks of width 64 with the built-in
tokenizer, rank 16. Clients: whole runs of 100, 1,000 and 10,000 clients, 50 rounds, 100 clients a
round, whose moments stay with them; always the same 40,000 rows. Rows: the plan (`--dry-run`) of
ten clients, split by label, of 10⁵ and 10⁶ rows of JSONL, which reads, encodes and splits all of
them. Recorded are the largest resident set and the CPU seconds of the process as the kernel counts
them, and the bytes of the checkpoints that are left. Results go to
benchmarks/results/many_clients.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np

from rolora import builtin

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "many_clients.json"
CLIENTS, ROWS = (100, 1_000, 10_000), (100_000, 1_000_000)
_COMMON = (
    "--batch-size 2 --local-steps 1 --rank 16 --alpha 16 --max-length 16 --lr 5e-3 --threads 1 "
    "--device cpu --engine batched --cohort-chunk 50 --eval-max-examples 16 --quiet "
    "--task-type classification"
).split()


def write_model(folder: Path) -> None:
    """A model so small that a client's training costs little beside what is measured."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    shutil.copytree(builtin.MODEL, folder, ignore=lambda _, names: {"model.safetensors"})
    config = hf.AutoConfig.from_pretrained(folder)
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2})
    config.update({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32})
    hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def write_rows(path: Path, count: int) -> None:
    """`count` rows of the built-in text, each begun at another word, a line each."""
    lines = (builtin.TEXT / "train.jsonl").read_text(encoding="utf-8").splitlines()
    known = [json.loads(line) for line in lines]
    words = [row["text"].split() for row in known]
    rng = np.random.default_rng(0)
    starts = rng.random(count)
    with open(path, "w", encoding="utf-8") as file:
        for which, share in zip(rng.integers(len(known), size=count), starts, strict=True):
            start = int(share * max(1, len(words[which]) - 8))
            text = " ".join(words[which][start : start + 12])
            file.write(json.dumps({"text": text, "label": known[which]["label"]}) + "\n")


def measured(tree: Path, flags: list[str], folder: Path) -> dict:
    """The cost of one run of the checkout in `tree`."""
    place = folder / "run"
    command = [sys.executable, "-m", "rolora.train", *_COMMON, *flags, "--output-dir", str(place)]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, cwd=tree, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    files = [path for path in (place / "checkpoints").rglob("*") if path.is_file()]
    left = sum(path.stat().st_size for path in files)
    shutil.rmtree(place, ignore_errors=True)  # a plan makes none
    return {
        "peak_bytes": usage.ru_maxrss * 1024,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "checkpoint_bytes": left,
    }


def measure(tree: Path, model: Path, series: str, count: int) -> dict:
    """One point of a series."""
    if series == "clients":
        rows = 4 * max(CLIENTS)
        flags = f"--clients {count} --clients-per-round 100 --rounds 50 --eval-every 50"
        flags += " --carry-moments"
    else:
        rows, flags = count, "--clients 10 --partition dirichlet --dry-run"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, rows)
        data = ["--train-file", str(path), "--eval-file", str(builtin.TEXT / "eval.jsonl")]
        own = ["--model", str(model), *flags.split(), *data]
        return measured(tree, own, Path(folder))


def keep(name: str, commit: str, series: str, count: int, cost: dict) -> None:
    """Adds a point to the results."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    about = {"date": date.today().isoformat(), "commit": commit}
    points = found.setdefault(name, {}).setdefault(series, {})
    points[str(count)] = cost | about
    found[name][series] = dict(sorted(points.items(), key=lambda point: int(point[0])))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def commit_of(tree: Path) -> str:
    asked = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def table() -> None:
    found = json.loads(RESULTS.read_text())
    print("| | commit | peak MiB | CPU s | checkpoints MiB |")
    print("|---|---|---|---|---|")
    for name, own in found.items():
        for series in ("clients", "rows"):
            for count, cost in own.get(series, {}).items():
                peak, left = cost["peak_bytes"] / 2**20, cost["checkpoint_bytes"] / 2**20
                print(
                    f"| {name}: {int(count):,} {series} | {cost['commit']} | {peak:,.0f} | "
                    f"{cost['cpu_seconds']:,.0f} | {left:,.0f} |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="what the figures are kept under, or table")
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument("--only", nargs=2, metavar=("SERIES", "COUNT"))
    given = parser.parse_args()
    if given.name == "table":
        table()
        return
    points = [("clients", count) for count in CLIENTS] + [("rows", count) for count in ROWS]
    points = [points[place] for place in (2, 4, 0, 3, 1)]  # the largest first
    if given.only:
        points = [(given.only[0], int(given.only[1]))]
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        for series, count in points:
            cost = measure(given.tree.resolve(), Path(folder) / "model", series, count)
            keep(given.name, commit_of(given.tree), series, count, cost)
    table()


if __name__ == "__main__":
    main()
