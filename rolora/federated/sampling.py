"""Which clients take part in a round, and the keys of everything random: no global generator
anywhere.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np


def generator(*key: int | str) -> np.random.Generator:
    """A generator of its own for a key such as (seed, "cohort", round)."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))


def key64(*key: int | str) -> int:
    """A 64-bit key for a counter-based generator on the device."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, key)).encode()).digest()[:8], "little")


def cohort(
    seed: int | str,
    round: int,
    clients: int,
    per_round: int,
    attempt: int = 0,
    poisson: bool = False,
) -> list[int]:
    """The sorted ids of the clients of a round: a uniform draw without replacement, or, Poisson,
    every client by itself with probability per_round / clients (none, now and then). A round that
    is repeated asks a draw of its own.
    """
    if per_round >= clients:
        return list(range(clients))
    drawn = generator(seed, "cohort", round, *([attempt] if attempt else []))
    if poisson:
        return [int(c) for c in np.flatnonzero(drawn.random(clients) < per_round / clients)]
    return sorted(int(c) for c in drawn.choice(clients, per_round, replace=False))


def secret_cohort(clients: int, per_round: int) -> list[int]:
    """A Poisson draw that nobody can know beforehand or repeat: each client by itself with
    probability per_round / clients, by 53 bits of the operating system's generator.
    """
    bits = np.frombuffer(os.urandom(8 * clients), dtype=np.uint64) >> np.uint64(11)
    return [int(c) for c in np.flatnonzero(bits * 2.0**-53 < per_round / clients)]


def batches(
    seed: int, round: int, client: int, examples: int, batch_size: int, steps: int
) -> list[np.ndarray]:
    """`steps` index arrays of `batch_size` examples of a client: its examples in keyed random
    order, a fresh order whenever they run out (the batch then holds the end of one and the start of
    the next).
    """
    needed = steps * batch_size
    epochs = -(-needed // examples)
    order = [
        generator(seed, "batches", round, client, epoch).permutation(examples)
        for epoch in range(epochs)
    ]
    flat = np.concatenate(order)[:needed] if order else np.empty(0, dtype=np.int64)
    return [flat[i : i + batch_size] for i in range(0, needed, batch_size)]
