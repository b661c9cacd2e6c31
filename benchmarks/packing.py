"""Padded batches against packed ones: a step of a small Llama's factors on examples of all lengths.

    python -m benchmarks.packing

Both are measured in turns on the same batches, forward and backward; prints for every batch size
the share of padding, the median seconds and how many times as fast packing is.
"""

from __future__ import annotations

import statistics
import time

import torch
import transformers as hf

from rolora.adapter.attach import LoRAConfig, adapted_layers, attach
from rolora.recipes.packing import packed_batch
from rolora.recipes.spans import token_batch, token_losses

BATCHES = (4, 8, 16, 32)
STEPS = 6
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


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = model().to(device)
    generator = torch.Generator().manual_seed(1)
    for size in BATCHES:
        padding, pairs = [], []
        for _ in range(STEPS):
            ids, spans = examples(size, generator)
            batches = [how(ids, spans, 0, device) for how in (token_batch, packed_batch)]
            padding.append([1 - b.tokens / b.inputs["input_ids"].numel() for b in batches])
            pairs.append([seconds(made, batch) for batch in batches])
        padded, packed = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
        shares = [statistics.fmean(column) for column in zip(*padding, strict=True)]
        print(
            f"{size} examples: padding {shares[0]:.0%} -> {shares[1]:.0%}, "
            f"{padded:.3f} s -> {packed:.3f} s, {padded / packed:.2f} times as fast"
        )


if __name__ == "__main__":
    main()
