"""Measured tables: who computes a primitive fastest on a GPU, shape by shape, and with which launch
configurations.

A table is `tuned/<GPU name>.json`, written by `python -m benchmarks.gpu`:

    {"gpu": …, "capability": [9, 0], "commit": …, "rows": [
      {"primitive": "base_dx", "dtype": "bfloat16", "rank": 16, "sizes": [8192, 4096, 4096],
       "dropout": true, "winner": "tma",
       "configs": {"triton": {"BLOCK_M": 128, …}, "tma": {…}}}, …]}

A row of "merged" (dispatch) has who makes W′ fastest as its winner, "torch" or "triton", where a
merged weight wins over the whole rule, else "none"; sizes [M, N, K].

`rank` is the padded rank of a block (0 for "dequantise"), `sizes` are those that the kernel's SPEC
names, `dropout` says whether a mask was made (false where it is missing). A call takes the row of
the same primitive, dtype (fp16 reads bf16's rows) and dropout that is nearest in log2 of the sizes
and of the rank: a mask costs registers and shared memory, so what was measured without one says
nothing about a launch with one, not even that it compiles. A GPU without a table reads one of its
compute capability.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rolora_kernels.plan import MASKED

FOLDER = Path(__file__).parent / "tuned"

_installed: dict[str, dict] = {}
_times = 0
_caches: list = []


def cached(function: Callable) -> Callable:
    """An lru_cache that `install` empties: for what follows from a table."""
    _caches.append(functools.lru_cache(maxsize=4096)(function))
    return _caches[-1]


def of(device: torch.device) -> dict | None:
    """The table that a device's launches follow, or None: vendor libraries then, and shipped
    configurations.
    """
    return _of(_name(device), _capability(device))


def install(table: dict, name: str) -> None:
    """Makes `table` that of the devices called `name` (`"cpu"`: the interpreter) in this process;
    an empty one removes it.
    """
    global _times
    _installed[name], _times = table, _times + 1
    for cache in _caches:
        cache.cache_clear()


def installed() -> int:
    """How often a table was installed: what follows from tables is as old as this number."""
    return _times


@cached
def nearest(
    device: torch.device,
    primitive: str,
    dtype: torch.dtype,
    rank: int,
    sizes: tuple[int, ...],
    dropout: bool = False,
    same_rank: bool = False,
) -> dict | None:
    """The row of the device's table for these sizes (elements, as SIZES names them) and this rank,
    only one of the rank itself where `same_rank`; None where no row is of that kind.
    """
    table = of(device)
    wanted = "bfloat16" if dtype == torch.float16 else str(dtype).removeprefix("torch.")
    masked = dropout and primitive in MASKED
    rows = [
        row
        for row in (table or {}).get("rows", [])
        if (row["primitive"], row["dtype"], row.get("dropout", False))
        == (primitive, wanted, masked)
        and (row["rank"] == rank or not same_rank)
    ]
    here = (*sizes, rank)
    return min(rows, key=lambda row: _distance((*row["sizes"], row["rank"]), here), default=None)


def _distance(a: Sequence[int], b: Sequence[int]) -> float:
    return sum(abs(math.log2(max(p, 1) / max(q, 1))) for p, q in zip(a, b, strict=True))


@cached
def _of(name: str, capability: tuple[int, int] | None) -> dict | None:
    if name in _installed:
        return _installed[name] or None
    own = FOLDER / f"{file_name(name)}.json"
    if own.is_file():
        return json.loads(own.read_text())
    if capability is None:
        return None
    tables = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    return next((table for table in tables if tuple(table["capability"]) == capability), None)


def file_name(gpu: str) -> str:
    """A GPU's name as a file is called."""
    return gpu.replace(" ", "_").replace("/", "_")


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
