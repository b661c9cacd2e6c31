"""How examples are split over clients: index arrays, every index exactly once, seeded.

`iid`, `dirichlet` (label skew with concentration alpha: Hsu et al. 2019; every client gets at least
`minimum`), `shards` (each client sees few labels: McMahan et al. 2017), `column` (a natural key of
the data).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rolora.federated.sampling import generator

_RETRIES = 100


def iid(examples: int, clients: int, seed: int) -> list[np.ndarray]:
    """A shuffled even split; sizes differ by one at most."""
    _enough(examples, clients)
    return [
        np.sort(part)
        for part in np.array_split(generator(seed, "partition").permutation(examples), clients)
    ]


def dirichlet(
    labels: Sequence, clients: int, alpha: float, seed: int, minimum: int = 10
) -> list[np.ndarray]:
    """Each label's examples are dealt by proportions drawn from Dirichlet(alpha).

    Draws again, up to 100 times, until every client has `minimum` examples (fewer where the data
    cannot give as many); after that the smallest clients are filled from the largest.
    """
    if not alpha > 0:
        raise ValueError(f"dirichlet alpha must be positive, got {alpha}")
    labels = np.asarray(labels)
    _enough(len(labels), clients)
    minimum = min(minimum, len(labels) // clients)
    rng = generator(seed, "partition")
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for _ in range(_RETRIES):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for members in classes:
            members = rng.permutation(members)
            cuts = (
                (np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(members))
                .round()
                .astype(int)
            )
            for part, piece in zip(parts, np.split(members, cuts), strict=True):
                part.append(piece)
        split = [np.concatenate(part) for part in parts]
        if min(map(len, split)) >= minimum:
            return [np.sort(part) for part in split]
    while min(map(len, split)) < minimum:
        small, large = (
            min(range(clients), key=lambda c: len(split[c])),
            max(range(clients), key=lambda c: len(split[c])),
        )
        split[small], split[large] = np.append(split[small], split[large][-1]), split[large][:-1]
    return [np.sort(part) for part in split]


def shards(labels: Sequence, clients: int, per_client: int, seed: int) -> list[np.ndarray]:
    """Examples sorted by label are cut into `clients · per_client` shards.

    Each client gets `per_client` of them.
    """
    labels = np.asarray(labels)
    if per_client < 1:
        raise ValueError(f"shards per client must be at least 1, got {per_client}")
    _enough(len(labels), clients * per_client)
    rng = generator(seed, "partition")
    shuffled = rng.permutation(len(labels))
    ordered = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pieces = np.array_split(ordered, clients * per_client)
    dealt = rng.permutation(len(pieces)).reshape(clients, per_client)
    return [np.sort(np.concatenate([pieces[i] for i in mine])) for mine in dealt]


def column(values: Sequence) -> list[np.ndarray]:
    """One client for every distinct value, in sorted order."""
    values = np.asarray([str(v) for v in values])
    return [np.flatnonzero(values == value) for value in np.unique(values)]


def _enough(examples: int, clients: int) -> None:
    if examples < clients:
        raise ValueError(
            f"{examples} examples cannot be split over {clients} clients or shards: "
            "give more data or fewer clients"
        )
