"""Client-level differential privacy: DP-FedAvg on the travelling factor (McMahan et al., ICLR
2018), and its accountant.

Every accepted change is clipped to an L2 norm of C on the server, after decoding; the sum gets
Gaussian noise of standard deviation z·C and is divided by the planned cohort, not by who answered.
Neighbours differ by one client's whole participation. Rounds of both phases are charged alike: each
releases one noisy sum. Amplification is claimed for Poisson sampling only.

Noise is never used twice: it comes from the operating system at every release, and a round that
runs again is charged again (`ledger`).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rolora.federated.layout import Layout
from rolora_kernels.exact_sum import ExactSum

_ORDERS = (*range(2, 65), *range(68, 257, 4), 320, 384, 512, 768, 1024)
_GRID_BITS = 31  # the grid is 2⁻³⁰ to 2⁻³¹ of the noise's deviation
_LEAST_NOISE, _MOST_NOISE = 1e-3, 1e6  # between which a multiplier is looked for
_NOISE_CHUNK = 1 << 18  # values drawn at a time


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
        """ε at δ after so many releases; infinite without noise."""
        return epsilon(self.noise, self.probability, rounds, self.delta)


class PrivateMean:
    """(Σ clip(Δ) + N(0, (z·C)²)) / planned.

    The noise is drawn from the operating system's generator and kept nowhere. It is added once, by
    the process that leads; every process then rounds the noisy sum to a grid of 2⁻³⁰ of its
    deviation, so that the low bits of the fixed-point sum, which noise in floating point does not
    reach, say nothing.
    """

    def __init__(self, privacy: Privacy, planned: int, most: int, layout: Layout, phase: str):
        self.privacy, self.planned, self.layout, self.phase = privacy, planned, layout, phase
        # So that the noise cannot overflow the sum either.
        room = most + math.ceil(40 * privacy.noise)
        self.sum = ExactSum(layout.travelling_size(phase), privacy.clip, 1, room)
        self.deviation = math.ldexp(privacy.noise * privacy.clip, -self.sum.exponent)

    @property
    def grid(self) -> int:
        """What the released sum is a multiple of, in units of the fixed-point sum."""
        return 1 << max(0, math.frexp(self.deviation)[1] - _GRID_BITS)

    def add(self, client: int, change: Tensor, weight: int) -> None:
        self.sum.add(clipped(change, self.privacy.clip), 1)

    def add_noise(self, entropy: Callable[[int], bytes] = os.urandom) -> None:
        """Once a release. `entropy(n)`: n unpredictable bytes."""
        if self.deviation == 0.0:
            return
        for part in self.sum.total.split(_NOISE_CHUNK):
            drawn = self.deviation * normals(len(part), entropy)
            part.add_(torch.from_numpy(np.rint(drawn).astype(np.int64)))

    def finish(self) -> dict[str, Tensor]:
        half = self.grid // 2
        steps = torch.div(self.sum.total + half, self.grid, rounding_mode="floor")
        self.sum.total = steps * self.grid
        return self.layout.part(self.sum.over(self.planned), self.phase)


def normals(count: int, entropy: Callable[[int], bytes] = os.urandom) -> np.ndarray:
    """Standard normal numbers, fp64 `[count]`, by Box and Muller's transform of 53-bit uniform
    ones. The largest is 8.6: what lies beyond has a probability of 10⁻¹⁷.
    """
    half = (count + 1) // 2
    bits = np.frombuffer(entropy(16 * half), dtype="<u8").reshape(2, half) >> np.uint64(11)
    radius = np.sqrt(-2 * np.log((bits[0] + 1.0) * 2.0**-53))
    angle = 2 * np.pi * (bits[1] * 2.0**-53)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


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


def smallest_noise(target: float, probability: float, rounds: int, delta: float) -> float:
    """The least noise multiplier, to a part in a million, by which `rounds` releases spend an ε of
    at most `target` at δ.

    Raises ValueError where more noise does not help: at δ the accountant's orders have a least ε.
    """

    def spends_too_much(noise: float) -> bool:
        return epsilon(noise, probability, rounds, delta) > target

    if spends_too_much(_MOST_NOISE):
        least = epsilon(_MOST_NOISE, probability, rounds, delta)
        digit = 10.0 ** (math.floor(math.log10(least)) - 1)  # the second, rounded up
        least = math.ceil(least / digit) * digit
        raise ValueError(f"expected at least {least:.2g} at --dp-delta {delta:g}")
    high = 1.0
    while spends_too_much(high):
        high *= 2
    while high > _LEAST_NOISE and not spends_too_much(high / 2):
        high /= 2
    low = high / 2
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if spends_too_much(middle) else (low, middle)
    return high


@functools.lru_cache(maxsize=4096)  # ε is told in every round, of the same divergences
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
