"""The five operations that the autograd rule is made of, and who computes them.

    shrink(x, A, dropout)                          → S  [M, R]                 S = drop(x) Aᵀ
    expand_base(x, W, S, B, scaling, bias)         → y  [M, N]                 y = x Wᵀ + bias +
    scaling · S Bᵀ
    grads_of_dy(dy, B, S, scaling, T)              → T  [M, r], dB fp32 [N, r] T = scaling · dy B,
    dB = scaling · dyᵀ S
    base_dx(dys, weights, T, A, dropout)           → dx [M, K]                 dx = Σ_g dy_g W_g +
    drop(T A)
    grad_A(T, x, dropout)                          → dA fp32 [R, K]            dA = Tᵀ drop(x)

x [M, K], W [N, K] in one dtype, A [R, K], B [N, r] as `factor(A, dtype)` gives them; R is the sum
of the ranks of a group. `rank_buffer(like, R)` is an empty [M, R] for T in the memory order that
the backend likes. A backend is a module with these seven functions.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType, SimpleNamespace

import torch

from rolora_kernels import torch_ops

NAMES = ("shrink", "expand_base", "grads_of_dy", "base_dx", "grad_A")
WITH_TMA = ("expand_base", "base_dx")


def of(backend: str) -> ModuleType | SimpleNamespace:
    """What computes for a backend: "torch" (vendor libraries), "triton" (our kernels), or
    "triton[shrink,base_dx:tma]": our kernels for the primitives named, vendor libraries for the
    others. Triton is imported only where it is used, and compiled code gets our kernels as
    `torch.library` operators.
    """
    if backend == "torch":
        return torch_ops
    key = backend, torch.compiler.is_compiling()
    if key not in _with_ours:
        _with_ours[key] = _build(*key)
    return _with_ours[key]


_with_ours: dict[tuple[str, bool], SimpleNamespace] = {}


def _build(backend: str, compiling: bool) -> SimpleNamespace:
    if compiling:
        from rolora_kernels.triton_ops import library as ours
    else:
        from rolora_kernels import triton_ops as ours
    names = dict.fromkeys(NAMES, "triton") if backend == "triton" else mixture(backend)
    chosen = {name: getattr(ours if name in names else torch_ops, name) for name in NAMES}
    chosen |= {
        name: partial(chosen[name], tma=True) for name, kind in names.items() if kind == "tma"
    }
    # A mixture rounds factors beforehand, because vendor libraries take operands of one dtype only.
    return SimpleNamespace(
        **chosen,
        rank_buffer=(ours if "grads_of_dy" in names else torch_ops).rank_buffer,
        factor=(ours if names.keys() == set(NAMES) else torch_ops).factor,
    )


def prepare(backend: str) -> None:
    """Builds what `of` needs, so that a trace finds it made."""
    for compiling in (False, True):
        _with_ours.setdefault((backend, compiling), _build(backend, compiling))


def mixture(backend: str) -> dict[str, str]:
    """primitive -> "triton" or "tma" for those that a "triton[…]" backend takes from our kernels;
    ValueError for another text.
    """
    parts = [
        part.partition(":") for part in backend.removeprefix("triton[").removesuffix("]").split(",")
    ]
    known = all(
        name in (*NAMES, "dequantise") and (kind == "" or (kind == "tma" and name in WITH_TMA))
        for name, _, kind in parts
    )
    if not (backend.startswith("triton[") and backend.endswith("]") and known):
        raise ValueError(
            f"backend {backend!r} is not torch, triton, reference or triton[…] with names of "
            f"{', '.join(NAMES)}, dequantise "
            f"({' and '.join(WITH_TMA)} also with :tma)"
        )
    return {name: kind or "triton" for name, _, kind in parts}
