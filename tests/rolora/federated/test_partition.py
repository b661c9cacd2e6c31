"""Every index exactly once, seeded, as skewed as asked."""

import numpy as np
import pytest

from rolora.federated import partition
from rolora.federated.sampling import generator

LABELS = np.random.default_rng(0).integers(0, 8, 1000)

SPLITS = {
    "iid": lambda seed: partition.iid(1000, 7, seed),
    "dirichlet": lambda seed: partition.dirichlet(LABELS, 7, 0.1, seed),
    "shards": lambda seed: partition.shards(LABELS, 7, 2, seed),
}


@pytest.mark.parametrize("name", SPLITS)
def test_every_index_exactly_once_and_seeded(name):
    split = SPLITS[name](3)
    assert len(split) == 7 and sorted(np.concatenate(split)) == list(range(1000))
    assert all(np.array_equal(a, b) for a, b in zip(split, SPLITS[name](3), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(split, SPLITS[name](4), strict=False))


def test_dirichlet_skew_and_minimum():
    def distance(alpha):
        whole = np.bincount(LABELS, minlength=8) / 1000
        parts = partition.dirichlet(LABELS, 10, alpha, 0)
        assert min(map(len, parts)) >= 10
        return np.mean(
            [np.abs(np.bincount(LABELS[p], minlength=8) / len(p) - whole).sum() / 2 for p in parts]
        )

    assert distance(0.1) > 0.5 > 0.3 > distance(5.0) > distance(1000.0) and distance(1000.0) < 0.1


def test_dirichlet_fills_small_clients_where_no_draw_would():
    split = partition.dirichlet(LABELS[:120], 10, 0.01, 0)
    assert min(map(len, split)) >= 10 and sorted(np.concatenate(split)) == list(range(120))


def test_shards_hold_few_labels_and_columns_are_clients():
    counts = [len(np.unique(LABELS[p])) for p in partition.shards(LABELS, 8, 1, 0)]
    assert max(counts) <= 3
    parts = partition.column(["b", "a", "b", "c"])
    assert [list(p) for p in parts] == [[1], [0, 2], [3]]


@pytest.mark.parametrize(
    "split, message",
    [
        (lambda: partition.iid(3, 5, 0), "3 examples cannot be split over 5 clients"),
        (lambda: partition.dirichlet(LABELS, 5, 0.0, 0), "alpha must be positive"),
        (lambda: partition.shards(LABELS, 600, 2, 0), "cannot be split over 1200"),
        (lambda: partition.shards(LABELS, 5, 0, 0), "at least 1"),
    ],
)
def test_impossible_splits_raise(split, message):
    with pytest.raises(ValueError, match=message):
        split()


def dirichlet_one_by_one(labels, clients, alpha, seed, minimum=10):
    """The same split, with the smallest and the largest client looked for anew every time."""
    minimum = min(minimum, len(labels) // clients)
    rng = generator(seed, "partition")
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for _ in range(100):
        parts = [[] for _ in range(clients)]
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


@pytest.mark.parametrize("seed", range(20))
def test_dirichlet_is_the_split_that_one_by_one_gives(seed):
    rng = np.random.default_rng(seed)
    clients, alpha = int(rng.integers(2, 60)), float(rng.choice([0.01, 0.1, 1.0, 10.0]))
    labels = rng.integers(0, 5, int(rng.integers(clients, 30 * clients)))
    found = partition.dirichlet(labels, clients, alpha, seed)
    expected = dirichlet_one_by_one(labels, clients, alpha, seed)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
