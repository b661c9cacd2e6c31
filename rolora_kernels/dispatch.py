"""Which plan a call follows, and the record of what ran.

`use_backend` forces a plan; otherwise `choose` follows the device's measured table, and vendor
libraries where there is none. `explain()` lists what ran since the last `explain(clear=True)`, so
that no path is ever taken unseen.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from rolora_kernels import gemm, measured, primitives, tuned
from rolora_kernels.plan import RULE, TORCH, Plan

FORCED = "forced by use_backend"

# Of the process, not of a context: autograd runs backward in threads of its own.
_forced: Plan | None = None
_forced_number = 0
_numbers: dict[Plan, int] = {}  # of the plans that were ever forced: cheaper to hash than a plan


class BackendUnavailable(RuntimeError):
    """A forced backend that cannot run here; the text says why."""


@dataclass
class Choice:
    """One path taken: `operation` on `shape`, by `backend`, because of `reason`.

    `backend` is a plan's text for the rule, and an implementation's name for a single primitive;
    `linears` > 1 means a shared-input group.
    """

    operation: str
    backend: str
    reason: str
    shape: str
    dtype: str
    device: str
    linears: int
    calls: int = 0
    record: dict | None = field(default=None, repr=False, compare=False)  # that it is listed in


_taken: dict[tuple, Choice] = {}


@contextlib.contextmanager
def use_backend(backend: str | Plan) -> Iterator[None]:
    """Forces one plan inside the context, given as such or as its text: `"torch"` (vendor
    libraries), `"triton"` (our kernels), `"triton[shrink,base_dx:tma]"` (our kernels for the
    primitives named, the persistent TMA one where `:tma` says so), `"merged"` (one vendor product
    with W + s·B A), `"merged+triton[shrink,merge]"`, `"reference"` (plain autograd).
    A backend that does not exist raises here, one that cannot compute on its operands when it is
    called; nothing falls back.
    """
    plan = backend if isinstance(backend, Plan) else Plan.parse(backend)
    if plan.ours():
        try:
            primitives.prepare(plan)
        except ImportError as error:
            raise BackendUnavailable(
                f"backend {str(plan)!r} cannot run: the package triton is not installed ({error})"
            ) from None
    global _forced, _forced_number
    before = _forced, _forced_number
    _forced, _forced_number = plan, _numbers.setdefault(plan, len(_numbers))
    try:
        yield
    finally:
        _forced, _forced_number = before


@dataclass(frozen=True)
class Given:
    """What of a call, beside x and the weights, a plan depends on.

    ranks: of the linears of a group; clients: that the factors are of, with different numbers of
    rows where `ragged`; dropout: whether the low-rank path has it; experts: whether the weights are
    stacks of one an expert.
    """

    ranks: tuple[int, ...]
    clients: int = 0
    ragged: bool = False
    dropout: bool = False
    experts: bool = False


def choose(x: torch.Tensor, weights: Sequence, given: Given) -> tuple[Plan, str]:
    """(plan, reason) for a call on `x [M, K]` and frozen weights `[N_g, K]`.

    Vendor libraries are the default until a GPU's table says that our kernels win there; raises
    BackendUnavailable where a forced plan cannot run.
    """
    if _forced is not None:
        _check_forced(_forced, x, given)
        plan, reason = _forced, FORCED
    elif given.experts:
        plan, reason = TORCH, "default: experts have no measured table"
    elif given.ragged:
        plan, reason = TORCH, "rows of adapters that differ: a product an adapter"
    elif given.clients:
        plan, reason = TORCH, "the client axis has no measured table"
    else:
        plan, reason = measured.plan_for(x, weights, given.ranks, given.dropout)
    return plan, reason + _library(plan, x, weights)


def _check_forced(plan: Plan, x: torch.Tensor, given: Given) -> None:
    """Raises where a forced plan cannot compute on x with what is given."""
    compiling = torch.compiler.is_compiling()
    if given.experts:
        _check_experts(plan, given)
    if plan.merged:
        _check_merged(plan, given, compiling)
    one_model_only = plan.reference or plan.uses_tma() or compiling
    if given.clients and one_model_only:
        raise _unavailable(f"it has no client axis, and {given.clients} clients were given")
    if given.ragged and any(getattr(plan, name) != "torch" for name in RULE):
        raise _unavailable(
            "its kernels want as many rows of every adapter and one scaling; use_backend('torch') "
            "takes any"
        )
    if plan.ours():
        from rolora_kernels.triton_ops.launch import can_run

        reason = can_run(x)
        if reason is not None:
            raise _unavailable(reason)


def _check_merged(plan: Plan, given: Given, compiling: bool) -> None:
    """Raises where a merged weight cannot stand for what is given."""
    if given.clients:
        raise _unavailable(
            f"a merged weight is one for all rows, and factors of {given.clients} clients were "
            "given"
        )
    if given.dropout:
        raise _unavailable(
            "dropout drops inputs of the low-rank path alone, which a merged weight does not have"
        )
    if compiling and plan.merge != "torch":
        raise _unavailable("torch.compile takes the merged weight from vendor libraries: 'merged'")


def _check_experts(plan: Plan, given: Given) -> None:
    """Raises where a plan has no way to take one expert after another."""
    if plan.merged or plan.reference:
        raise _unavailable(
            "a mixture of experts is computed by the primitives, one expert after another; "
            "use_backend('torch') or 'triton' are"
        )
    if given.clients and plan.ours():
        raise _unavailable("experts of a cohort have vendor libraries alone")


def _unavailable(reason: str) -> BackendUnavailable:
    return BackendUnavailable(f"backend {str(_forced)!r} is forced, but cannot run: {reason}")


def _library(plan: Plan, x: torch.Tensor, weights: Sequence) -> str:
    """The vendor library's name, where it is not the one that PyTorch would take."""
    if not any(gemm.fits(x, W.shape[0]) for W in weights):
        return ""
    if plan.reference or all(getattr(plan, name) != "torch" for name in RULE):
        return ""
    return "; oneDNN, called directly"


