"""`python -m benchmarks.host_time`: what a linear's forward and backward cost the host, on shapes
that leave nothing else, beside PEFT with the same factor frozen and the frozen linear alone.

Contenders take turns in one process. Where others load the machine, the fastest twentieth of the
turns tells more than their median. Run it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import peft
import torch
from torch import nn

from benchmarks.interleave import interleaved, ratio
from rolora import RoLoRALinear

M, K, N, RANK = 8, 64, 64, 8
CALLS = 4  # of a contender's turn


def contenders(phase: str) -> dict[str, Callable[[], None]]:
    """name → a few forwards and backwards of one linear that trains `phase`."""
    ours = RoLoRALinear.from_linear(nn.Linear(K, N), rank=RANK, alpha=16)
    ours.set_phase(phase)
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["q"])
    theirs = peft.inject_adapter_in_model(config, nn.ModuleDict({"q": nn.Linear(K, N)})).q
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(f"lora_{phase}" in name)
    frozen = nn.Linear(K, N).requires_grad_(False)
    x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, N)

    def of(layer: nn.Module) -> Callable[[], None]:
        trained = [x, *(p for p in layer.parameters() if p.requires_grad)]

        def turn() -> None:
            for _ in range(CALLS):
                layer(x).backward(dy)
                for tensor in trained:
                    tensor.grad = None

        return turn

    return {"ours": of(ours), "peft": of(theirs), "frozen": of(frozen)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=400)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, peft {peft.__version__}, {time.strftime('%Y-%m-%d')}")
    for phase in ("A", "B"):
        times = interleaved(contenders(phase), turns)
        least = {name: sorted(own)[turns // 20] / CALLS * 1e6 for name, own in times.items()}
        words = ", ".join(f"{name} {each:.0f} µs" for name, each in least.items())
        pairs = ratio(times, "ours", "peft")
        quiet = least["ours"] / least["peft"]
        print(f"{phase} trains: {words}; ours / PEFT {quiet:.2f} ({pairs:.2f} by pairs)")


if __name__ == "__main__":
    main()
