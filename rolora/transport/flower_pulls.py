"""How long Flower's server side waits for an object that a node is still sending."""

from __future__ import annotations

from flwr.supercore.inflatable import inflatable_utils

_FIRST = 0.02  # seconds


def hasten() -> None:
    """Has this process ask again after 20 ms, and then after twice as long each time, for an object
    that is not there yet; Flower waits a whole second first.

    A node announces its answer, and then sends the answer's objects, so whoever asks often meets
    answers whose objects are a few milliseconds behind. The grid has no option for it.
    """
    defaults = inflatable_utils.pull_objects.__kwdefaults__
    if "initial_backoff" not in defaults:
        raise RuntimeError("this version of Flower pulls objects otherwise: see flower_pulls.py")
    defaults["initial_backoff"] = _FIRST
