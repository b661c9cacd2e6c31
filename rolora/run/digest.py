"""A digest of what a run trains and is judged on: encoded examples, classes, and whose they are."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
import torch

from rolora.data.stored import Stored
from rolora.run.job import Job


def of(job: Job) -> str:
    """The same for the same examples, wherever the files lie; another for any other."""
    found = hashlib.sha256()
    for part in (job.train, job.evaluation, job.test, job.recipe.labels, job.clients):
        _add(found, part)
    return found.hexdigest()


def _add(found: Any, value: object) -> None:
    """Feeds a value, its kind and its length, so that no two values are fed alike."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, list | tuple) and value and all(map(_is_id, value)):
        value = np.asarray(value, np.int64)
    if isinstance(value, np.ndarray):
        found.update(f"array {value.dtype} {value.shape}:".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, list | tuple | Stored):
        found.update(f"list {len(value)}:".encode())
        for item in value:
            _add(found, item)
    elif isinstance(value, dict):
        _add(found, [[name, value[name]] for name in sorted(value, key=str)])
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _add(found, [getattr(value, field.name) for field in dataclasses.fields(value)])
    elif type(value).__repr__ is object.__repr__:  # an address would differ from run to run
        _add(found, [type(value).__qualname__, getattr(value, "__dict__", {})])
    else:
        text = repr(value).encode()
        found.update(f"value {len(text)}:".encode() + text)


def _is_id(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63
