"""Which implementation computes a primitive, and the record of what ran.

`use_backend` forces one; otherwise `choose` picks. `explain()` lists what ran since the last `explain(clear=True)`, so
that no path is ever taken unseen.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from rolora_kernels import primitives

_forced: str | None = None  # of the process, not of a context: autograd runs backward in threads of its own


class BackendUnavailable(RuntimeError):
    """A forced backend that cannot run here; the text says why."""


@dataclass
class Choice:
    """One path taken: `operation` on `shape`, by `backend`, because of `reason`; `linears` > 1 means a shared-input group."""

    operation: str
    backend: str
    reason: str
    shape: str
    dtype: str
    device: str
    linears: int
    calls: int = 0


_taken: dict[tuple, Choice] = {}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend inside the context: `"torch"` (vendor libraries), `"triton"` (our kernels), `"triton[shrink]"` (our
    kernels for the primitives named), `"reference"` (plain autograd). A backend that does not exist raises here, one that
    cannot compute on its operands when it is called; nothing falls back.
    """
    if name not in ("torch", "triton", "reference"):
        primitives.mixture(name)
    if name.startswith("triton"):
        try:
            primitives.prepare(name)
        except ImportError as error:
            raise BackendUnavailable(f"backend {name!r} cannot run: the package triton is not installed ({error})") from None
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose(x: torch.Tensor) -> tuple[str, str]:
    """(backend, reason) for a call on x. Vendor libraries are the default until a GPU's table says that our kernels win
    there; raises BackendUnavailable where a forced backend cannot run."""
    if _forced is None:
        return _measured(x)
    if _forced.startswith("triton"):
        reason = _why_not_triton(x)
        if reason is not None:
            raise BackendUnavailable(f"backend {_forced!r} is forced, but cannot run: {reason}")
    return _forced, "forced by use_backend"


def _measured(x: torch.Tensor) -> tuple[str, str]:
    """The backend of the device's table (`tuned/<GPU name>.json`, written by `python -m benchmarks.gpu`), for x's dtype."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return "torch", "default on this device" if not x.is_cuda else "torch.compile: vendor libraries, unless forced"
    table = _table(torch.cuda.get_device_name(x.device))
    if table is None:
        return "torch", "default: no measured table for this GPU"
    return table["backend"].get(str(x.dtype).removeprefix("torch."), "torch"), f"measured on {table['gpu']}, {table['commit']}"


@functools.cache
def _table(gpu: str) -> dict | None:
    path = Path(__file__).parent / "tuned" / (gpu.replace(" ", "_").replace("/", "_") + ".json")
    return json.loads(path.read_text()) if path.is_file() else None


def _why_not_triton(x: torch.Tensor) -> str | None:
    from rolora_kernels.triton_ops.launch import can_run

    return can_run(x)


def record(operation: str, backend: str, reason: str, shape: str, x: torch.Tensor, linears: int) -> None:
    """Counts a call. Skipped while compiling: a trace is not a call."""
    if torch.compiler.is_compiling():
        return
    key = (operation, backend, shape, x.dtype, x.device, linears)
    choice = _taken.get(key)
    if choice is None:
        dtype = str(x.dtype).removeprefix("torch.")
        choice = _taken[key] = Choice(operation, backend, reason, shape, dtype, str(x.device), linears)
    choice.calls += 1


def explain(clear: bool = False) -> list[Choice]:
    """The paths taken so far in this process, in the order they first ran; `clear` empties the record afterwards."""
    choices = list(_taken.values())
    if clear:
        _taken.clear()
    return choices
