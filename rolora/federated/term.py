"""Keeps a term (a frozen low-rank addition to the base) small: past a quarter of the smaller side
it costs more than it says.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from rolora.federated.layout import TERM, Layout
from rolora.federated.methods.flexlora import truncate
from rolora.federated.state import GlobalState


def rank(layout: Layout, flat: Tensor) -> int:
    """R of a term's buffer."""
    return len(flat) // layout.term_unit


def most(layout: Layout) -> int:
    """The rank that a term may reach: a quarter of the smallest side of an adapted weight, and the
    adapter's rank at least.
    """
    return max(max(r, min(K, N) // 4) for r, K, N in layout.adapters().values())


def compress(layout: Layout, state: GlobalState) -> tuple[GlobalState, float]:
    """(the state with its term at half of `most` where it had passed it, the relative error of that
    in the Frobenius norm); error 0 where nothing was cut.
    """
    flat = state.master[TERM]
    if rank(layout, flat) <= most(layout):
        return state, 0.0
    kept = max(1, most(layout) // 2)
    parts, lost, whole = {}, 0.0, 0.0
    for path, (U, V) in layout.term_views(flat).items():
        U, V = U.double(), V.double()
        parts[path] = truncate(U, V, kept)
        product = U @ V
        lost += (product - parts[path][0] @ parts[path][1]).square().sum().item()
        whole += product.square().sum().item()
    master = state.master | {TERM: layout.term(parts)}
    return replace(state, master=master), (lost / whole) ** 0.5 if whole else 0.0
