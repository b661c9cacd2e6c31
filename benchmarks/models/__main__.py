"""Whole models beside PEFT: tokens a second, what is kept for backward, and what a quantised base
takes; then the two operations that a choice of ours rests on.

    # CPU; writes benchmarks/results/models.json and prints the rows
    python -m benchmarks.models [--pairs N]
"""

from __future__ import annotations

import argparse
import json
import platform

import peft
import torch
import transformers as hf

from benchmarks.models import operations, quantised, results, speed

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    given = parser.parse_args()
    result = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": hf.__version__,
        "matmuls": operations.matmuls(99),
        "attention": operations.attention(given.pairs),
        "quantised": quantised.measured(),
        "speed": speed.measured(given.pairs),
    }
    results.PATH.write_text(json.dumps(result, indent=1) + "\n")
