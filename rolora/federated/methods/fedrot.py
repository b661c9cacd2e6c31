"""FedRot-LoRA: both factors are averaged after each client's have been turned towards the
published ones, which leaves their product as it is.

Zhang et al., ICML 2026 (arXiv 2602.23638). `B_i A_i = (B_i R)(Rᵀ A_i)` for every rotation R: the
one that fits a factor best to the published one is the orthogonal Procrustes solution, `R = U Vᵀ`
with `U S Vᵀ = A_i Aᵀ` (or `B_iᵀ B`) and determinant 1. Even rounds fit A, odd ones B; the first is
left as it is, because B was zero. SOFTNESS below 1 goes that part of the way from no turn to R,
made orthogonal again.

Theirs turns on the client, before the wire; here the server does, after it, by what it publishes
anyway, so that clients need not know the method. The two differ by the wire's rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rolora.federated.guard import Rejected

if TYPE_CHECKING:
    from rolora.federated.methods import Context

SOFTNESS = 1.0  # λ; 1 is the whole rotation, as in their experiments


def phase(round: int, schedule: str) -> str:
    return "BOTH"


def transform(context: Context, client: int, change: Tensor) -> Tensor:
    """The change of a client whose factors are turned towards the published ones."""
    number = context.state.round + 1
    if number == 1:
        return change
    layout, published = context.layout, context.state.published
    aligned = change.clone()
    parts, kinds = layout.part(aligned, "BOTH"), ("A", "B")
    start = {kind: layout.views(published, kind) for kind in kinds}
    moved = {kind: layout.views(parts, kind) for kind in kinds}
    for path in start["A"]:
        A, B = (start[kind][path].double() for kind in kinds)
        own_A, own_B = A + moved["A"][path].double(), B + moved["B"][path].double()
        R = rotation(own_A @ A.t() if number % 2 == 0 else own_B.t() @ B, SOFTNESS)
        moved["A"][path].copy_(R.t() @ own_A - A)
        moved["B"][path].copy_(own_B @ R - B)
    if aligned.abs().max() > context.max_abs:  # no client's factors end the round of all
        raise Rejected("over the bound", f"turned, an element is over {context.max_abs:g}")
    return aligned


def rotation(correlation: Tensor, softness: float) -> Tensor:
    """The rotation R (determinant 1) with the largest `tr(Rᵀ correlation)`, fp64 `[r, r]`, or the
    orthogonal matrix nearest to `(1 − softness) I + softness R`.
    """
    R = _orthogonal(correlation)
    if softness < 1.0:
        R = _orthogonal(torch.lerp(torch.eye(len(R), dtype=R.dtype), R, softness))
    return R


def _orthogonal(matrix: Tensor) -> Tensor:
    U, _, Vt = torch.linalg.svd(matrix)
    if torch.linalg.det(U @ Vt) < 0:
        U[:, -1] = -U[:, -1]  # of the smallest singular value, where it costs least
    return U @ Vt
