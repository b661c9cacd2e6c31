"""Methods, found by name: `phase(round)` says which factor trains, `collect` how updates become the next global state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from torch import Tensor

from rolora.federated.guard import Bounds
from rolora.federated.layout import Layout
from rolora.federated.state import GlobalState

NAMES = ("rolora", "fedavg", "ffa", "flexlora")


class Collector(Protocol):
    """Takes accepted updates one by one, in any order, and gives the mean change of every travelling kind."""

    def add(self, client: int, change: Tensor, weight: int) -> None: ...

    def finish(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Method:
    """A method as the server uses it: made from the two functions of a file here."""

    name: str
    phase: Callable[[int], str]
    collect: Callable[[GlobalState, Layout, str, Bounds], Collector]


def load(name: str, schedule: str = "BA") -> Method:
    """The method of file `name`.py, which defines `phase(round, schedule)` and `collect(state, layout, phase, bounds)`."""
    if name not in NAMES:
        raise ValueError(f"method {name!r} is not one of {', '.join(NAMES)}")
    module = import_module(f"rolora.federated.methods.{name}")
    return Method(name, lambda round: module.phase(round, schedule), module.collect)
