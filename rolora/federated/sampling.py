"""Which clients take part in a round, and the keys of everything random: no global generator
anywhere.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

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


def cohort_of(
    seed: int | str, round: int, members: Sequence[int], per_round: int, attempt: int = 0
) -> list[int]:
    """The sorted ids of a round's clients, a uniform draw without replacement from `members`: every
    client has a number of its own, keyed by (seed, round, attempt, client), and the smallest are
    taken. So a client that comes takes the place of one other at most, and one that goes leaves its
    own.
    """
    if per_round >= len(members):
        return sorted(members)
    ids = np.asarray(members, np.int64)
    order = np.lexsort((ids, _numbers(seed, round, attempt, ids)))
    return sorted(ids[order[:per_round]].tolist())


def poisson_of(
    seed: int | str, round: int, members: Sequence[int], probability: float, attempt: int = 0
) -> list[int]:
    """The sorted ids of a round's clients, each of `members` by itself with that probability."""
    ids = np.asarray(members, np.int64)
    uniform = (_numbers(seed, round, attempt, ids) >> np.uint64(11)) * 2.0**-53
    return sorted(ids[uniform < probability].tolist())


def _numbers(seed: int | str, round: int, attempt: int, ids: np.ndarray) -> np.ndarray:
    """uint64 `[clients]`: each id's number in the sequence of SplitMix64 (Steele, Lea and Flood,
    OOPSLA 2014) that begins at the key of the draw.
    """
    key = np.uint64(key64(seed, "members", round, attempt))
    z = key + (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


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
