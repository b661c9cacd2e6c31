"""Padded batches against packed ones: a step of a small Llama's factors on examples of all lengths.

    python -m benchmarks.packing      # measures, writes results/packing.json, prints the table

Both are measured in turns on the same batches, forward and backward. A row for every batch size has
the share of padding, the median seconds, and the median of how many times as fast packing is.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
import transformers as hf

from rolora.adapter.attach import LoRAConfig, adapted_layers, attach
from rolora.recipes.packing import packed_batch
from rolora.recipes.spans import token_batch, token_losses

RESULTS = Path(__file__).parent / "results" / "packing.json"
BATCHES = (4, 8, 16, 32)
STEPS = 8  # the first pair warms up
LONGEST = 256


def model() -> torch.nn.Module:
    """Eight blocks of width 256, factors on query and value."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=4,
        use_cache=False,
    )
    made = hf.LlamaForCausalLM(config).eval()
    attach(made, LoRAConfig(rank=8, target_modules=["q_proj", "v_proj"]))
    for _, layer in adapted_layers(made):
        layer.set_phase("B")
    return made


def examples(count: int, generator: torch.Generator) -> tuple[list[list[int]], list]:
    """Lengths as instruction data have them: log-normal, the median 64 tokens."""
    draws = torch.randn(count, generator=generator)
    lengths = (64 * torch.exp(0.8 * draws)).clamp(8, LONGEST).int().tolist()
    ids = [torch.randint(4096, (n,), generator=generator).tolist() for n in lengths]
    return ids, [[(n // 2, n)] for n in lengths]


def seconds(model: torch.nn.Module, batch) -> float:
    start = time.perf_counter()
    token_losses(model, batch).sum().backward()
    model.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure() -> list[dict]:
    """A row a batch size: medians of both ways, and of the ratio of each pair."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made, generator = model().to(device), torch.Generator().manual_seed(1)
    found = []
    for size in BATCHES:
        padding, pairs = [], []
        for _ in range(STEPS):
            ids, spans = examples(size, generator)
            batches = [how(ids, spans, 0, device) for how in (token_batch, packed_batch)]
            padding.append([1 - b.tokens / b.inputs["input_ids"].numel() for b in batches])
            pairs.append([seconds(made, batch) for batch in batches])
        found.append(
            {
                "examples": size,
                "padding": [statistics.fmean(column) for column in zip(*padding, strict=True)],
                "seconds": [statistics.median(c) for c in zip(*pairs[1:], strict=True)],
                "times": statistics.median(padded / packed for padded, packed in pairs[1:]),
            }
        )
    return found


def table() -> None:
    print("| examples a batch | padding | packed: padding | padded s | packed s | times as fast |")
    print("|---|---|---|---|---|---|")
    for row in json.loads(RESULTS.read_text()):
        shares = " | ".join(f"{share:.0%}" for share in row["padding"])
        seconds = " | ".join(f"{value:.2f}" for value in row["seconds"])
        print(f"| {row['examples']} | {shares} | {seconds} | {row['times']:.2f} |")


if __name__ == "__main__":
    RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    table()
