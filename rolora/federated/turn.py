"""Re-factoring between rounds: `B A = (B G⁻¹)(G A)` for any invertible r × r `G`, so the factors
may turn while the model stays.

What a round trains in the next phase depends on the factor that is frozen then: a frozen factor
with very unequal directions makes steps of very unequal size. The server computes G and its inverse
in fp64 from the published factors and sends both; every peer applies them by the same additions in
the same order (`turned`), so that all get the same bits, which a QR of its own would not give.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rolora.federated.layout import Layout

_WORST_CONDITION = 1e6  # beyond it an adapter is left as it is
_LEAST_DIRECTION = 1e-7  # of the largest singular value: less is the rounding of fp32 factors


def turned(layout: Layout, kind: str, flat: Tensor, turn: Tensor) -> Tensor:
    """The buffer of kind "A" or "B" after a turn: `A ← G A`, `B ← B H` for every adapter; new fp32.

    turn: fp64, the r × r matrices of all adapters, one after another, in the layout's order. Σ_j of
    products rounded one by one, in index order, in fp64, and one rounding to fp32 at the end: the
    same bits on every machine.
    """
    result = torch.empty_like(flat)
    old, new = layout.views({kind: flat}, kind), layout.views({kind: result}, kind)
    for path, matrix in matrices(layout, turn).items():
        rows = old[path].double() if kind == "A" else old[path].double().t()  # [r, K] or [r, N]
        G = matrix if kind == "A" else matrix.t()
        total = G[:, :1] * rows[0]
        for j in range(1, len(rows)):
            total = total + G[:, j : j + 1] * rows[j]
        new[path].copy_(total if kind == "A" else total.t())
    return result


def matrices(layout: Layout, turn: Tensor) -> dict[str, Tensor]:
    """path → r × r view of a turn's buffer."""
    ranks = {entry.path: entry.shape[0] for entry in layout.entries if entry.kind == "A"}
    parts = turn.split([rank * rank for rank in ranks.values()])
    return {
        path: part.view(rank, rank) for (path, rank), part in zip(ranks.items(), parts, strict=True)
    }


def length(layout: Layout) -> int:
    """Numbers in a turn's buffer."""
    return sum(entry.shape[0] ** 2 for entry in layout.entries if entry.kind == "A")


def balanced(layout: Layout, published: dict[str, Tensor], frozen: str) -> dict[str, Tensor] | None:
    """The turn that makes the factor `frozen` orthonormal up to one scalar before it is frozen (the
    balanced hand-over).

    With B = Q R and c = ‖B‖_F / √r: `B ← c Q, A ← R A / c`; for A the mirror image. It restores the
    normalisation that the theory's Algorithm 2 has and Algorithm 1 dropped (Chen et al., NeurIPS
    2025). An adapter with c = 0 or a condition number over 1e6 is left as it is; None where all
    are.
    """

    def turn(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
        tall = B if frozen == "B" else A.t()
        R, scale = _triangle(tall), torch.linalg.matrix_norm(tall) / tall.shape[1] ** 0.5
        if not _usable(R):
            return None
        G = R / scale  # of the other factor
        inverse = scale * torch.linalg.solve_triangular(
            R, torch.eye(len(R), dtype=R.dtype), upper=True
        )
        return (G, inverse) if frozen == "B" else (inverse.t(), G.t())

    return _collected(layout, published, turn)


def singular(layout: Layout, published: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The turn to `A ← Vᵀ, B ← U S` with `B A = U S Vᵀ` (FedSVD); None where every B is zero."""

    def turn(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
        found = _halves(A, B)
        return None if found is None else found[:2]

    return _collected(layout, published, turn)


def equal(layout: Layout, published: dict[str, Tensor], frozen: str) -> dict[str, Tensor] | None:
    """The turn to `A ← √S Vᵀ, B ← U √S` with `B A = U S Vᵀ`, as FlexLoRA splits its mean product
    (Bai et al., NeurIPS 2024): `Bᵀ B = A Aᵀ = S`. Whichever is `frozen`, it is the same.

    An adapter whose product has fewer directions than the rank (B is zero, or a singular value is
    under 1e-7 of the largest) is left as it is; None where all are.
    """

    def turn(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
        found = _halves(A, B)
        if found is None or found[2][-1] < _LEAST_DIRECTION * found[2][0]:
            return None
        G, inverse, values = found
        root = values.sqrt()
        return root[:, None] * G, inverse / root

    return _collected(layout, published, turn)


def _collected(
    layout: Layout,
    published: dict[str, Tensor],
    turn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None],
) -> dict[str, Tensor] | None:
    """The turns of all adapters as two buffers; the identity where one is left as it is."""
    A_of, B_of = layout.views(published, "A"), layout.views(published, "B")
    pairs = [
        # A rank over a side of the matrix leaves no turn to choose.
        turn(A.double(), B_of[path].double())
        if len(A) <= min(A.shape[1], len(B_of[path]))
        else None
        for path, A in A_of.items()
    ]
    if all(pair is None for pair in pairs):
        return None
    ones = [torch.eye(len(A), dtype=torch.float64) for A in A_of.values()]
    both = [pair or (one, one) for pair, one in zip(pairs, ones, strict=True)]
    return {kind: torch.cat([pair[i].reshape(-1) for pair in both]) for i, kind in enumerate("AB")}


def _halves(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """G, G⁻¹ and S `[r]`, falling, with `G A = Vᵀ` and `B G⁻¹ = U S`; None where B is zero or A has
    fewer directions than rows.

    The row space of A is Vᵀ's: with A = L Q and the SVD of `B L = (U S) V'ᵀ`, G is V'ᵀ L⁻¹ and its
    inverse L V'. Signs are fixed (the largest element of each column of G⁻¹ is positive).
    """
    L = _triangle(A.t()).t()
    if not _usable(L) or not B.any():
        return None
    _, values, Vt = torch.linalg.svd(_triangle(B) @ L)
    H = L @ Vt.t()
    signs = torch.gather(H, 0, H.abs().argmax(0, keepdim=True)).sign()
    G = torch.linalg.solve_triangular(L, Vt.contiguous(), upper=False, left=False)
    return signs.t() * G, H * signs, values


def _triangle(tall: Tensor) -> Tensor:
    """R of `tall = Q R` with a diagonal that is not negative, so that a nearly orthonormal factor
    hardly turns.
    """
    R = torch.linalg.qr(tall, mode="r").R
    signs = R.diagonal().sign()
    return R * torch.where(signs == 0, 1.0, signs)[:, None]


def _usable(R: Tensor) -> bool:
    if not R.isfinite().all() or not R.any():
        return False
    values = torch.linalg.svdvals(R)
    return bool(values[-1] * _WORST_CONDITION >= values[0])
