"""Judges every update before it can touch the sum.

A rejection has a name, is counted, and harms nothing else.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rolora.federated import codec, wire
from rolora.federated.layout import Layout
from rolora.federated.state import GlobalState
from rolora_kernels.codecs import CODECS

_WARM_UP, _REMEMBERED = 2, 20  # rounds of a phase
_MOST_LOSS = 1e6  # a mean loss over it is no training; NaN and infinity are not under it either


class Rejected(Exception):
    """`reason` is a fixed word for counting; the text says more."""

    def __init__(self, reason: str, detail: str):
        self.reason = wire.printable(reason, 40)
        super().__init__(wire.printable(f"{self.reason}: {detail}", 300))


@dataclass(frozen=True)
class Bounds:
    """What a round declares beforehand: the largest element of a change, the largest weight that
    any client may claim, the cohort's size, the largest L2 norm of a change (None: no bound).
    """

    max_abs: float
    max_weight: int
    max_terms: int
    max_norm: float | None = None


@dataclass
class Norms:
    """The norms accepted so far: the median of each round, by phase.

    B's and A's changes differ in scale, so each phase has a bound of its own: `multiple` times the
    median over its last 20 rounds, after two of them. It rises by no more than one norm a round,
    the median of those first two: clients who stay just under the bound, and so raise the norms of
    all, would otherwise raise it exponentially.
    """

    multiple: float
    medians: dict[str, list[float]] = field(default_factory=dict)

    def bound(self, phase: str) -> float | None:
        """The largest norm to accept now; None in the warm-up, and where the multiple is 0."""
        seen = self.medians.get(phase, [])
        if self.multiple == 0.0 or len(seen) < _WARM_UP:
            return None
        first = statistics.median(seen[:_WARM_UP])
        most = first * (self.multiple + len(seen) - _WARM_UP)
        return min(self.multiple * statistics.median(seen[-_REMEMBERED:]), most)

    def record(self, phase: str, norms: Sequence[float]) -> None:
        """The accepted norms of a finished round.

        A round of no change at all, such as one of A while B is zero, says nothing.
        """
        typical = statistics.median(norms) if norms else 0.0
        if typical > 0.0:
            self.medians[phase] = [*self.medians.get(phase, []), typical]


@dataclass(frozen=True)
class Round:
    """What updates of this round must agree with."""

    run: str
    number: int
    phase: str
    cohort: frozenset[int]
    layout: Layout
    state: GlobalState
    exchange_dtype: str
    bounds: Bounds
    examples_of: Callable[[int], int]  # the most examples that a client may claim
    budget: Callable[[int], int] | None = (
        None  # ranks that a client sends, where it sends some only
    )

    @property
    def message_limit(self) -> int:
        """Bytes an update may have: its values, and a header."""
        values = self.layout.travelling_size(self.phase)
        return CODECS[self.exchange_dtype].bytes(values) + (1 << 16)


def check(
    data: bytes, sender: int, expected: Round, seen: Container[int]
) -> tuple[wire.Update, Tensor, float]:
    """(update, its change decoded to fp32, the change's norm), or raises Rejected, and nothing
    else.

    sender: the client that the transport got it from. seen: the clients already counted this round.
    """
    try:
        return _judged(data, sender, expected, seen)
    except Rejected:
        raise
    except Exception as error:  # no update of one client may end the round of all
        raise Rejected("unreadable", f"judging it raised {type(error).__name__}") from None


def _judged(
    data: bytes, sender: int, expected: Round, seen: Container[int]
) -> tuple[wire.Update, Tensor, float]:
    try:
        update = wire.decode_update(data, expected.message_limit)
    except wire.BadMessage as error:
        raise Rejected("unreadable", str(error)) from None
    _require_answer(update, sender, expected, seen)
    chosen = _require_form(update, expected)
    _require_report(update, expected)
    change = CODECS[expected.exchange_dtype].decode(update.change)
    norm = _require_bounded(change, expected.bounds)
    if chosen is not None:  # what was not sent did not change
        change = torch.zeros(len(chosen)).masked_scatter_(chosen, change)
    return update, change, norm


def _require_answer(
    update: wire.Update, sender: int, expected: Round, seen: Container[int]
) -> None:
    """It answers this round's task, and its sender was asked and has not answered yet."""
    _require(update.run == expected.run, "other run", f"{update.run[:40]!r}")
    _require(update.round == expected.number, "stale or replayed", f"made for round {update.round}")
    _require(
        update.phase == expected.phase,
        "other phase",
        f"phase {update.phase[:8]!r} in a round of {expected.phase!r}",
    )
    _require(update.layout == expected.layout.hash, "other layout", update.layout[:40])
    _require(
        update.versions == expected.state.versions,
        "stale factors",
        f"trained from {str(update.versions)[:80]}",
    )
    _require(
        update.client == sender,
        "other client",
        f"client {sender} answered as client {update.client}",
    )
    _require(
        update.client in expected.cohort,
        "not asked",
        f"client {update.client} is not in the cohort",
    )
    _require(update.client not in seen, "duplicate", f"client {update.client} has answered already")


def _require_form(update: wire.Update, expected: Round) -> Tensor | None:
    """Its change has the dtype and the length that the round exchanges; which values of the whole
    change it holds, where clients send some ranks only.
    """
    size = expected.layout.travelling_size(expected.phase)
    chosen: Tensor | None = None
    if expected.budget is not None:
        chosen = _chosen(update, expected, expected.budget(update.client))
        size = int(chosen.sum())
    _require(
        update.ranks is None or chosen is not None,
        "wrong shape",
        "ranks are named where all are sent",
    )
    dtype = CODECS[expected.exchange_dtype].dtype
    length = CODECS[expected.exchange_dtype].length(size)
    _require(
        update.change.dtype == dtype, "wrong dtype", f"{update.change.dtype}, expected {dtype}"
    )
    _require(
        tuple(update.change.shape) == (length,),
        "wrong shape",
        f"{list(update.change.shape)}, expected [{length}]",
    )
    return chosen


def _require_report(update: wire.Update, expected: Round) -> None:
    """Its weight is at most what its client can have, and its report is one of training."""
    most = min(expected.bounds.max_weight, expected.examples_of(update.client))
    _require(1 <= update.weight <= most, "bad weight", f"{update.weight}, expected 1 to {most}")
    _require(
        abs(update.loss) <= _MOST_LOSS and update.examples >= 0 and update.tokens >= 0,
        "bad report",
        f"loss {update.loss}, examples {update.examples}, tokens {update.tokens}",
    )


def _require_bounded(change: Tensor, bounds: Bounds) -> float:
    """Its values are finite and within the round's bounds; their norm comes back."""
    largest = change.abs().max().item() if len(change) else 0.0
    _require(math.isfinite(largest), "not finite", "the change holds NaN or Inf")
    _require(
        largest <= bounds.max_abs,
        "over the bound",
        f"an element of {largest:g} > {bounds.max_abs:g}",
    )
    norm = torch.linalg.vector_norm(change, dtype=torch.float64).item()
    bound = bounds.max_norm
    _require(
        bound is None or norm <= bound,
        "norm over the bound",
        f"a change of norm {norm:.4g}, expected at most {bound or 0:.4g}",
    )
    return norm


def _chosen(update: wire.Update, expected: Round, budget: int) -> Tensor:
    """Which values of the whole change an update holds; raises Rejected for ranks that are not the
    client's to send, or more than `budget`.
    """
    ranks, total = update.ranks, expected.layout.ranks
    form = (torch.uint8, (-(-total // 8),))
    if ranks is None or (ranks.dtype, tuple(ranks.shape)) != form:
        raise Rejected("wrong shape", f"no bits of {total} ranks beside the change")
    bits = codec.unpack_bits(ranks, total)
    _require(
        int(bits.sum()) <= budget,
        "over the bound",
        f"{int(bits.sum())} ranks, expected at most {budget}",
    )
    return expected.layout.chosen(bits, expected.phase)


def _require(condition: bool, reason: str, detail: str) -> None:
    if not condition:
        raise Rejected(reason, detail)
