"""Which implementation computes a primitive, and the record of what ran.

`use_backend` forces one; otherwise `choose` picks. `explain()` lists what ran since the last `explain(clear=True)`, so
that no path is ever taken unseen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

BACKENDS = ("torch", "reference")
_forced: str | None = None  # of the process, not of a context: autograd runs backward in threads of its own


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
    """Forces one backend (`"torch"`: vendor libraries; `"reference"`: plain autograd) inside the context.

    A backend that does not exist or cannot run raises; nothing falls back.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose() -> tuple[str, str]:
    """(backend, reason) for a call."""
    return (_forced, "forced by use_backend") if _forced else ("torch", "vendor libraries are the only candidate")


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
