"""Methods, found by name: `phase(round)` says which factor trains, `collect` how updates become the next global state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from rolora.federated.aggregate import Collector
from rolora.federated.layout import Layout
from rolora.federated.state import GlobalState

NAMES = ("rolora", "fedavg", "ffa", "flexlora")


@dataclass(frozen=True)
class Method:
    """A method as the server uses it: `collect(state, layout, phase, collector)` may wrap the rule's collector."""

    name: str
    phase: Callable[[int], str]
    collect: Callable[[GlobalState, Layout, str, Collector], Collector]


def load(name: str, schedule: str = "BA") -> Method:
    """The method of file `name`.py, which defines `phase(round, schedule)` and, where the change of a factor is not simply the
    aggregate of the clients' changes, `collect(state, layout, phase, collector)`."""
    if name not in NAMES:
        raise ValueError(f"method {name!r} is not one of {', '.join(NAMES)}")
    module = import_module(f"rolora.federated.methods.{name}")
    return Method(name, lambda round: module.phase(round, schedule), getattr(module, "collect", _plain))


def _plain(state: GlobalState, layout: Layout, phase: str, collector: Collector) -> Collector:
    return collector
