"""Shamir's secret sharing of 32 bytes over the prime field of 2**521 - 1 (Shamir, CACM 1979).

Any `threshold` shares give the secret, fewer say nothing. Ours, because a server joins many secrets
from the shares of one set of clients: their coefficients are computed once here, and bit by bit for
every secret in the library that there is (pycryptodome's, over GF(2**128)).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

PRIME = 2**521 - 1
SECRET, SHARE = 32, 66  # bytes


def split(secret: bytes, threshold: int, places: Sequence[int]) -> list[bytes]:
    """The shares of a secret at `places` (distinct, from 1 on), each of 66 bytes."""
    if len(secret) != SECRET or not 1 <= threshold <= len(places):
        raise ValueError(f"{len(secret)} bytes, {threshold} of {len(places)} shares")
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "big"))  # of the highest power first
    shares = []
    for place in places:
        value = 0
        for coefficient in coefficients:
            value = (value * place + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE, "big"))
    return shares


class Joiner:
    """Joins shares that lie at the same places: one set of clients, many secrets."""

    def __init__(self, places: Sequence[int]):
        self.weights = [_weight(place, places) for place in places]

    def join(self, shares: Sequence[bytes]) -> bytes | None:
        """The secret; None where the shares are not those of 32 bytes, because one is wrong."""
        values = (int.from_bytes(share, "big") for share in shares)
        secret = sum(w * v for w, v in zip(self.weights, values, strict=True)) % PRIME
        return secret.to_bytes(SECRET, "big") if secret < 1 << (8 * SECRET) else None


def _weight(place: int, places: Sequence[int]) -> int:
    """The value at zero of the polynomial that is one at `place` and zero at the other places."""
    above = below = 1
    for other in places:
        if other != place:
            above = above * other % PRIME
            below = below * (other - place) % PRIME
    return above * pow(below, -1, PRIME) % PRIME
