"""What one factor can say of a change that moved both.

A client that trained A and B from (A, B) to (A', B') moved the product by `D = B' A' − B A`. In a
round that sends B it sends the change of B that does the most of D: the ΔB of

    min  ‖ΔB A − D‖² + δ ‖ΔB − (B' − B)‖²,   ΔB = B' − B + B' (A' − A) Aᵀ (A Aᵀ + δ I)⁻¹

and in a round that sends A the mirror image. A change is linear in ΔB, so that the mean of what is
sent is exact, and its bytes are those of one factor. Where A did not move it is RoLoRA's change,
for every δ. Without δ it is the projection of AltLoRA (NeurIPS 2025), which asks the impossible of
a factor that is nearly zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rolora.federated.layout import Layout
from rolora.federated.local import RESTING

_DAMPING = 0.1  # δ over the mean eigenvalue of F Fᵀ


def sent(
    layout: Layout,
    phase: str,
    held: dict[str, Tensor],
    trained: Mapping[str, Sequence[Tensor]],
) -> list[Tensor]:
    """What travels after training, in the order of a message: the factor `projected`, and a head as
    it is. trained: kind → tensors.
    """
    factor = projected(layout, phase, held, trained[phase], trained[RESTING[phase]])
    return [*factor, *trained.get("head", ())]


def projected(
    layout: Layout,
    phase: str,
    held: dict[str, Tensor],
    trained: Sequence[Tensor],
    beside: Sequence[Tensor],
) -> list[Tensor]:
    """The factor `phase`, as tensors of the layout's, whose change from `held` is ΔB or ΔA.

    trained: that factor after training, beside: the other one, both as `Layout.parameters` has
    them. fp64 within, fp32 out.
    """
    resting = list(layout.views(held, RESTING[phase]).values())
    mine = layout.split(list(trained), (phase,))
    theirs = layout.split(list(beside), (RESTING[phase],))
    return [
        _projected(phase, own, before, after)
        for own, before, after in zip(mine, resting, theirs, strict=True)
    ]


def _projected(phase: str, own: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """B' + ΔB − (B' − B) of one adapter, or A's: `own` moved by what its partner's move says."""
    F, G, mine = (
        matrix.double() if phase == "B" else matrix.double().t() for matrix in (before, after, own)
    )  # F, G: [r, K], the partner before and after; mine: [N, r]
    gram = F @ F.t()
    mean = gram.diagonal().mean()
    if mean == 0:
        return own
    gram.diagonal().add_(_DAMPING * mean)
    moved = torch.linalg.solve(gram, F @ (G - F).t()).t()  # (A' − A) Aᵀ (A Aᵀ + δ I)⁻¹
    whole = mine + mine @ moved
    return (whole if phase == "B" else whole.t()).to(own.dtype)
