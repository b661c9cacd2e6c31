"""Who shares secrets with whom: everybody with everybody, or each with a few.

With n clients every one makes n - 1 masks of the model's size. With `degree` neighbours it makes
that many, and the sum hides as well as before while those that stay are connected, which a circle
in random order is but for a chance that falls exponentially with the degree (Bell et al., CCS 2020,
section 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from rolora.federated import sampling


def neighbours(clients: Iterable[int], degree: int | None, key: str) -> dict[int, list[int]]:
    """The neighbours of every client, in order, without itself; all others where `degree` is None
    or covers them. `degree` is even: half of them on either side of a circle, whose order `key`
    gives.
    """
    clients = sorted(clients)
    if degree is None or degree >= len(clients) - 1:
        return {client: [other for other in clients if other != client] for client in clients}
    order = sampling.generator(key).permutation(clients).tolist()
    found = {}
    for place, client in enumerate(order):
        steps = [step for step in range(-(degree // 2), degree // 2 + 1) if step]
        found[client] = sorted(order[(place + step) % len(order)] for step in steps)
    return found


def share_threshold(threshold: int, clients: int, holders: int) -> int:
    """How many of `holders` shares join, where `threshold` of all `clients` must stay: the same
    part of them, and more than half.
    """
    return max(math.ceil(threshold * holders / clients), holders // 2 + 1)


def key_of(session: tuple[str, int, int]) -> str:
    """What the order of an attempt's circle is drawn from."""
    return "circle|" + "|".join(map(str, session))
