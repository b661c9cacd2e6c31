"""How asynchronous rounds are run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Buffered:
    """`size`: answers that end a round. `exponent`, `limit`: what an answer counts that is s rounds
    old, and how old one may be (None: any age).
    """

    size: int
    exponent: float = 0.5
    limit: int | None = None

    def weight(self, staleness: int) -> float:
        """`(1 + s)^-exponent` (Xie et al. 2019; ½ by Nguyen et al. 2022); 1 for a fresh answer."""
        return (1.0 + staleness) ** -self.exponent

    def is_too_old(self, staleness: int) -> bool:
        return self.limit is not None and staleness > self.limit
