"""Error feedback: whatever the wire rounds away arrives in the end."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rolora.federated import moments
from rolora.federated.layout import fingerprint
from rolora.federated.local import RESTING
from rolora.federated.turn import length, matrices, turned
from rolora.federated.wire import Task
from rolora.run.federation import build_server
from rolora_kernels.codecs import CODECS
from tests.rolora.cohorts import prepared
from tests.rolora.federated.factor_pairs import factors, random_state


def answers(files, dtype, feedback, rounds=(1, 2, 3, 4, 5), **extra):
    """(phase → decoded changes of client 1 in these rounds, its state), all from one start."""
    own = extra | {"error_feedback": feedback, "control_variates": False}
    made = prepared(files, optimizer="sgd", **own)
    trainer, published = made.trainer(), made.initial_factors()
    draw = torch.Generator().manual_seed(3)
    published = {k: v + 0.05 * torch.randn(v.shape, generator=draw) for k, v in published.items()}
    prints = {kind: fingerprint(flat) for kind, flat in published.items()}
    sent, state = {"A": [], "B": []}, {}
    for number in rounds:
        phase = "B" if number % 2 else "A"
        task = Task("r", number, phase, 1, made.layout.hash, {}, prints, dtype, 0.1, {}, {})
        update, state = trainer.train(task, published, state)
        sent[phase].append(made.layout.part(CODECS[dtype].decode(update.change), phase))
    return sent, state


def total(parts, kind):
    return sum(part[kind].double() for part in parts)


@pytest.mark.parametrize("dtype", ["int4", "bf16"])
@pytest.mark.parametrize("extra", [{}, {"local_coordinates": True}], ids=["plain", "turned back"])
def test_what_was_sent_and_what_is_left_are_all_that_was_done(dtype, extra, files):
    """Σ q = Σ change − e, with the changes of a client that rounds nothing as the judge. A factor's
    rest waits for its next round; a head's travels with every one.
    """
    done, _ = answers(files, "fp32", False, **extra)
    sent, state = answers(files, dtype, True, **extra)
    plain, none = answers(files, dtype, False, **extra)
    assert not none
    for kind in ("A", "B", "head"):
        phases = "AB" if kind == "head" else kind
        wanted, ours, without = (
            sum(total(made[phase], kind) for phase in phases) for made in (done, sent, plain)
        )
        left = state[f"left.{kind}"].double()
        scale = wanted.abs().max()
        assert (ours + left - wanted).abs().max() <= 1e-5 * scale
        assert 0 < left.norm() and (without - wanted).norm() > (ours + left - wanted).norm() * 100
        # One rounding's worth, of five: what is left does not add up.
        assert left.norm() < (without - wanted).norm() * 1.5


@pytest.mark.parametrize("own", [{}, {"equal_factors": True}], ids=["plain", "handed over"])
def test_a_cohort_remembers_the_same(own, files):
    from rolora.cohort.batched import Batched
    from rolora.cohort.sequential import Sequential
    from tests.rolora.cohorts import started

    made = prepared(files, optimizer="sgd", error_feedback=True, control_variates=False, **own)
    before = {"left.A": torch.ones(1)}
    if own:  # of a round in which another A rested
        draw, sizes = torch.Generator().manual_seed(2), made.layout.sizes
        before["left.B"] = 1e-2 * torch.randn(sizes["B"], generator=draw)
        before["frame.B"] = torch.randn(sizes["A"], generator=draw)
    orders = [
        (replace(task, exchange_dtype="bf16"), published, dict(before))
        for task, published, _ in started(made, "B")
    ]
    trainer = made.trainer()
    alone = {client: state for client, _, state in Sequential(trainer).train(orders)}
    together = {
        client: state for client, _, state in Batched(trainer, made.report.heads, 5).train(orders)
    }
    for client, state in alone.items():
        kept = {"left.A", "left.B", "left.head", *before}
        assert set(state) == set(together[client]) == kept
        if own:
            assert torch.equal(state["frame.B"], orders[client][1]["A"])
            assert torch.equal(together[client]["frame.B"], state["frame.B"])
        assert torch.equal(state["left.A"], torch.ones(1))
        for name in ("left.B", "left.head"):
            # A rounding may go the other way for a change that is not bit for bit the same.
            gap = (state[name] - together[client][name]).abs()
            assert (gap > 1e-6).float().mean() < 0.02


@pytest.mark.parametrize("phase", ["A", "B"])
def test_what_is_left_follows_factors_that_turn(phase):
    """`B A = (B G⁻¹)(G A)`: the same change of the product in the new coordinates, by NumPy."""
    layout, state = random_state(2)
    other = RESTING[phase]
    held, draw = state.published, np.random.default_rng(5)
    turn = torch.from_numpy(draw.normal(size=length(layout)))
    inverse = torch.cat([torch.linalg.inv(G).reshape(-1) for G in matrices(layout, turn).values()])
    G = {other: turn, phase: inverse}
    new = {kind: turned(layout, kind, held[kind], G[kind]) for kind in ("A", "B")}
    left = torch.from_numpy(draw.normal(size=layout.sizes[phase])).float()
    kept = {f"left.{phase}": left, f"frame.{phase}": held[other]}
    moved = moments.realigned(layout, phase, moments.frame(phase, new), kept, handed_over=True)
    before, after = (
        {other: factor, phase: rest}
        for factor, rest in ((held[other], left), (new[other], moved[f"left.{phase}"]))
    )
    for (A, B), (new_A, new_B) in zip(
        factors(layout, before).values(), factors(layout, after).values(), strict=True
    ):
        np.testing.assert_allclose(new_B @ new_A, B @ A, atol=1e-4 * np.abs(B @ A).max())
    assert not torch.equal(moved[f"left.{phase}"], left)
    assert torch.equal(kept[f"left.{phase}"], left), "the state itself stays"


@pytest.mark.parametrize("how", ["balance", "equal_factors"])
def test_feedback_that_follows_is_worth_more_than_one_that_does_not(how, files, monkeypatch):
    """A run in int4 ends nearer to the one that rounds nothing."""

    def end(**own):
        own |= {"rounds": 12, "optimizer": "sgd", "lr": 0.1, how: True}
        made = prepared(files, control_variates=False, **own)
        server = build_server(made, on_round=lambda row: None)
        server.run()
        pairs = factors(made.layout, server.state.published).values()
        return np.concatenate([(B @ A).ravel() for A, B in pairs])

    exact = end(exchange_dtype="fp32")
    gaps = [
        np.linalg.norm(end(exchange_dtype="int4", error_feedback=feedback) - exact)
        for feedback in (True, False)
    ]
    stay = lambda layout, phase, now, state, handed_over: state  # noqa: E731
    monkeypatch.setattr(moments, "realigned", stay)
    stays = np.linalg.norm(end(exchange_dtype="int4", error_feedback=True) - exact)
    assert 0 < gaps[0] < 0.85 * gaps[1] and gaps[0] < 0.9 * stays
