"""The five operations that the autograd rule is made of, and who computes them.

    shrink(x, A, dropout)                          → S  [M, R]                 S = drop(x) Aᵀ
    expand_base(x, W, S, B, scaling, bias)         → y  [M, N]                 y = x Wᵀ + bias + scaling · S Bᵀ
    grads_of_dy(dy, B, S, scaling, T)              → T  [M, r], dB fp32 [N, r] T = scaling · dy B,  dB = scaling · dyᵀ S
    base_dx(dys, weights, T, A, dropout)           → dx [M, K]                 dx = Σ_g dy_g W_g + drop(T A)
    grad_A(T, x, dropout)                          → dA fp32 [R, K]            dA = Tᵀ drop(x)

x [M, K], W [N, K], A [R, K], B [N, r] in one dtype; R is the sum of the ranks of a group. `rank_buffer(like, R)` is an empty
[M, R] for T in the memory order that the backend likes. A backend is a module with these six functions.
"""

from __future__ import annotations

from types import ModuleType

from rolora_kernels import torch_ops


def of(backend: str) -> ModuleType:
    """The module that computes for a backend: vendor libraries, or our kernels (imported here only, so that a machine without
    Triton can do without)."""
    if backend == "torch":
        return torch_ops
    from rolora_kernels import triton_ops

    return triton_ops
