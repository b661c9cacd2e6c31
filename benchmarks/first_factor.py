"""A trial: the chance of the first A is forgotten as soon as something can take its place.

After the first round in A, every adapter's A becomes what that round changed of it, at the norm of
the A before. Of one small step of SGD the change is -η Bᵀ G, and B is -η G Aᵀ by then, so this is a
step of power iteration towards the gradient's own directions; B stays what fitted the A that is
gone. The server knows both and publishes an A in that round anyway, so nothing more is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from rolora.federated.layout import Layout
from rolora.federated.server import Server
from rolora.federated.state import GlobalState


def replaced(layout: Layout, state: GlobalState, change: Tensor) -> Tensor:
    """The change of A `[all values]` after which each A is `change`, at its own norm before."""
    first, made = state.master["A"], torch.zeros_like(change)
    for mine, before, after in zip(
        *(layout.views({"A": flat}, "A").values() for flat in (made, first, change)), strict=True
    ):
        if after.any():  # else it stays: a change of nothing has no direction
            mine.copy_(after * (before.norm() / after.norm()) - before)
    return made


@contextmanager
def forgotten() -> Iterator[None]:
    """Runs begun within it forget their first A."""
    advance = Server._advance

    def advanced(self: Server, number: int, change: dict[str, Tensor]) -> dict:
        if "A" in change and self.state.versions["A"] == 0:
            change = change | {"A": replaced(self.layout, self.state, change["A"])}
        return advance(self, number, change)

    with mock.patch.object(Server, "_advance", advanced):
        yield
