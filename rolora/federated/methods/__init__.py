"""Methods, found by name: `phase(round)` says which factor trains, `collect` how updates become the next global state.

A file defines `phase(round, schedule)`, and of the following what it needs:

    collect(context, collector)   wraps the mean where the change of a factor is not simply the mean of the clients' changes
    turn(layout, published)       re-factors what is published after a round (see `rolora.federated.turn`)
    KEPT = ("B",)                 kinds that a client trains and keeps to itself
    CHANGES_BASE = True           the state holds a frozen low-rank addition to the base
    SELECTS = True                a client sends some ranks only: those of the largest product, as many as it may
    TAKES_CLIENT_RANKS = True     clients may train fewer ranks than the adapter has
    NEEDS_EVERY_CHANGE = True     the aggregate is of whole clients' products, not a sum of changes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from torch import Tensor

from rolora.federated import turn as turns
from rolora.federated.aggregate import Collector
from rolora.federated.layout import Layout
from rolora.federated.state import GlobalState

NAMES = ("rolora", "fedavg", "ffa", "flexlora", "fedsvd", "flora", "fedex", "fedsa", "lora-a2")


@dataclass(frozen=True)
class Context:
    """What a method's collector may look at. `rank_of(client)` is the number of ranks that a client trains."""

    state: GlobalState
    layout: Layout
    phase: str
    seed: int
    rank_of: Callable[[int], int | None]


@dataclass(frozen=True)
class Method:
    """A method as the server uses it; see the module's text."""

    name: str
    phase: Callable[[int], str]
    collect: Callable[[Context, Collector], Collector]
    turn: Callable[[Layout, dict[str, Tensor], int], dict[str, Tensor] | None]
    kept: tuple[str, ...] = ()
    changes_base: bool = False
    selects: bool = False
    takes_client_ranks: bool = False
    needs_every_change: bool = False


def _shipped(name: str) -> ModuleType:
    if name not in NAMES:
        raise ValueError(f"method {name!r} is not one of {', '.join(NAMES)}, and no .py file")
    return import_module(f"rolora.federated.methods.{name.replace('-', '_')}")


def _of_file(path: str) -> ModuleType:
    spec = spec_from_file_location(f"rolora_method_{Path(path).stem}", path)
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError:
        raise ValueError(f"method {path} does not exist") from None
    except Exception as error:  # whatever a file of someone's own does wrong
        raise ValueError(
            f"method {path} cannot be loaded: {type(error).__name__}: {error}"
        ) from None
    if not callable(getattr(module, "phase", None)):
        raise ValueError(f"method {path} defines no phase(round, schedule)")
    return module


def load(name: str, schedule: str = "BA", balance: bool = False) -> Method:
    """The method called `name`, or that of a file of one's own (`name` ends in .py); raises ValueError for an unknown one. `balance`:
    a factor is made orthonormal, up to a scalar, before it is frozen."""
    module = _of_file(name) if name.endswith(".py") else _shipped(name)

    def phase(round: int) -> str:
        return module.phase(round, schedule)

    def turn(layout: Layout, published: dict[str, Tensor], round: int) -> dict[str, Tensor] | None:
        if hasattr(module, "turn"):
            return module.turn(layout, published)
        handed_over = {phase(round), phase(round + 1)} == {"A", "B"}
        return (
            turns.balanced(layout, published, frozen=phase(round))
            if balance and handed_over
            else None
        )

    return Method(
        name,
        phase,
        getattr(module, "collect", lambda context, collector: collector),
        turn,
        getattr(module, "KEPT", ()),
        getattr(module, "CHANGES_BASE", False),
        getattr(module, "SELECTS", False),
        getattr(module, "TAKES_CLIENT_RANKS", False),
        getattr(module, "NEEDS_EVERY_CHANGE", False),
    )
