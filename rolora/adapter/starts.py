"""How factors start: B at zero and a drawn A, or the largest singular vectors of the weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora")
OF_THE_WEIGHT = ("pissa", "olora")  # what they make of x is taken off again by a term


def check(init: str, rank: int, alpha: float, dropout: float, shape: tuple[int, int]) -> None:
    """Raises ValueError for what no layer over a weight `[out, in]` can start with."""
    smaller = min(shape)
    if rank < 1 or (init in OF_THE_WEIGHT and rank > smaller):
        most = f"1 to {smaller}" if init in OF_THE_WEIGHT else "1 or more"
        raise ValueError(f"rank {rank} does not fit a {shape[0]}x{shape[1]} linear: give {most}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must lie in [0, 1], got {dropout}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")


def drawn(init: str, rank: int, in_features: int, generator: torch.Generator | None) -> Tensor:
    """A fresh A fp32 `[rank, in]`, drawn on the CPU so that every machine draws the same."""
    A = torch.empty(rank, in_features)
    if init == "kaiming":  # a = sqrt(5), as in PEFT: uniform in ±1/sqrt(in)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    elif init == "gaussian":
        nn.init.normal_(A, std=1 / rank, generator=generator)
    else:
        nn.init.orthogonal_(A, generator=generator)
    return A


def of_weight(init: str, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """(A `[rank, in]`, B `[out, rank]`) made of a fp32 weight `[out, in]`, as PEFT makes them.

    "pissa" (Meng et al., NeurIPS 2024): `scaling · B A` is the best approximation, each factor with
    the root of the singular values, by a full SVD. "olora" (Büyükakyüz 2024): the first columns of
    Q and rows of R.
    """
    if init == "olora":
        Q, R = torch.linalg.qr(weight)
        return R[:rank], Q[:, :rank]
    U, values, Vt = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scaling).sqrt()
    return root[:, None] * Vt[:rank], U[:, :rank] * root
