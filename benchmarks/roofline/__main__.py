"""What an adapted model's linears would cost on GPUs, modelled from bytes, arithmetic and launches.

    python -m benchmarks.roofline [--gpu H200] [--model llama-2-7b] [--rows 8192] [--rank 16]
                                  [--phase B] [--dtype bf16] [--storage dense] [--steps 4]

A row a variant: milliseconds of forward and backward, and over the frozen linears'; a measured
figure beside it where benchmarks/results/gpu has one. `machines` states the assumptions.
"""

from __future__ import annotations

import argparse
import json

from benchmarks.roofline.machines import MACHINES
from benchmarks.roofline.model import MODELS
from benchmarks.roofline.tables import table, variants

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--gpu", choices=tuple(MACHINES), action="append")
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-2-7b")
    parser.add_argument("--rows", type=_count, default=8192, help="M: tokens of a step")
    parser.add_argument("--rank", type=_count, default=16)
    parser.add_argument("--phase", choices=("A", "B", "BOTH"), default="B")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--storage", choices=("dense", "nf4"), default="dense")
    parser.add_argument(
        "--steps", type=_count, default=1, help="micro-steps of an optimizer step (default 1)"
    )
    parser.add_argument("--json", action="store_true", help="the rows as JSON")
    args = parser.parse_args()
    given = {
        "gpus": tuple(args.gpu or MACHINES),
        "model": args.model,
        "M": args.rows,
        "r": args.rank,
        "phase": args.phase,
        "width": DTYPES[args.dtype],
        "nf4": args.storage == "nf4",
        "steps": args.steps,
    }
    if args.json:
        print(json.dumps(variants(**given), indent=1))
    else:
        table(**given)


if __name__ == "__main__":
    main()
