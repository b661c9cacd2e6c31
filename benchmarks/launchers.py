"""`python -m benchmarks.launchers`: what a launch of each kernel costs the host, without a GPU: all
of Python's way from our launcher to the call of the driver, which a stub stands for.

Triton compiles the kernels for an H100 first. "By Triton" is the same launch where Triton looks the
compiled kernel up itself (again). Both are the least of many turns, by the time of the thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch


class _Utils:
    """The driver's library: nothing is loaded."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132}

    def load_binary(self, name: str, *rest: Any) -> tuple[Any, ...]:
        return "module", f"function {name}", 0, 0, 1024


class Stub:
    """A driver of one H100 whose launches go into a list; `keep` says whether."""

    launches: list[tuple[Any, ...]]

    def __init__(self, keep: bool = True) -> None:
        self.launches, self.keep, self.utils = [], keep, _Utils()

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return self._launched

    def _launched(self, *arguments: Any) -> None:
        if self.keep:
            self.launches.append(arguments)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return 9, 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def launchers() -> dict[str, Callable[[], object]]:
    """name → one call of a launcher on small operands in bf16, factors in fp32."""
    from rolora_kernels import triton_ops, tune
    from rolora_kernels.triton_ops.reduce import sum_partials

    t = tune.operands("cpu", 64, 64, 64, 16, torch.bfloat16)
    parts, out = torch.zeros(2, 64, 16), torch.zeros(64, 16)
    return {
        "shrink": lambda: triton_ops.shrink(t["x"], t["A"]),
        "expand_base": lambda: triton_ops.expand_base(t["x"], t["W"], t["S"], t["B"], 1.3, None),
        "base_dx": lambda: triton_ops.base_dx([t["dy"]], [t["W"]], t["T"], t["A"]),
        "reduce": lambda: sum_partials([(parts, out)], 1.0),
    }


def least(call: Callable[[], object], turns: int = 200, inner: int = 10) -> float:
    """µs of a call."""
    found = float("inf")
    for _ in range(turns):
        start = time.thread_time()
        for _ in range(inner):
            call()
        found = min(found, time.thread_time() - start)
    return found / inner * 1e6


def _forgetting(call: Callable[[], object]) -> None:
    """A call of which nothing is remembered."""
    from rolora_kernels.triton_ops import again

    again.forget()
    call()


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
    from triton.runtime.driver import driver

    from rolora_kernels.triton_ops import again

    driver.set_active(Stub(keep=False))
    print("| launcher | µs | by Triton, µs |\n|---|---|---|")
    for name, call in launchers().items():
        call()
        ours = least(call)
        remembered, again._MOST = again._MOST, 0  # nothing is found again
        again.forget()
        theirs = least(partial(_forgetting, call))
        again._MOST = remembered
        print(f"| {name} | {ours:.1f} | {theirs:.1f} |", flush=True)


if __name__ == "__main__":
    main()
