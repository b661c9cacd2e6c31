"""Moments that follow the factor that rests, judged by what they are moments of: NumPy in float64
has the gradient of the whole product, which no client sees.
"""

import numpy as np
import pytest
import torch

from rolora.federated import moments
from tests.rolora.federated import toy

B1, B2 = 0.9, 0.999
STEPS = 5


def average(gradients, beta):
    """AdamW's moving average of these, oldest first."""
    found = np.zeros_like(gradients[0])
    for gradient in gradients:
        found = beta * found + (1 - beta) * gradient
    return found


@pytest.fixture
def adapters():
    """path → STEPS gradients of the product, and the factors of before, in float64."""
    _, layout = toy.model()
    rng = np.random.default_rng(2)
    return layout, {
        path: (
            rng.normal(size=(STEPS, N, K)),
            {"A": rng.normal(size=(rank, K)), "B": rng.normal(size=(N, rank))},
        )
        for path, (rank, K, N) in layout.adapters().items()
    }


def seen(phase, G, factor):
    """The gradient of the factor that trains, through the one that rests."""
    return G @ factor.T if phase == "B" else factor.T @ G


def state_of(layout, phase, made):
    """What a client carries that has seen those gradients."""
    other = "A" if phase == "B" else "B"
    first, second, frame = [], [], []
    for gradients, factors in made.values():
        own = [seen(phase, G, factors[other]) for G in gradients]
        first.append(average(own, B1).ravel())
        second.append(average([g**2 for g in own], B2).ravel())
        frame.append(factors[other].ravel())
    as_flat = {
        f"exp_avg.{phase}": first,
        f"exp_avg_sq.{phase}": second,
        f"frame.{phase}": frame,
    }
    return {
        name: torch.from_numpy(np.concatenate(parts)).float() for name, parts in as_flat.items()
    }


def realigned(layout, phase, made, turns):
    """The state after what rests was turned: A ← T A, or B ← B T."""
    other = "A" if phase == "B" else "B"
    moved = {
        path: factors[other] if turns is None else _turned(other, factors[other], turns)
        for path, (_, factors) in made.items()
    }
    flat = np.concatenate([factor.ravel() for factor in moved.values()])
    now = moments.frame(phase, {other: torch.from_numpy(flat).float()})
    return moments.realigned(layout, phase, now, state_of(layout, phase, made)), moved


def _turned(kind, factor, T):
    return T @ factor if kind == "A" else factor @ T


TURNS = {
    "any": np.array([[1.0, 0.5, -2.0], [0.3, -1.0, 0.2], [0.0, 2.0, 1.0]]),
    "permuted": np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
    "rescaled": np.diag([0.1, 3.0, -1.0]),
}


@pytest.mark.parametrize("phase", ["A", "B"])
@pytest.mark.parametrize("turn", TURNS)
def test_they_are_the_moments_of_one_who_had_the_new_factor_all_along(adapters, phase, turn):
    layout, made = adapters
    state, moved = realigned(layout, phase, made, TURNS[turn])
    first = layout.views({phase: state[f"exp_avg.{phase}"]}, phase)
    second = layout.views({phase: state[f"exp_avg_sq.{phase}"]}, phase)
    for path, (gradients, _) in made.items():
        own = [seen(phase, G, moved[path]) for G in gradients]
        wanted = average(own, B1)
        assert np.abs(first[path].numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()
        if turn != "any":  # a diagonal is all that AdamW keeps
            wanted = average([g**2 for g in own], B2)
            assert np.abs(second[path].numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()
        assert (second[path] >= 0).all()


@pytest.mark.parametrize("phase", ["A", "B"])
def test_what_the_old_factor_did_not_see_is_unknown(adapters, phase):
    """A new factor is old directions and new ones: of the new ones there is no moment."""
    layout, made = adapters
    other = "A" if phase == "B" else "B"
    moved = []
    for _, factors in made.values():
        F = factors[other] if other == "A" else factors[other].T
        beside = np.linalg.svd(F)[2][len(F) :][:1]  # orthogonal to all rows of F
        new = np.concatenate([beside, F[:2]])
        moved.append((new if other == "A" else new.T).ravel())
    now = moments.frame(phase, {other: torch.from_numpy(np.concatenate(moved)).float()})
    before = state_of(layout, phase, made)
    state = moments.realigned(layout, phase, now, before)
    for name in ("exp_avg", "exp_avg_sq"):
        old = layout.views({phase: before[f"{name}.{phase}"]}, phase)
        for path, view in layout.views({phase: state[f"{name}.{phase}"]}, phase).items():
            view, was = (m if phase == "A" else m.t() for m in (view, old[path]))
            assert view[0].abs().max() < 1e-5 * was.abs().max()
            assert torch.allclose(view[1:], was[:2], rtol=1e-4, atol=1e-6)


def test_nothing_moves_while_the_factor_stays_and_for_who_comes_first(adapters):
    layout, made = adapters
    state, _ = realigned(layout, "B", made, None)
    before = state_of(layout, "B", made)
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert moments.realigned(layout, "B", moments.frame("B", {"A": torch.zeros(1)}), {}) == {}


def test_twice_is_once(adapters):
    """A client that failed after its moments were turned does not turn them again."""
    layout, made = adapters
    state, moved = realigned(layout, "B", made, TURNS["any"])
    flat = np.concatenate([factor.ravel() for factor in moved.values()])
    now = moments.frame("B", {"A": torch.from_numpy(flat).float()})
    again = moments.realigned(layout, "B", now, state)
    assert all(torch.equal(again[name], value) for name, value in state.items())
