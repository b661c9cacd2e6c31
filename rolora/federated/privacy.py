"""Client-level differential privacy: DP-FedAvg on the travelling factor (McMahan et al., ICLR
2018), and its accountant.

Every accepted change is clipped to an L2 norm of C on the server, after decoding; the sum gets
Gaussian noise of standard deviation z·C and is divided by the planned cohort, not by who answered.
Neighbours differ by one client's whole participation. Rounds of both phases are charged alike: each
releases one noisy sum. Amplification is claimed for Poisson sampling only.

The sum is in fixed point and so is the noise: rounding a Gaussian onto the grid that the sum lies
on anyway is post-processing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rolora.federated import sampling
from rolora.federated.layout import Layout
from rolora_kernels.exact_sum import ExactSum

_ORDERS = (*range(2, 65), *range(68, 257, 4), 320, 384, 512, 768, 1024)


@dataclass(frozen=True)
class Privacy:
    """Clip norm C, noise multiplier z, δ, and each client's probability of being asked in a round
    (1.0: no amplification).
    """

    clip: float
    noise: float
    delta: float
    probability: float

    def epsilon(self, rounds: int) -> float:
        """ε at δ after so many rounds; infinite without noise."""
        return epsilon(self.noise, self.probability, rounds, self.delta)


class PrivateMean:
    """(Σ clip(Δ) + N(0, (z·C)²)) / planned; the noise is keyed by (secret, round)."""

    def __init__(
        self,
        privacy: Privacy,
        planned: int,
        most: int,
        secret: str,
        number: int,
        layout: Layout,
        phase: str,
    ):
        self.privacy, self.planned, self.layout, self.phase = privacy, planned, layout, phase
        self.key = ("noise", secret, number)
        room = most + math.ceil(
            40 * privacy.noise
        )  # so that the noise cannot overflow the sum either
        self.sum = ExactSum(layout.travelling_size(phase), privacy.clip, 1, room)

    def add(self, client: int, change: Tensor, weight: int) -> None:
        self.sum.add(clipped(change, self.privacy.clip), 1)

    def finish(self) -> dict[str, Tensor]:
        total, deviation = (
            self.sum.total,
            math.ldexp(self.privacy.noise * self.privacy.clip, -self.sum.exponent),
        )
        noise = (
            sampling.generator(*self.key).normal(0.0, deviation, len(total))
            if deviation
            else np.zeros(len(total))
        )
        total.add_(torch.from_numpy(np.rint(noise).astype(np.int64)))
        return self.layout.part(self.sum.over(self.planned), self.phase)


def clipped(change: Tensor, norm: float) -> Tensor:
    """The change, scaled down to an L2 norm of at most `norm`."""
    length = torch.linalg.vector_norm(change, dtype=torch.float64).item()
    # 1e-6: what rounding to fp32 and to the sum's grid could add back
    return change if length <= norm else change * (norm * (1 - 1e-6) / length)


def epsilon(noise: float, probability: float, rounds: int, delta: float) -> float:
    """ε at δ of `rounds` compositions of the Poisson-sampled Gaussian mechanism, by Rényi
    divergence at integer orders (Mironov, Talwar and Zhang 2019, eq. 6 and Theorem 11), converted
    as Canonne, Kamath and Steinke 2020, Proposition 12.
    """
    if rounds == 0:
        return 0.0
    if noise == 0.0:
        return math.inf
    best = math.inf
    for order in _ORDERS:
        divergence = rounds * renyi(noise, probability, order)
        best = min(
            best, divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        )
    return max(best, 0.0)


def renyi(noise: float, probability: float, order: int) -> float:
    """D_order of one round, in nats."""
    if probability == 1.0:
        return order / (2 * noise**2)
    terms = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + (order - k) * math.log1p(-probability)
        + k * math.log(probability)
        + k * (k - 1) / (2 * noise**2)
        for k in range(order + 1)
    ]
    largest = max(terms)
    return (largest + math.log(sum(math.exp(t - largest) for t in terms))) / (order - 1)
