"""FLoRA: clients train both factors from a fresh start; the server stacks them and adds the stack
to the base, exactly.

Wang et al., NeurIPS 2024. The base change is the term of the state: `Σ_i (w_i B_i)(A_i)`, Σ r_i
ranks a round, the same on every peer as far as the wire says it. Then B is zero again and A is
drawn anew, which is published too. Clients may have ranks of their own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rolora.federated import sampling
from rolora.federated.aggregate import Collector
from rolora.federated.layout import TERM
from rolora.federated.methods.flexlora import Products

if TYPE_CHECKING:
    from rolora.federated.methods import Context

TAKES_CLIENT_RANKS = True
CHANGES_BASE = True


def phase(round: int, schedule: str) -> str:
    return "BOTH"


class Stack(Products):
    def finish(self) -> dict[str, Tensor]:
        if not self.clients:
            return {}  # a round that nobody came to, where --quorum 0 bears that
        change, context = self.mean.finish(), self.context
        layout, state = context.layout, context.state
        appended = layout.term(self.stacks(state.published))
        drawn = {"A": torch.empty_like(state.master["A"])}
        for path, A in layout.views(drawn, "A").items():  # as at the start: uniform in ±1/sqrt(in)
            numbers = sampling.generator(context.seed, "flora", state.round, path).uniform(
                -1.0, 1.0, tuple(A.shape)
            )
            A.copy_(torch.from_numpy(numbers / math.sqrt(A.shape[1])))
        heads = {kind: delta for kind, delta in change.items() if kind == "head"}
        return heads | {"A": drawn["A"] - state.master["A"], TERM: appended}


def collect(context: Context, collector: Collector) -> Stack:
    return Stack(context, collector)
