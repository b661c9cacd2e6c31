"""Judges every update before it can touch the sum. A rejection has a name, is counted, and harms nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from rolora.federated import codec, wire
from rolora.federated.layout import Layout
from rolora.federated.state import GlobalState


class Rejected(Exception):
    """`reason` is a fixed word for counting; the text says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class Bounds:
    """What a round declares beforehand: the largest element of a change, the largest weight, the size of the cohort."""

    max_abs: float
    max_weight: int
    max_terms: int


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

    @property
    def message_limit(self) -> int:
        """Bytes an update may have: its values, and a header."""
        width = codec.DTYPES[self.exchange_dtype].itemsize
        return self.layout.travelling_size(self.phase) * width + (1 << 16)


def check(data: bytes, sender: int, expected: Round, seen: set[int]) -> tuple[wire.Update, Tensor]:
    """(update, its change decoded to fp32), or raises Rejected. `sender` is the client that the transport got it
    from, `seen` are the clients already counted this round."""
    try:
        update = wire.decode_update(data, expected.message_limit)
    except wire.BadMessage as error:
        raise Rejected("unreadable", str(error)) from None
    _require(update.run == expected.run, "other run", f"{update.run[:40]!r}")
    _require(update.round == expected.number, "stale or replayed", f"made for round {update.round}")
    _require(update.phase == expected.phase, "other phase", f"phase {update.phase[:8]!r} in a round of {expected.phase!r}")
    _require(update.layout == expected.layout.hash, "other layout", update.layout[:40])
    _require(update.versions == expected.state.versions, "stale factors", f"trained from {str(update.versions)[:80]}")
    _require(update.client == sender, "other client", f"client {sender} answered as client {update.client}")
    _require(update.client in expected.cohort, "not asked", f"client {update.client} is not in the cohort")
    _require(update.client not in seen, "duplicate", f"client {update.client} has answered already")
    dtype, size = codec.DTYPES[expected.exchange_dtype], expected.layout.travelling_size(expected.phase)
    _require(update.change.dtype == dtype, "wrong dtype", f"{update.change.dtype}, expected {dtype}")
    _require(tuple(update.change.shape) == (size,), "wrong shape", f"{list(update.change.shape)}, expected [{size}]")
    _require(1 <= update.weight <= expected.bounds.max_weight, "bad weight",
             f"{update.weight}, expected 1 to {expected.bounds.max_weight}")
    _require(math.isfinite(update.loss) and update.examples >= 0 and update.tokens >= 0, "bad report",
             f"loss {update.loss}, examples {update.examples}, tokens {update.tokens}")
    change = codec.decode(update.change)
    largest = change.abs().max().item() if size else 0.0
    _require(math.isfinite(largest), "not finite", "the change holds NaN or Inf")
    _require(largest <= expected.bounds.max_abs, "over the bound", f"an element of {largest:g} > {expected.bounds.max_abs:g}")
    return update, change


def _require(condition: bool, reason: str, detail: str) -> None:
    if not condition:
        raise Rejected(reason, detail)
