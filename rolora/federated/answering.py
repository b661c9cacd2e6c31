"""What a client sends when it has trained: the change of the travelling tensors, on the wire."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rolora.federated import codec
from rolora.federated.layout import Layout, rank_of
from rolora.federated.local import ClientState, LocalConfig, Report, Start
from rolora.federated.moments import LEFT
from rolora.federated.turn import matrices
from rolora.federated.wire import Task, Update
from rolora_kernels.codecs import CODECS
from rolora_kernels.exchange import pack_change


@torch.no_grad()
def answer(
    layout: Layout,
    config: LocalConfig,
    task: Task,
    start: Start,
    trained: Sequence[Tensor],
    report: Report,
    client_state: ClientState,
) -> tuple[Update, ClientState]:
    """The answer to a task: what training from `start` changed in the travelling tensors, which now
    are `trained`; and what a client remembers of it.

    With error feedback (Seide et al. 2014) that is what the wire left of each kind, e: what is sent
    is `q = Q(change + e)`, and then `e ← change + e − q`, so that nothing is lost, but late. Where
    factors are handed over e has followed them (`moments.realigned`), as far as they can say it.
    """
    key = codec.key(config.seed, task.round, f"client {task.client}")
    before: list[Tensor] | None = _held(layout, task.phase, start)
    trained = layout.split(trained, layout.travelling(task.phase))
    if start.back is not None:
        trained, before = _turned_back(layout, task.phase, start, start.back, trained), None
    wire_codec, ranks = CODECS[task.exchange_dtype], None
    left: ClientState = {}
    if config.selects or config.client_ranks is not None:
        whole = pack_change(trained, before, CODECS["fp32"], key).wire
        bits = _selected(layout, config, task, start, whole)
        sent = whole[layout.chosen(bits, task.phase)]
        change, ranks = wire_codec.encode(sent, key), codec.pack_bits(bits)
    elif config.error_feedback:
        whole = pack_change(trained, before, CODECS["fp32"], key).wire
        whole = whole + left_of(layout, task.phase, client_state)
        change = wire_codec.encode(whole, key)
        rest = layout.part(whole - wire_codec.decode(change), task.phase)
        left = {f"{LEFT}{kind}": part.clone() for kind, part in rest.items()}
    else:
        change = pack_change(trained, before, wire_codec, key).wire
    return _update(task, report, change, ranks), left


def _update(task: Task, report: Report, change: Tensor, ranks: Tensor | None) -> Update:
    return Update(
        run=task.run,
        round=task.round,
        phase=task.phase,
        client=task.client,
        layout=task.layout,
        versions=task.versions,
        weight=report.weight,
        loss=report.loss,
        examples=report.examples,
        tokens=report.tokens,
        change=change,
        ranks=ranks,
    )


def left_of(layout: Layout, phase: str, client_state: ClientState) -> Tensor:
    """What the wire left of a client's earlier changes of the travelling kinds, fp32 `[n]`."""
    parts = [
        client_state.get(f"{LEFT}{kind}", torch.zeros(layout.sizes[kind]))
        for kind in layout.travelling(phase)
    ]
    return torch.cat(parts)


def remembered(client_state: ClientState) -> ClientState:
    """What a client's state holds of that, of all kinds."""
    return {name: rest for name, rest in client_state.items() if name.startswith(LEFT)}


def _held(layout: Layout, phase: str, start: Start) -> list[Tensor]:
    """The travelling tensors before training."""
    kinds = layout.travelling(phase)
    return [view for kind in kinds for view in layout.views(start.held, kind).values()]


def _turned_back(
    layout: Layout, phase: str, start: Start, back: Tensor, trained: Sequence[Tensor]
) -> list[Tensor]:
    """The changes in the published coordinates of what was trained in local ones.

    The turn is linear, so it is the change that turns; no other peer repeats this, so it need not
    be the same bits everywhere.
    """
    before = _held(layout, phase, start)
    changes = [after - first for after, first in zip(trained, before, strict=True)]
    # The factor that trains comes first, then a head.
    for i, matrix in enumerate(matrices(layout, back).values()):
        matrix = matrix.to(changes[i].device)
        if phase == "A":
            changes[i] = (matrix @ changes[i].double()).float()
        else:
            changes[i] = (changes[i].double() @ matrix).float()
    return changes


def _selected(
    layout: Layout, config: LocalConfig, task: Task, start: Start, change: Tensor
) -> Tensor:
    """The ranks that are sent, bool `[ranks]`.

    A client's first ones, or those whose change moves the product most.
    """
    adapters = layout.adapters()
    budgets = layout.budgets(rank_of(config.client_ranks, task.client))
    if not config.selects:
        ranks = [rank for rank, _, _ in adapters.values()]
        firsts = zip(ranks, budgets, strict=True)
        return torch.cat([torch.arange(rank) < budget for rank, budget in firsts])
    moved = layout.views(layout.part(change, task.phase), task.phase)
    if task.phase == "A":
        frozen = layout.views(start.published, "B")
        norms = [moved[path].norm(dim=1) * frozen[path].norm(dim=0) for path in adapters]
    else:
        frozen = layout.views(start.published, "A")
        norms = [moved[path].norm(dim=0) * frozen[path].norm(dim=1) for path in adapters]
    importance = torch.cat(norms)
    bits = torch.zeros(len(importance), dtype=torch.bool)
    bits[importance.argsort(descending=True, stable=True)[: sum(budgets)]] = True
    return bits
