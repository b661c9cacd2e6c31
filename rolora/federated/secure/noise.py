"""Differential privacy under masks: every client adds its share of the noise before it masks.

A client clips its change to an L2 norm of C, rounds it to whole steps and adds a discrete Gaussian
number of steps to each value (Canonne, Kamath and Steinke, NeurIPS 2020). The sum of at least
`threshold` clients then has a deviation of at least z·C, as `--dp-noise z` asks, and nobody ever
holds it without. A sum of discrete Gaussians is no discrete Gaussian, but at 2**22 steps and more
the two differ by less than exp(-2**40) (Kairouz, Liu and Steinke, ICML 2021, Theorem 1), so a
round is charged as the central mechanism's is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rolora.federated.aggregate import Mean
from rolora.federated.layout import Layout
from rolora_kernels.exact_sum import ExactSum

_BITS = 23  # the deviation of a client's noise is 2**22 to 2**23 steps
_FARTHEST = 36  # deviations at which a draw is dropped; the chance of one is below exp(-600)
_AT_ONCE = 1 << 16  # values drawn at a time
Entropy = Callable[[int], bytes]


@dataclass(frozen=True)
class ClientNoise:
    """What a client does to its change. `exponent`: a step is 2**exponent; `sigma`: the deviation
    of its noise, in steps.
    """

    clip: float
    exponent: int
    sigma: int

    @classmethod
    def of(cls, clip: float, noise: float, threshold: int) -> ClientNoise:
        """The noise of one client where `threshold` of them make up a deviation of noise · clip."""
        own = noise * clip / math.sqrt(threshold)
        exponent = math.frexp(own or clip)[1] - _BITS
        return cls(clip, exponent, math.ceil(math.ldexp(own, -exponent)))

    def protected(self, change: Tensor, entropy: Entropy = os.urandom) -> Tensor:
        """fp32 `[n]` → int64 `[n]` steps: clipped, rounded, noisy. Raises ValueError for a change
        that is not finite.
        """
        if not change.isfinite().all():
            raise ValueError("the change holds NaN or Inf")
        steps = np.ldexp(change.double().numpy(), -self.exponent)
        # Rounding may add half a step to every value: what is left is the norm's to have.
        most = math.ldexp(self.clip, -self.exponent) - 0.5 * math.sqrt(len(steps))
        norm = float(np.linalg.norm(steps))
        if norm > most:
            steps *= max(most, 0.0) / norm * (1 - 1e-12)
        whole = np.rint(steps).astype(np.int64)
        return torch.from_numpy(whole + discrete_gaussian(self.sigma, len(whole), entropy))


class NoisyMean(Mean):
    """The masked sum of protected changes over the planned cohort."""

    def __init__(self, noise: ClientNoise, planned: int, most: int, layout: Layout, phase: str):
        self.layout, self.phase, self.planned = layout, phase, planned
        self.sum = ExactSum(layout.travelling_size(phase), noise.clip, 1, most)
        assert noise.exponent >= self.sum.exponent, "there is room for the sum in coarser steps"
        self.sum.exponent = noise.exponent
        self.slack = _FARTHEST * noise.sigma * most

    def finish(self) -> dict[str, Tensor]:
        return self.layout.part(self.sum.over(self.planned), self.phase)


def discrete_gaussian(sigma: int, count: int, entropy: Entropy = os.urandom) -> np.ndarray:
    """int64 `[count]`: x with probability proportional to exp(-x² / 2σ²), exactly, by integers
    alone (Canonne, Kamath and Steinke 2020, Algorithm 3), σ at most 2**23.
    """
    if not 0 <= sigma <= 1 << _BITS:
        raise ValueError(f"a deviation of {sigma} steps, expected 0 to {1 << _BITS}")
    if sigma == 0:
        return np.zeros(count, np.int64)
    parts: list[np.ndarray] = []
    missing = count
    while missing > 0:
        drawn = _some(sigma, min(2 * missing + 16, _AT_ONCE), entropy)
        parts.append(drawn[:missing])
        missing -= len(parts[-1])
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _some(sigma: int, tries: int, entropy: Entropy) -> np.ndarray:
    """The draws that are kept, of so many of discrete Laplace numbers of scale σ."""
    low = _below(np.full(tries, sigma), entropy)
    low = low[_bernoulli_exp(low, sigma, entropy)]
    high = np.zeros(len(low), np.int64)
    going = np.arange(len(low))
    while len(going):
        going = going[_bernoulli_exp(np.ones(len(going), np.int64), 1, entropy)]
        high[going] += 1
    size, negative = low + sigma * high, _below(np.full(len(low), 2), entropy) == 1
    kept = ~(negative & (size == 0)) & (size < _FARTHEST * sigma)
    size, negative = size[kept], negative[kept]
    over, twice = (size - sigma) ** 2, 2 * sigma**2
    kept = _bernoulli_exp(over % twice, twice, entropy)
    ones = over // twice
    for number in range(int(ones.max(initial=0))):
        due = np.flatnonzero(kept & (ones > number))
        kept[due] = _bernoulli_exp(np.ones(len(due), np.int64), 1, entropy)
    return np.where(negative, -size, size)[kept]


def _bernoulli_exp(above: np.ndarray, below: int, entropy: Entropy) -> np.ndarray:
    """bool `[n]`, true with probability exp(-above / below), 0 ≤ above ≤ below."""
    count = np.ones(len(above), np.int64)
    going = np.arange(len(above))
    while len(going):
        drawn = _below(below * count[going], entropy)
        going = going[drawn < above[going]]
        count[going] += 1
    return count % 2 == 1


def _below(most: np.ndarray, entropy: Entropy) -> np.ndarray:
    """Uniform whole numbers from 0 to `most` - 1, int64 `[n]`; `most` is below 2**62."""
    found = np.zeros(len(most), np.int64)
    going = np.arange(len(most))
    while len(going):
        words = np.frombuffer(entropy(8 * len(going)), "<u8") >> np.uint64(1)
        words = words.astype(np.int64)
        limit = (2**63 - 1) // most[going] * most[going]  # a multiple: what is over it is unfair
        fair = words < limit
        found[going[fair]] = words[fair] % most[going[fair]]
        going = going[~fair]
    return found
