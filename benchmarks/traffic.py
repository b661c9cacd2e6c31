"""Memory traffic of one adapted linear's forward and backward, counted without a GPU.

    python -m benchmarks.traffic

What is counted is compulsory traffic: every launch reads each of its operands once and writes each
of its results once (what a tile reads again is served by L2). Extra means beyond the frozen
linear's own three products. Vendor paths are counted by a dispatch mode over ATen operators, our
kernels by what they declare below; tests/rolora_kernels/test_traffic.py holds the declaration
against the addresses that the kernels really touch in Triton's interpreter.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rolora_kernels.triton_ops.launch import rows_of, splits_of
from rolora_kernels.triton_ops.spec import Config, all_specs

H100 = 132  # multiprocessors, as of an H200
RESULTS = Path(__file__).parent / "results" / "traffic.json"


@dataclass
class Count:
    """Launches, and bytes read and written by them."""

    launches: int = 0
    read: int = 0
    written: int = 0
    names: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return self.read + self.written


class Eager(TorchDispatchMode):
    """Counts ATen operators as launches: views and empty allocations are free, `beta=0` does not
    read what it overwrites.
    """

    def __init__(self):
        super().__init__()
        self.count = Count()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        returns = [r.alias_info for r in func._schema.returns]
        if any(a is not None and not a.is_write for a in returns) or name in (
            "empty",
            "new_empty",
            "empty_like",
            "detach",
            "_unsafe_view",
        ):
            return out
        inputs = {}
        for place, value in enumerate((*args, *kwargs.values())):
            if place == 0 and kwargs.get("beta", 1) == 0:
                continue
            for tensor in tree_leaves(value):
                if isinstance(tensor, torch.Tensor):
                    inputs[tensor.data_ptr(), tuple(tensor.shape), tensor.stride()] = (
                        tensor.numel() * tensor.element_size()
                    )
        self.count.launches += 1
        self.count.names.append(name)
        self.count.read += sum(inputs.values())
        self.count.written += sum(
            t.numel() * t.element_size() for t in tree_leaves(out) if isinstance(t, torch.Tensor)
        )
        return out


def eager(step: Callable[[], object]) -> Count:
    """The traffic of a step made of ATen operators."""
    with Eager() as mode:
        step()
    return mode.count


def ours(
    M: int, K: int, N: int, r: int, phase: str, width: int = 2, multiprocessors: int = H100
) -> Count:
    """What our kernels declare for a forward and backward with dX, fp32 factors, no bias, no
    dropout, on a GPU of so many multiprocessors.
    """
    count = Count()

    def launch(name: str, read: int, written: int) -> None:
        count.launches, count.read, count.written = (
            count.launches + 1,
            count.read + read,
            count.written + written,
        )
        count.names.append(name)

    def shipped(kernel: str):
        spec = all_specs()[kernel]
        return spec.shipped(width, spec.rank_block(r))

    def blocks(size: int, block: int) -> int:
        return -(-size // block)

    x, y, w, s, A, B = (
        M * K * width,
        M * N * width,
        N * K * width,
        M * r * width,
        4 * r * K,
        4 * N * r,
    )

    def shrink(read: int, columns: int) -> None:
        config = shipped("shrink")
        programs = blocks(M, config.BLOCK_M) * blocks(r, config.BLOCK_R)
        splits, _ = splits_of(programs, columns, config.BLOCK_K, multiprocessors)
        if splits == 1:
            return launch("shrink", read, s)
        launch("shrink", read, 4 * splits * M * r)
        launch("reduce", 4 * splits * M * r, s)

    def rows(config: Config, columns: int) -> int:
        beside = blocks(columns, config.BLOCK_N or config.BLOCK_K) * blocks(r, config.BLOCK_R)
        return blocks(M, rows_of(config, M, beside, multiprocessors))

    shrink(x + A, K)
    launch("expand_base", x + w + s + B, y)
    if phase == "A":
        shrink(y + B, N)  # T alone is a shrink of dY
    else:
        config = shipped("grads_of_dy")
        parts = 4 * r * (M * blocks(N, config.BLOCK_N) + N * rows(config, N))
        launch("grads_of_dy", y + B + s, parts)
        launch("reduce", parts, s + B)
    launch("base_dx", y + w + s + A, x)
    if phase != "B":
        parts = 4 * r * K * rows(shipped("grad_A"), K)
        launch("grad_A", s + x, parts)
        launch("reduce", parts, A)
    return count


def frozen(M: int, K: int, N: int, width: int = 2) -> int:
    """Bytes of y = x Wᵀ and dx = dy W."""
    return 2 * width * (M * K + M * N + N * K)


def count() -> None:
    """Counts and writes benchmarks/results/traffic.json."""
    from benchmarks.layers import CONTENDERS, contenders

    M, K, N = 4096, 2048, 2048
    unit, rows = M * K + M * N, []
    for phase in ("B", "A", "BOTH"):
        for r in (16, 64):
            declared = ours(M, K, N, r, phase)
            steps, _ = contenders(M, K, N, r, torch.bfloat16, phase)
            base = eager(steps["frozen"])
            counted = {name: eager(steps[name]) for name in CONTENDERS[1:]}
            floor = 2 * (M * K + M * N) if phase == "B" else 4 * M * K + 2 * M * N
            rows.append(
                {
                    "phase": phase,
                    "r": r,
                    "floor": floor / unit,
                    "kernels": [(declared.bytes - frozen(M, K, N)) / unit, declared.launches],
                    **{
                        name: [(found.bytes - base.bytes) / unit, found.launches]
                        for name, found in counted.items()
                    },
                }
            )
    RESULTS.write_text(json.dumps({"shape": [M, K, N], "rows": rows}, indent=1) + "\n")


def table() -> None:
    found = json.loads(RESULTS.read_text())
    print(
        "Extra bytes of one linear's forward and backward, bf16, M {}, K {}, N {}, in units of "
        "MK + MN; launches in brackets.\n".format(*found["shape"])
    )
    print(
        "| phase | r | floor | our kernels | our vendor path (CPU) | PEFT, same factor frozen | "
        "PEFT default |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in found["rows"]:
        cells = (
            f"{row[name][0]:.2f} ({row[name][1]})"
            for name in ("kernels", "ours", "peft_phase", "peft_default")
        )
        print(f"| {row['phase']} | {row['r']} | {row['floor']:.2f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    count()
    table()
