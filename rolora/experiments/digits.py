"""Handwritten digits, split over clients by label: UCI's (DIGITS.md), or MNIST's four files."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rolora.errors import BadInput

SPLITS = {"10x1": (10, 1), "5x2": (5, 2), "iid": (10, 0)}


@dataclass(frozen=True)
class Digits:
    """fp32 images in [0, 1] `[n, d]` and labels `[n]`: training, held-out slice, test."""

    train: tuple[np.ndarray, np.ndarray]
    held: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def load(mnist: str | None) -> Digits:
    """The shipped digits cut 64 : 16 : 20 in a fixed random order, or MNIST with a sixth of its
    training set held out.
    """
    rng = np.random.default_rng(0)
    if mnist is None:
        with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
            images, labels = (
                stored["images"].astype(np.float32) / 16,
                stored["labels"].astype(np.int64),
            )
        order = rng.permutation(len(images))
        cuts = [round(0.64 * len(order)), round(0.8 * len(order))]
        train_rows, held_rows, test_rows = np.split(order, cuts)
        return Digits(
            (images[train_rows], labels[train_rows]),
            (images[held_rows], labels[held_rows]),
            (images[test_rows], labels[test_rows]),
        )
    train, test = (
        (
            _idx(mnist, f"{name}-images-idx3-ubyte") / np.float32(255),
            _idx(mnist, f"{name}-labels-idx1-ubyte"),
        )
        for name in ("train", "t10k")
    )
    order = rng.permutation(len(train[1]))
    cut = round(5 / 6 * len(order))
    parts = [(x.reshape(len(x), -1), y.astype(np.int64)) for x, y in (train, test)]
    images, labels = parts[0]
    own, held = order[:cut], order[cut:]
    return Digits((images[own], labels[own]), (images[held], labels[held]), parts[1])


def _idx(folder: str, name: str) -> np.ndarray:
    """An IDX file of bytes: 0, 0, 8, its number of dimensions, their sizes (big-endian), the
    bytes.
    """
    for path in (Path(folder) / name, Path(folder) / f"{name}.gz"):
        if path.is_file():
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            shape = (
                struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
                if len(data) > 4 and data[:3] == b"\0\0\x08"
                else ()
            )
            if not shape or len(data) != 4 + 4 * len(shape) + int(np.prod(shape)):
                raise BadInput(f"{path} is not an IDX file of bytes")
            return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    raise BadInput(f"--mnist {folder} has no {name} (or {name}.gz)")


def clients_of(labels: np.ndarray, split: str) -> list[np.ndarray]:
    """Each client's rows: client c has labels c·k … c·k + k − 1, or every tenth row."""
    count, own = SPLITS[split]
    if own == 0:
        return [np.arange(c, len(labels), count) for c in range(count)]
    return [np.flatnonzero((labels >= c * own) & (labels < (c + 1) * own)) for c in range(count)]