def choose_dequantise(packed: torch.Tensor, shape: torch.Size) -> tuple[str, str]:
    """("torch" | "triton", reason) for a 4-bit weight of `shape [N, K]`."""
    if _forced is not None:
        return _forced_single(_forced.dequantise, packed)
    row = tuned.nearest(packed.device, "dequantise", torch.bfloat16, 0, tuple(shape))
    if row:
        return row["winner"], "measured on this device's table"
    return _ours_on_a_gpu(packed.device, "dequantises")


def choose_pack(device: torch.device) -> tuple[str, str]:
    """("torch" | "triton", reason) for packing tensors of a device."""
    if _forced is not None:
        return _forced_single(_forced.pack, torch.empty(0, device=device))
    return _ours_on_a_gpu(device, "packs")


def _ours_on_a_gpu(device: torch.device, does: str) -> tuple[str, str]:
    """What is one launch of ours and hundreds of PyTorch's, where there is no table."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return "triton", f"default on a GPU: one launch {does} all of it"
    return "torch", "default on this device"


def _forced_single(implementation: str, like: torch.Tensor) -> tuple[str, str]:
    """The forced implementation of a primitive outside the rule, where it can run beside `like`."""
    if implementation == "triton":
        from rolora_kernels.triton_ops.launch import runs_on

        reason = runs_on(like)
        if reason is not None:
            raise _unavailable(reason)
    return implementation, FORCED


def record(
    operation: str, backend: str | Plan, reason: str, shape: str, x: torch.Tensor, linears: int
) -> None:
    """Counts a call. Skipped while compiling: a trace is not a call."""
    count((operation, backend, reason, shape, x.dtype, x.device, linears))


def count(key: tuple, choice: Choice | None = None) -> Choice | None:
    """Counts a call of (operation, backend, reason, shape, dtype, device, linears); `choice`: what
    the last count of it returned.
    """
    if torch.compiler.is_compiling():
        return None
    if choice is None or choice.record is not _taken:
        choice = _taken.get(key)
    if choice is None:
        operation, backend, reason, shape, dtype, device, linears = key
        words = str(dtype).removeprefix("torch."), str(device)
        choice = Choice(operation, str(backend), reason, shape, *words, linears)
        choice.record = _taken
        _taken[key] = choice
    choice.calls += 1
    return choice


def forced() -> int | None:
    """What tells the forced plan from others; None without one."""
    return None if _forced is None else _forced_number


def explain(clear: bool = False) -> list[Choice]:
    """The paths taken so far in this process, in the order they first ran; `clear` empties the
    record afterwards.
    """
    global _taken
    choices = list(_taken.values())
    if clear:
        _taken = {}
    return choices
