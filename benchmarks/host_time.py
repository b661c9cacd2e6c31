"""`python -m benchmarks.host_time`: what linears' forward and backward cost the host, on shapes
that leave nothing else, beside PEFT with the same factor frozen and the frozen linears alone: one
linear, and a group of three on one input.

Contenders take turns in one process, and what counts is the time of its thread: others on the
machine take less of that than of the clock's. The fastest tenth of the turns is the quiet one. Run
it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import peft
import torch
from torch import nn

from benchmarks.interleave import interleaved, ratio
from rolora import LoRAConfig, attach, set_phase

M, K, N, RANK = 8, 64, 64, 8
CALLS = 4  # of a contender's turn
NAMES = ("q_proj", "k_proj", "v_proj")


class Block(nn.Module):
    """Linears on one input."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.names = NAMES[:count]
        for name in self.names:
            setattr(self, name, nn.Linear(K, N))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [getattr(self, name)(x) for name in self.names]


def contenders(count: int, phase: str) -> dict[str, Callable[[], object]]:
    """name → a few forwards and backwards of `count` linears that train `phase`."""
    ours = Block(count)
    attach(ours, LoRAConfig(rank=RANK, alpha=16, target_modules=list(ours.names)))
    set_phase(ours, phase)
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=list(ours.names))
    theirs: nn.Module = peft.inject_adapter_in_model(config, Block(count))
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(f"lora_{phase}" in name)
    frozen = Block(count).requires_grad_(False)
    x, dys = torch.randn(M, K, requires_grad=True), [torch.randn(M, N) for _ in range(count)]

    def of(block: nn.Module) -> Callable[[], None]:
        trained = [x, *(p for p in block.parameters() if p.requires_grad)]

        def turn() -> None:
            for _ in range(CALLS):
                torch.autograd.backward(block(x), dys)
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
    for count in (1, len(NAMES)):
        for phase in ("A", "B"):
            times = interleaved(contenders(count, phase), turns, time.thread_time)
            least = {name: sorted(own)[turns // 10] / CALLS * 1e6 for name, own in times.items()}
            words = ", ".join(f"{name} {each:.0f} µs" for name, each in least.items())
            pairs = ratio(times, "ours", "peft")
            quiet = least["ours"] / least["peft"]
            print(
                f"linears {count}, {phase} trains: {words}; ours / PEFT {quiet:.2f} "
                f"({pairs:.2f} by pairs)",
                flush=True,
            )


if __name__ == "__main__":
    main()
