"""What a client sends when it has trained: the change of the travelling tensors, on the wire."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rolora.federated import codec
from rolora.federated.layout import Layout, rank_of
from rolora.federated.local import LocalConfig, Report, Start
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
) -> Update:
    """The answer to a task: what training from `start` changed in the travelling tensors, which now
    are `trained`.
    """
    key = codec.key(config.seed, task.round, f"client {task.client}")
    before: list[Tensor] | None = _held(layout, task.phase, start)
    trained = layout.split(trained, layout.travelling(task.phase))
    if start.back is not None:
        trained, before = _turned_back(layout, task.phase, start, start.back, trained), None
    wire_codec, ranks = CODECS[task.exchange_dtype], None
    if config.selects or config.client_ranks is not None:
        whole = pack_change(trained, before, CODECS["fp32"], key).wire
        bits = _selected(layout, config, task, start, whole)
        sent = whole[layout.chosen(bits, task.phase)]
        change, ranks = wire_codec.encode(sent, key), codec.pack_bits(bits)
    else:
        change = pack_change(trained, before, wire_codec, key).wire
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
