"""AdamW's moments that stay with a client from one of its rounds to the next, by kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rolora.federated.layout import Layout
from rolora.federated.local import ClientState

_NAMES = ("exp_avg", "exp_avg_sq")  # as torch.optim.AdamW calls them


def gather(
    optimizer: torch.optim.Optimizer, layout: Layout, model: nn.Module, kinds: Sequence[str]
) -> ClientState:
    """The moments and steps of each kind, flat, on the CPU. A factor that no gradient came to (an
    expert's that no token was sent to) has moments of zero.
    """
    found = {}
    for kind in kinds:
        parameters = layout.parameters(model, kind)
        for name in _NAMES:
            moments = [optimizer.state[p].get(name, torch.zeros_like(p)) for p in parameters]
            found[f"{name}.{kind}"] = torch.cat([moment.flatten() for moment in moments]).cpu()
        steps = [optimizer.state[p].get("step", torch.zeros(())) for p in parameters]
        found[f"step.{kind}"] = torch.stack(steps).max().reshape(1).cpu()
    return found


def scatter(
    optimizer: torch.optim.Optimizer,
    layout: Layout,
    model: nn.Module,
    kinds: Sequence[str],
    client_state: ClientState,
) -> None:
    """Puts back what `gather` gave after the last round in which these kinds trained."""
    for kind in kinds:
        if f"step.{kind}" not in client_state:
            continue
        parameters = layout.parameters(model, kind)
        sizes = [p.numel() for p in parameters]
        first, second = (client_state[f"{name}.{kind}"].split(sizes) for name in _NAMES)
        for p, mean, square in zip(parameters, first, second, strict=True):
            optimizer.state[p] = {
                "step": client_state[f"step.{kind}"].reshape(()).clone(),
                "exp_avg": mean.view(p.shape).to(p, copy=True),
                "exp_avg_sq": square.view(p.shape).to(p, copy=True),
            }
