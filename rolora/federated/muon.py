"""Muon on the factor that trains (LoRA-Muon, arXiv 2606.12921): a step that is as long in every
direction in which the factor can move the product.

With F the factor that rests, `[r, K]` (A, or Bᵀ), and G the gradient of the other one, `[N, r]`:

    M ← μ M + G,    step = −ρ · msign(M S) S,    S = c (F Fᵀ)^−½,    msign(X) = X (Xᵀ X)^−½

where c = ‖F‖ / √r. It is the steepest descent along M among steps D with `‖D F‖₂ ≤ ρ c`, and where
F is orthonormal it is Muon itself (S = I). ρ is the rate times `.2 · √max(N, r)`, which is
torch.optim.Muon's "match_rms_adamw": an entry moves about as far as by AdamW, whose rates fit. What
travels beside the factor, a head, is trained by AdamW. Directions in which F or M is zero are left
alone. No second moments, and no bytes on the wire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_MOMENTUM = 0.95
_LIKE_ADAMW = 0.2  # root mean square of an AdamW step over its rate, about
_LEAST = 1e-10  # of the largest eigenvalue: smaller ones are rounding


class Muon(torch.optim.Optimizer):
    """Over one kind of factor, `[…, N, r]` for B and `[…, r, K]` for A.

    frozen: the factors that rest, one for each, as the layers have them; they may lack leading
    axes.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        kind: str,
        frozen: Sequence[Tensor],
        lr: float,
        weight_decay: float = 0.0,
    ):
        super().__init__(list(parameters), {"lr": lr, "weight_decay": weight_decay})
        self.upright = kind == "B"
        self.scales = [_whitening(F.detach() if self.upright else F.detach().mT) for F in frozen]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        for p, S in zip(group["params"], self.scales, strict=True):
            if p.grad is None:
                continue
            gradient = p.grad if self.upright else p.grad.mT
            state = self.state[p]
            moment = state["moment"] = _MOMENTUM * state.get("moment", 0.0) + gradient
            step = (_sign(moment.double() @ S) @ S).to(p)
            size = group["lr"] * _LIKE_ADAMW * max(step.shape[-2:]) ** 0.5
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(step if self.upright else step.mT, alpha=size)


class Beside(torch.optim.Optimizer):
    """Muon on the factor, AdamW on what travels beside it."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        self.param_groups = [group for one in optimizers for group in one.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for one in self.optimizers:
            one.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for one in self.optimizers:
            one.zero_grad(set_to_none)


def build(
    by_kind: Mapping[str, Sequence[Tensor]],
    frozen: Mapping[str, Sequence[Tensor]],
    lr: Mapping[str, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimizer of a round that trains the kinds of `by_kind`, each at its rate;
    `frozen[kind]`: what rests beside a factor of that kind.
    """
    made: list[torch.optim.Optimizer] = []
    for kind, parameters in by_kind.items():
        if kind in frozen:
            made.append(Muon(parameters, kind, frozen[kind], lr[kind], weight_decay))
        else:
            made.append(torch.optim.AdamW(list(parameters), lr=lr[kind], weight_decay=weight_decay))
    return Beside(*made)


def _whitening(F: Tensor) -> Tensor:
    """S fp64 `[…, r, r]` of F `[…, r, K]`."""
    F = F.double()
    c = torch.linalg.matrix_norm(F)[..., None, None] / F.shape[-2] ** 0.5
    return c * _inverse_root(F @ F.mT)


def _sign(X: Tensor) -> Tensor:
    """`X (Xᵀ X)^−½`: the singular values of X, those that are not zero, become 1."""
    return X @ _inverse_root(X.mT @ X)


def _inverse_root(gram: Tensor) -> Tensor:
    """The pseudo-inverse of the root of a symmetric `[…, r, r]`."""
    values, vectors = torch.linalg.eigh(gram)
    least = _LEAST * values[..., -1:]
    roots = torch.where(values > least, values.clamp(min=1e-300).rsqrt(), 0.0)
    return (vectors * roots[..., None, :]) @ vectors.mT
