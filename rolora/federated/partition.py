"""How examples are split over clients: index arrays, every index exactly once, seeded.

`iid`, `dirichlet` (label skew with concentration alpha: Hsu et al. 2019; every client gets at least
`minimum`), `shards` (each client sees few labels: McMahan et al. 2017), `column` (a natural key of
the data).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

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
    labels: Sequence[object] | np.ndarray,
    clients: int,
    alpha: float,
    seed: int,
    minimum: int = 10,
) -> list[np.ndarray]:
    """Each label's examples are dealt by proportions drawn from Dirichlet(alpha).

    Draws again, up to 100 times, until every client has `minimum` examples (fewer where the data
    cannot give as many); after that the smallest clients are filled from the largest.
    """
    if not alpha > 0:
        raise ValueError(f"dirichlet alpha must be positive, got {alpha}")
    of = np.asarray(labels)
    _enough(len(of), clients)
    minimum = min(minimum, len(of) // clients)
    rng = generator(seed, "partition")
    classes = [np.flatnonzero(of == label) for label in np.unique(of)]
    for _ in range(_RETRIES):
        drawn, sizes = [], np.zeros(clients, int)
        for members in classes:
            members = rng.permutation(members)
            ends = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(members)
            cuts = ends.round().astype(int)
            drawn.append((members, cuts))
            sizes += np.diff(cuts, prepend=0, append=len(members))
        if sizes.min() >= minimum:
            return [np.sort(part) for part in _dealt(drawn)]
    split = _dealt(drawn)
    _fill(split, minimum)
    return [np.sort(part) for part in split]


def _dealt(drawn: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Every client's examples, from each label's examples and where they are cut."""
    pieces = [np.split(members, cuts) for members, cuts in drawn]
    return [np.concatenate(own) for own in zip(*pieces, strict=True)]


def _fill(split: list[np.ndarray], minimum: int) -> None:
    """Moves the last example of the largest client to the smallest until all have `minimum`.

    Of several smallest or largest clients the first is taken. Two heaps hold (size, client); an
    entry whose size is no longer the client's is dropped when it comes up.
    """
    own = [part.tolist() for part in split]
    small = [(len(part), client) for client, part in enumerate(own)]
    large = [(-len(part), client) for client, part in enumerate(own)]
    heapq.heapify(small)
    heapq.heapify(large)
    changed = set()
    while True:
        while small[0][0] != len(own[small[0][1]]):
            heapq.heappop(small)
        while -large[0][0] != len(own[large[0][1]]):
            heapq.heappop(large)
        (least, to), (_, origin) = small[0], large[0]
        if least >= minimum:
            break
        own[to].append(own[origin].pop())
        for client in (to, origin):
            heapq.heappush(small, (len(own[client]), client))
            heapq.heappush(large, (-len(own[client]), client))
            changed.add(client)
    for client in changed:
        split[client] = np.array(own[client], dtype=split[client].dtype)


def shards(
    labels: Sequence[object] | np.ndarray, clients: int, per_client: int, seed: int
) -> list[np.ndarray]:
    """Examples sorted by label are cut into `clients · per_client` shards.

    Each client gets `per_client` of them.
    """
    of = np.asarray(labels)
    if per_client < 1:
        raise ValueError(f"shards per client must be at least 1, got {per_client}")
    _enough(len(of), clients * per_client)
    rng = generator(seed, "partition")
    shuffled = rng.permutation(len(of))
    ordered = shuffled[np.argsort(of[shuffled], kind="stable")]
    pieces = np.array_split(ordered, clients * per_client)
    dealt = rng.permutation(len(pieces)).reshape(clients, per_client)
    return [np.sort(np.concatenate([pieces[i] for i in mine])) for mine in dealt]


def column(values: Iterable[object]) -> list[np.ndarray]:
    """One client for every distinct value, in sorted order; values are looked at one by one."""
    numbers: dict[str, int] = {}  # text → how many others came before it
    of = np.fromiter((numbers.setdefault(str(v), len(numbers)) for v in values), np.int64)
    by_number = np.split(np.argsort(of, kind="stable"), np.cumsum(np.bincount(of))[:-1])
    return [by_number[numbers[text]] for text in sorted(numbers)]


def _enough(examples: int, clients: int) -> None:
    if examples < clients:
        raise ValueError(
            f"{examples} examples cannot be split over {clients} clients or shards: "
            "give more data or fewer clients"
        )
