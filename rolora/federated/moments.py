"""AdamW's moments that stay with a client from one of its rounds to the next, by kind, and how they
follow factors that have changed meanwhile, with what error feedback has left.

A factor's gradient is a view of that of the whole product, `g_B = G Aᵀ` and `g_A = Bᵀ G`, through
the factor that rests. When B's turn comes again A has moved, and a moment of the old view is one of
other coordinates. `realigned` reads the moment of G that the old view held, `M = m_B (A Aᵀ)⁻¹ A`
(the least of those with `M Aᵀ = m_B`), through the new one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rolora.federated.layout import Layout
from rolora.federated.local import ClientState

_NAMES = ("exp_avg", "exp_avg_sq")  # as torch.optim.AdamW calls them
_OTHER = {"A": "B", "B": "A"}  # the factor that rests while one trains
_FRAME = "frame."  # before a kind: the factor that rested when it trained last
LEFT = "left."  # before a kind: what the wire left of its changes (federated.answering)
_LEAST = 1e-8  # of the largest eigenvalue of F Fᵀ: what is below says nothing of M


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


def frame(phase: str, held: dict[str, Tensor]) -> ClientState:
    """What a client remembers so that what it keeps can be realigned: the factor that rested."""
    return {f"{_FRAME}{phase}": held[_OTHER[phase]].cpu()}


def frames(client_state: ClientState) -> ClientState:
    """What a client's state holds of that, of both factors."""
    return {name: factor for name, factor in client_state.items() if name.startswith(_FRAME)}


def realigned(
    layout: Layout,
    phase: str,
    now: ClientState,
    client_state: ClientState,
    handed_over: bool = False,
) -> ClientState:
    """A client's state with the moments of the factor that trains in the coordinates of the factor
    that rests now, in `now` as `frame` gives it; and where factors are `handed_over`, with what the
    wire left of it in these coordinates.

    With F the factor that rests, `[r, K]` (A, or Bᵀ), and `R = (F Fᵀ)⁺ F F'ᵀ` from the old to the
    new one: `m_B ← m_B R` and `m_A ← Rᵀ m_A`. Second moments, of which AdamW keeps the diagonal of
    what a step's g gᵀ is on average, take that of the turned diagonal matrix: `v_B ← v_B R²`,
    element by element. Exact where the new factor spans what the old one did (the second where it
    is a permuted or rescaled one); what the old one did not see stays unknown, and is zero. What
    travels beside the factor (a head) is as it was.

    What was left is a change, and goes the other way: `e_B ← e_B F F'ᵀ (F' F'ᵀ)⁺` comes nearest to
    the same change of the product; what the new factor cannot say of it is lost.
    """
    then = client_state.get(f"{_FRAME}{phase}")
    if then is None or torch.equal(then, now[f"{_FRAME}{phase}"]):
        return client_state
    other = _OTHER[phase]
    old = layout.views({other: then}, other)
    new = layout.views({other: now[f"{_FRAME}{phase}"]}, other)
    # What each is multiplied by, `[r, r]`: B's from the right, A's by the transpose from the left.
    maps: dict[str, dict[str, Tensor]] = {}
    if f"{_NAMES[0]}.{phase}" in client_state:
        first = {path: _between(old[path], new[path], other) for path in old}
        second = {path: R.square() for path, R in first.items()}
        maps = {f"{name}.{phase}": own for name, own in zip(_NAMES, (first, second), strict=True)}
    if handed_over and (key := f"{LEFT}{phase}") in client_state:
        maps[key] = {path: _between(new[path], old[path], other).t() for path in old}
    moved = dict(client_state)
    for key, map_of in maps.items():
        moved[key] = client_state[key].clone()
        for path, kept in layout.views({phase: moved[key]}, phase).items():
            R = map_of[path]
            kept.copy_(kept.double() @ R if phase == "B" else R.t() @ kept.double())
    return moved | now


def _between(old: Tensor, new: Tensor, kind: str) -> Tensor:
    """R fp64 `[r, r]`, the least squares solution of `Fᵀ R = F'ᵀ`, for a factor A or Bᵀ that was F
    and is F'.
    """
    F, G = (part.double() if kind == "A" else part.double().t() for part in (old, new))
    return torch.linalg.pinv(F @ F.t(), rtol=_LEAST, hermitian=True) @ (F @ G.t())
