"""Methods, found by name: `phase(round)` says which factor trains, and how updates become the next
global state.

A file of a method defines

    phase(round, schedule)        "A", "B" or "BOTH": what trains and travels in a round

and states its facts; those that it leaves out are as the mean of clients' changes has them:

    transform(context, client, change)
        a client's change before it is counted; goes through every mean
    collect(context, collector)
        takes every client's own change, in the place of the mean. Such a method is never given a
        private mean, a robust rule or one rank's share
    local_phase(step)
        which factor a client's local step trains, counted from 0 in every round, where a round
        trains both: they may take turns within it
    RATES = {"B": 2.0}
        how many times the learning rate a kind trains with
    turn(layout, published)
        re-factors what is published after a round (see `rolora.federated.turn`)
    KEPT = ("B",)
        kinds that a client trains and keeps to itself
    CHANGES_BASE = True
        the state holds a frozen low-rank addition to the base
    SELECTS = True
        a client sends some ranks only: those of the largest product
    TAKES_CLIENT_RANKS = True
        clients may train fewer ranks than the adapter has
    KEEPS_COORDINATES = True
        with `collect`: the factors are still means of clients' factors, so that a moment of one
        round means something in the next
    NARROWS = True
        both factors stay, and an r × r matrix between them is what trains as "B"
    CARRIES_MOMENTS = True
        clients carry AdamW's moments unless told otherwise; factors that take turns are handed
        over at equal size, and clients that are drawn carry nothing

`rolora.federated.compatibility` refuses what a method's facts exclude; nothing else knows which
method it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from torch import Tensor

from rolora.federated import turn as turns
from rolora.federated.aggregate import Collector
from rolora.federated.layout import Layout
from rolora.federated.state import GlobalState

# By the option that asks for it.
HAND_OVERS = {"balance": turns.balanced, "equal_factors": turns.equal}
LOOKED_AT = 64  # rounds, to see which factors a method trains
NAMES = (
    "rolora",
    "fedavg",
    "ffa",
    "flexlora",
    "fedsvd",
    "flora",
    "fedex",
    "fedsa",
    "lora-a2",
    "fedrot",
    "la-lora",
    "fed-sb",
)


@dataclass(frozen=True)
class Context:
    """What a method's collector may look at.

    `rank_of(client)` is the number of ranks that a client trains; `max_abs` the largest element
    that a change may have.
    """

    state: GlobalState
    layout: Layout
    phase: str
    seed: int
    rank_of: Callable[[int], int | None]
    max_abs: float = math.inf


@dataclass(frozen=True)
class Method:
    """A method as the server uses it: what it does, and the facts that it states (the module's
    text).
    """

    name: str
    phase: Callable[[int], str]
    collect: Callable[[Context, Collector], Collector]
    transform: Callable[[Context, int, Tensor], Tensor]
    turn: Callable[[Layout, dict[str, Tensor], int], dict[str, Tensor] | None]
    phases: frozenset[str]
    transforms: bool = False
    local_phase: Callable[[int], str] | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    collects: bool = False
    turns: bool = False
    kept: tuple[str, ...] = ()
    changes_base: bool = False
    selects: bool = False
    takes_client_ranks: bool = False
    keeps_coordinates: bool = False
    carries: bool = False
    narrows: bool = False

    def counted(self, context: Context, client: int, change: Tensor) -> Tensor:
        """A client's change as this method wants it counted; raises ValueError for one that no sum
        can take.
        """
        made = self.transform(context, client, change)
        if made is change:
            return change
        bearable = (
            made.shape == change.shape
            and made.isfinite().all()
            and made.abs().max() <= context.max_abs
        )
        if not bearable:
            raise ValueError(
                f"method {self.name}: transform must return fp32 {list(change.shape)}, finite and "
                f"at most {context.max_abs:g} in size"
            )
        return made.to(change.dtype)

    @property
    def alternates(self) -> bool:
        """Whether A and B take turns."""
        return {"A", "B"} <= self.phases

    @property
    def trains_both(self) -> bool:
        """Whether a client's own training moves both factors in one round."""
        return "BOTH" in self.phases or bool(self.kept)


def _shipped(name: str) -> ModuleType:
    if name not in NAMES:
        raise ValueError(f"method {name!r} is not one of {', '.join(NAMES)}, and no .py file")
    return import_module(f"rolora.federated.methods.{name.replace('-', '_')}")


def _of_file(path: str) -> ModuleType:
    spec = spec_from_file_location(f"rolora_method_{Path(path).stem}", path)
    if spec is None or spec.loader is None:  # never, for a name that ends in .py
        raise ValueError(f"method {path} is no Python file")
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


def hands_over(phase: Callable[[int], str], round: int) -> bool:
    """Whether the factor that trains in `round` rests in the next, which trains the other."""
    return {phase(round), phase(round + 1)} == {"A", "B"}


def load(name: str, schedule: str = "BA", hand_over: str | None = None) -> Method:
    """The method called `name`, or that of a file of one's own (`name` ends in .py).

    hand_over: how factors are turned before one is frozen, of `HAND_OVERS`.
    Raises ValueError for an unknown name and for a file that is no method.
    """
    module = _of_file(name) if name.endswith(".py") else _shipped(name)

    def phase(round: int) -> str:
        return module.phase(round, schedule)

    def turn(layout: Layout, published: dict[str, Tensor], round: int) -> dict[str, Tensor] | None:
        if hasattr(module, "turn"):
            return module.turn(layout, published)
        if hand_over is None or not hands_over(phase, round):
            return None
        return HAND_OVERS[hand_over](layout, published, phase(round))

    return Method(
        name,
        phase,
        getattr(module, "collect", _as_it_is),
        getattr(module, "transform", _unchanged),
        turn,
        phases=_phases(module, name),
        local_phase=getattr(module, "local_phase", None),
        rates=dict(getattr(module, "RATES", {})),
        collects=hasattr(module, "collect"),
        transforms=hasattr(module, "transform"),
        turns=hasattr(module, "turn"),
        kept=tuple(getattr(module, "KEPT", ())),
        changes_base=getattr(module, "CHANGES_BASE", False),
        selects=getattr(module, "SELECTS", False),
        takes_client_ranks=getattr(module, "TAKES_CLIENT_RANKS", False),
        keeps_coordinates=getattr(module, "KEEPS_COORDINATES", False),
        carries=getattr(module, "CARRIES_MOMENTS", False),
        narrows=getattr(module, "NARROWS", False),
    )


def _as_it_is(context: Context, collector: Collector) -> Collector:
    return collector


def _unchanged(context: Context, client: int, change: Tensor) -> Tensor:
    return change


def _phases(module: ModuleType, name: str) -> frozenset[str]:
    """The phases of a method's first rounds, under the schedule that most runs have."""
    try:
        found = [module.phase(round, "BA") for round in range(1, LOOKED_AT + 1)]
    except Exception as error:  # whatever a file of someone's own does wrong
        raise ValueError(f"method {name}: phase(round, schedule) raises {error!r}") from None
    for phase in found:
        if phase not in ("A", "B", "BOTH"):
            raise ValueError(f"method {name}: a phase is 'A', 'B' or 'BOTH', and this is {phase!r}")
    return frozenset(found)
