"""Control variates (SCAFFOLD, Karimireddy et al., ICML 2020) that cost no bytes.

During its local steps a client drifts towards what only it wants. It remembers where its own steps
went in its last round of a kind, and what was published then; what is published when that kind
trains again tells where everybody's went. Every local step is corrected by the difference. Of a
round of K steps at the rate η, which moved a client by Δ_i:

    own         = Δ_i / (K η) − correction
    mean        = (published now − published then) / (n K η), n publications later
    correction  = mean − own
    θ ← (the optimizer's step) + η · correction

For SGD that is SCAFFOLD with its second option, `own` being a mean gradient; for other optimizers
it is their mean step. SCAFFOLD sends its variates. Here nothing is sent: in a round that trains one
factor nothing else moves, so the published factor is the sum of what clients did. Where all take
part with equal weights and steps the corrections sum to zero. A client's first round of a kind has
none. What is remembered is in published coordinates, where a client trains in local ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rolora.federated.layout import Layout
from rolora.federated.local import ClientState, Start
from rolora.federated.turn import matrices
from rolora.federated.wire import Task

_OWN, _THEN, _AT = "own.", "then.", "at."  # before a kind's name in a client's state
Corrections = Mapping[str, Tensor]  # kind → over the rate, flat fp32, as it is trained


def corrections(
    layout: Layout, task: Task, start: Start, client_state: ClientState
) -> dict[str, Tensor]:
    """What every step of a task is corrected by; kinds without an earlier round are left out."""
    found = {}
    for kind in layout.travelling(task.phase):
        if f"{_OWN}{kind}" not in client_state:
            continue
        size, version = client_state[f"{_AT}{kind}"].tolist()
        later = max(1.0, task.versions.get(kind, 0) - version)
        moved = start.published[kind].cpu() - client_state[f"{_THEN}{kind}"]
        found[kind] = moved / (size * later) - client_state[f"{_OWN}{kind}"]
    if start.back is not None and task.phase in found:
        found[task.phase] = _turned(layout, task.phase, found[task.phase], start.back, inverse=True)
    return found


def remembered(
    layout: Layout,
    task: Task,
    start: Start,
    steps: int,
    trained: Mapping[str, Sequence[Tensor]],
    added: Corrections,
) -> ClientState:
    """What a client keeps of a round of so many steps; trained: kind → its tensors after them.

    Nothing of a round at a rate of 0, in which it went nowhere.
    """
    state: ClientState = {}
    size = steps * task.lr
    if size == 0:
        return state
    for kind in layout.travelling(task.phase):
        after = torch.cat([tensor.detach().flatten() for tensor in trained[kind]]).cpu()
        own = (after - start.held[kind].cpu()) / size
        if kind in added:
            own = own - added[kind]
        if start.back is not None and kind == task.phase:
            own = _turned(layout, kind, own, start.back, inverse=False)
        state[f"{_OWN}{kind}"] = own
        state[f"{_THEN}{kind}"] = start.published[kind].cpu().clone()
        state[f"{_AT}{kind}"] = torch.tensor([size, task.versions.get(kind, 0)]).double()
    return state


def kept(client_state: ClientState) -> ClientState:
    """What a client's state holds of that, of all kinds."""
    prefixes = (_OWN, _THEN, _AT)
    return {name: value for name, value in client_state.items() if name.startswith(prefixes)}


def kept_bytes(layout: Layout) -> int:
    """Of one client that has trained every kind: two fp32 values for one that travels."""
    return sum(8 * size + 16 for size in layout.sizes.values())


def by_parameter(
    trained: Mapping[str, Sequence[Tensor]], added: Corrections
) -> list[tuple[Tensor, Tensor]]:
    """(parameter, its correction) of one client's parameters by kind."""
    pairs = []
    for kind, flat in added.items():
        own = list(trained[kind])
        parts = flat.to(own[0].device).split([p.numel() for p in own])
        pairs += [(p, part.view(p.shape)) for p, part in zip(own, parts, strict=True)]
    return pairs


def by_cohort(
    trained: Mapping[str, Sequence[Tensor]], each: Sequence[Corrections]
) -> list[tuple[Tensor, Tensor]]:
    """The same of clients that train together: parameters `[clients, …]`. One that has no
    correction yet has zeros.
    """
    pairs = []
    for kind, stacked in trained.items():
        if not any(kind in own for own in each):
            continue
        none = torch.zeros(sum(p[0].numel() for p in stacked))
        rows = torch.stack([own.get(kind, none) for own in each]).to(stacked[0].device)
        parts = rows.split([p[0].numel() for p in stacked], dim=1)
        pairs += [(p, part.view(p.shape)) for p, part in zip(stacked, parts, strict=True)]
    return pairs


@torch.no_grad()
def correct(pairs: Sequence[tuple[Tensor, Tensor]], lr: float) -> None:
    """After an optimizer's step of the rate `lr`."""
    if pairs:
        parameters, added = zip(*pairs, strict=True)
        torch._foreach_add_(parameters, added, alpha=lr)


def _turned(layout: Layout, kind: str, flat: Tensor, back: Tensor, inverse: bool) -> Tensor:
    """A change of a factor in local coordinates as one in published ones, or (`inverse`) the other
    way round. `back`: the matrices that turn changes back.
    """
    result = flat.clone()
    views = layout.views({kind: result}, kind)
    for path, matrix in matrices(layout, back.cpu()).items():
        old, turn = views[path].double(), torch.linalg.inv(matrix) if inverse else matrix
        views[path].copy_(turn @ old if kind == "A" else old @ turn)
    return result
