"""Which implementation computes a primitive, and the record of what ran.

`use_backend` forces one; otherwise `choose` picks. `explain()` lists what ran since the last
`explain(clear=True)`, so that no path is ever taken unseen.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from rolora_kernels import gemm, primitives, table

_forced: str | None = (
    None  # of the process, not of a context: autograd runs backward in threads of its own
)


class BackendUnavailable(RuntimeError):
    """A forced backend that cannot run here; the text says why."""


@dataclass
class Choice:
    """One path taken: `operation` on `shape`, by `backend`, because of `reason`; `linears` > 1
    means a shared-input group.
    """

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
    """Forces one backend inside the context: `"torch"` (vendor libraries), `"triton"` (our
    kernels), `"triton[shrink,base_dx:tma]"` (our kernels for the primitives named, the persistent
    TMA one where `:tma` says so), `"reference"` (plain autograd). A backend that does not exist
    raises here, one that cannot compute on its operands when it is called; nothing falls back.
    """
    if name not in ("torch", "triton", "reference"):
        primitives.mixture(name)
    if name.startswith("triton"):
        try:
            primitives.prepare(name)
        except ImportError as error:
            raise BackendUnavailable(
                f"backend {name!r} cannot run: the package triton is not installed ({error})"
            ) from None
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose(x: torch.Tensor, weights: Sequence, rank: int, clients: int = 0) -> tuple[str, str]:
    """(backend, reason) for a call on `x [M, K]`, frozen weights `[N_g, K]`, a group's summed rank
    and factors of so many clients. Vendor libraries are the default until a GPU's table says that
    our kernels win there; raises BackendUnavailable where a forced backend cannot run.
    """
    if _forced is None:
        backend, reason = (
            _measured(x, weights, rank)
            if not clients
            else ("torch", "the client axis has no measured table")
        )
        return backend, reason + _library(backend, x, weights)
    if clients and (_forced == "reference" or ":tma" in _forced or torch.compiler.is_compiling()):
        raise BackendUnavailable(
            f"backend {_forced!r} is forced, but cannot run: it has no client axis, and {clients} "
            "clients were given"
        )
    if _forced.startswith("triton"):
        reason = _why_not_triton(x)
        if reason is not None:
            raise BackendUnavailable(f"backend {_forced!r} is forced, but cannot run: {reason}")
    return _forced, "forced by use_backend" + _library(_forced, x, weights)


def _library(backend: str, x: torch.Tensor, weights: Sequence) -> str:
    """Named where it is not the one that PyTorch would take."""
    return (
        "; oneDNN, called directly"
        if backend not in ("triton", "reference") and any(gemm.fits(x, W.shape[0]) for W in weights)
        else ""
    )


def _measured(x: torch.Tensor, weights: Sequence, rank: int) -> tuple[str, str]:
    """What the device's table names for each primitive at the nearest shape."""
    if torch.compiler.is_compiling():
        return "torch", "torch.compile: vendor libraries, unless forced"
    found = table.of(x.device)
    if found is None:
        return "torch", f"default: no measured table for this {'GPU' if x.is_cuda else 'device'}"
    N = max(W.shape[0] for W in weights)
    backend = _from_table(
        x.device,
        x.dtype,
        x.shape[0],
        N,
        x.shape[1],
        rank,
        all(W.shape[0] % 8 == 0 for W in weights),
    )
    return backend, f"measured on {found['gpu']} at {found['commit']}, nearest shape"


@table.cached
def _from_table(
    device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, rank: int, aligned: bool
) -> str:
    from rolora_kernels.triton_ops import base_tma
    from rolora_kernels.triton_ops.launch import rank_block

    values, ours = {"M": M, "N": N, "K": K}, []
    for name, sizes in table.SIZES.items():
        padded = min(32, rank_block(rank)) if len(sizes.split()) == 3 else rank_block(rank)
        row = table.nearest(
            device, name, dtype, padded, tuple(values[size] for size in sizes.split())
        )
        winner = row["winner"] if row else "torch"
        if winner == "tma":  # rows that TMA cannot address go by pointers
            fits = aligned and base_tma.why_not(device, dtype, N, K) is None
            ours.append(f"{name}:tma" if fits else name)
        elif winner == "triton":
            ours.append(name)
    return f"triton[{','.join(ours)}]" if ours else "torch"


def choose_dequantise(packed: torch.Tensor, shape: torch.Size) -> tuple[str, str]:
    """("torch" | "triton", reason) for a 4-bit weight of `shape [N, K]`."""
    names: tuple[str, ...] = ()
    if _forced == "triton":
        names = ("dequantise",)
    elif _forced not in (None, "torch", "reference"):
        names = primitives.mixture(_forced)
    if "dequantise" in names:
        from rolora_kernels.triton_ops.launch import runs_on

        reason = runs_on(packed)
        if reason is not None:
            raise BackendUnavailable(f"backend {_forced!r} is forced, but cannot run: {reason}")
        return "triton", "forced by use_backend"
    if _forced is not None:
        return "torch", "forced by use_backend"
    row = table.nearest(packed.device, "dequantise", torch.bfloat16, 0, tuple(shape))
    return (
        (row["winner"], "measured on this device's table")
        if row
        else ("torch", "default: not in a measured table")
    )


def choose_pack(device: torch.device) -> tuple[str, str]:
    """("torch" | "triton", reason) for packing tensors of a device."""
    if _forced == "triton":
        from rolora_kernels.triton_ops.launch import runs_on

        reason = runs_on(torch.empty(0, device=device))
        if reason is not None:
            raise BackendUnavailable(f"backend {_forced!r} is forced, but cannot run: {reason}")
        return "triton", "forced by use_backend"
    if _forced is None and device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return "triton", "on a GPU one launch packs every tensor"
    return "torch", "default on this device" if _forced is None else "forced by use_backend"


def _why_not_triton(x: torch.Tensor) -> str | None:
    from rolora_kernels.triton_ops.launch import can_run

    return can_run(x)


def record(
    operation: str, backend: str, reason: str, shape: str, x: torch.Tensor, linears: int
) -> None:
    """Counts a call. Skipped while compiling: a trace is not a call."""
    if torch.compiler.is_compiling():
        return
    key = (operation, backend, reason, shape, x.dtype, x.device, linears)
    choice = _taken.get(key)
    if choice is None:
        dtype = str(x.dtype).removeprefix("torch.")
        choice = _taken[key] = Choice(
            operation, backend, reason, shape, dtype, str(x.device), linears
        )
    choice.calls += 1


def explain(clear: bool = False) -> list[Choice]:
    """The paths taken so far in this process, in the order they first ran; `clear` empties the
    record afterwards.
    """
    choices = list(_taken.values())
    if clear:
        _taken.clear()
    return choices
