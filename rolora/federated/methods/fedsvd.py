"""FedSVD: B trains in every round; the server re-factors B A by SVD, so that A's rows are
orthonormal and follow what was learnt.

Lee et al., NeurIPS 2025. Here `A ← Vᵀ, B ← U S` is a turn of both factors (the row space of A is
that of Vᵀ), so an r × r matrix for each travels down in the place of A: d r + 2 r² numbers, not 2 d
r.
"""

from __future__ import annotations

from torch import Tensor

from rolora.federated import turn as turns
from rolora.federated.layout import Layout


def phase(round: int, schedule: str) -> str:
    return "B"


def turn(layout: Layout, published: dict[str, Tensor]) -> dict[str, Tensor] | None:
    return turns.singular(layout, published)
