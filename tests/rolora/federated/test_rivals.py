"""The rivals of 2026 against their rules, stated in NumPy in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rolora.experiments import digits, two_layers
from rolora.federated import aggregate, guard, methods, sampling
from rolora.federated.methods import fedrot
from rolora.federated.state import GlobalState
from rolora.run.federation import build_server
from tests.rolora.federated import toy
from tests.rolora.federated.digits_run import seen_updates, weighted
from tests.rolora.federated.test_rounds import products, random_factors


def digits_server(method, rounds=3, **values):
    job = two_layers.prepare(
        two_layers.Setting(method, "10x1", 0.5, 0, rounds, 8, "digits"), digits.load(None), "test"
    )
    job.config = job.config.with_values(**values)
    server = build_server(job, on_round=lambda row: None)
    server.norms.multiple = 0.0
    return server, job


def nearest_rotation(correlation):
    """Kabsch: the rotation with the largest trace of its product with a matrix."""
    U, _, Vt = np.linalg.svd(correlation)
    signs = np.ones(len(U))
    signs[-1] = np.sign(np.linalg.det(U) * np.linalg.det(Vt))
    return (U * signs) @ Vt


def turned_clients(finished, seed=5):
    """(layout, state after `finished` rounds, clients' own factors, their transformed changes)."""
    _, layout = toy.model()
    rng = np.random.default_rng(seed)
    state = replace(GlobalState.initial(random_factors(layout, rng)), round=finished)
    context = methods.Context(state, layout, "BOTH", 0, lambda client: None, 64.0)
    locals_, made = [], []
    for client in range(len(toy.WEIGHTS)):
        step = random_factors(layout, rng)
        local = {kind: flat + 0.5 * step[kind] for kind, flat in state.published.items()}
        locals_.append(local)
        change = layout.join({k: local[k] - state.published[k] for k in local}, "BOTH")
        made.append(methods.load("fedrot").transform(context, client, change))
    return layout, state, locals_, made


@pytest.mark.parametrize("finished, fitted", [(1, "A"), (2, "B"), (3, "A")])
def test_fedrot_averages_factors_that_are_turned_towards_the_published_ones(finished, fitted):
    layout, state, locals_, made = turned_clients(finished)
    mean = aggregate.collector("mean", 0.0, layout, "BOTH", guard.Bounds(64.0, 40, 6))
    for client, change in enumerate(made):
        mean.add(client, change, toy.WEIGHTS[client])
    master = state.apply(mean.finish()).master
    A0, B0 = (layout.views(state.published, kind) for kind in "AB")
    for path in layout.adapters():
        turned = []
        for local in locals_:
            A, B = (layout.views(local, kind)[path].double().numpy() for kind in "AB")
            reference = (A0 if fitted == "A" else B0)[path].double().numpy()
            R = nearest_rotation(A @ reference.T if fitted == "A" else B.T @ reference)
            assert np.isclose(np.linalg.det(R), 1.0)
            turned.append((R.T @ A, B @ R))
        for kind, wanted in zip("AB", zip(*turned, strict=True), strict=True):
            mine = layout.views(master, kind)[path].double().numpy()
            np.testing.assert_allclose(mine, weighted(wanted), atol=1e-6)


def test_fedrot_turns_nothing_in_the_first_round_and_leaves_every_product():
    layout, state, locals_, made = turned_clients(0)
    for local, change in zip(locals_, made, strict=True):
        wanted = layout.join({k: local[k] - state.published[k] for k in local}, "BOTH")
        assert torch.equal(change, wanted)
    layout, state, locals_, made = turned_clients(1)
    for local, change in zip(locals_, made, strict=True):
        parts = layout.part(change, "BOTH")
        after = {kind: state.published[kind] + parts[kind] for kind in parts}
        for path, product in products(layout, after).items():
            np.testing.assert_allclose(product, products(layout, local)[path], atol=1e-5)
        assert torch.equal(parts["head"], local["head"] - state.published["head"])
        assert not torch.allclose(after["A"], local["A"], atol=1e-3), "or nothing was tested"


def test_a_client_that_is_another_one_turned_counts_as_that_one():
    """Procrustes undoes a rotation: what is published, turned, is no change at all."""
    _, layout = toy.model()
    rng = np.random.default_rng(0)
    state = replace(GlobalState.initial(random_factors(layout, rng)), round=1)
    angle = 0.8
    R = torch.eye(3, dtype=torch.float64)
    R[:2, :2] = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    local = {kind: flat.clone() for kind, flat in state.published.items()}
    for path, A in layout.views(local, "A").items():
        A.copy_(R.t() @ A.double())
        B = layout.views(local, "B")[path]
        B.copy_(B.double() @ R)
    context = methods.Context(state, layout, "BOTH", 0, lambda client: None, 64.0)
    change = layout.join({k: local[k] - state.published[k] for k in local}, "BOTH")
    assert change.abs().max() > 0.1
    assert fedrot.transform(context, 0, change).abs().max() < 1e-6


def test_a_softer_rotation_is_half_the_angle_and_no_reflection():
    angle = 1.2

    def turn(angle):
        c, s = np.cos(angle), np.sin(angle)
        return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)

    soft = fedrot.rotation(turn(angle) * 3.0, 0.5)
    torch.testing.assert_close(soft, turn(angle / 2))
    mirror = torch.diag(torch.tensor([2.0, -1.0], dtype=torch.float64))
    assert torch.linalg.det(fedrot.rotation(mirror, 1.0)) > 0.99


def test_a_client_whose_turned_factors_are_over_the_bound_is_refused_and_ends_nothing():
    """A column of B that fits within the bound can be over it once it is turned into another."""

    class Loud(toy.Drift):
        def train(self, task, published, client_state):
            update, state = super().train(task, published, client_state)
            if task.round == 2 and task.client == 3:
                update.change[:] = 0.0
                for path, view in self.layout.views(
                    self.layout.part(update.change, "BOTH"), "B"
                ).items():
                    view[0] = 0.9 * torch.ones(view.shape[1])
                    A = self.layout.views(published, "A")[path]
                    own = torch.linalg.qr(torch.ones(3, 3) + torch.eye(3)).Q @ A
                    self.layout.views(self.layout.part(update.change, "BOTH"), "A")[path].copy_(
                        own - A
                    )
            return update, state

    rows = []
    server = toy.server(
        "fedrot",
        rounds=3,
        dtype="fp32",
        trainer=Loud,
        on_round=rows.append,
        options=dict(max_abs=1.0),
    )
    server.run()
    assert rows[2]["rejected"] == {"over the bound": 1} and rows[2]["clients"] == 5
    assert rows[3]["rejected"] == {}


def test_la_lora_alternates_in_a_client_s_steps_with_b_at_twice_the_rate():
    server, job = digits_server("la-lora", rounds=1)
    updates = seen_updates(server)
    server.run()
    assert len(updates) == 10
    images, labels = (np.stack(part).astype(np.float64) for part in zip(*job.train, strict=True))
    out = job.model.out.weight.detach().double().numpy()  # [10, 64]
    config = job.trainer().config
    for update, change, published in updates:
        A, B = published["A"].view(8, -1).double().numpy(), published["B"].view(-1, 8)
        A, B = A.copy(), B.double().numpy()
        start, rows = (A.copy(), B.copy()), job.clients[update.client]
        plan = sampling.batches(0, 1, update.client, len(rows), 64, config.steps_for(len(rows)))
        assert len(plan) > 3
        for step, indices in enumerate(plan):
            x, y = images[rows[indices]], labels[rows[indices]].astype(int)
            hidden = x @ A.T @ B.T
            scores = np.maximum(hidden, 0) @ out.T
            p = np.exp(scores - scores.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            p[np.arange(len(y)), y] -= 1
            dh = (p / len(y)) @ out * (hidden > 0)
            gradient = dh.T @ (x @ A.T) if step % 2 == 0 else B.T @ dh.T @ x
            gradient *= min(1.0, 1.0 / (np.linalg.norm(gradient) + 1e-6))
            if step % 2 == 0:
                B -= 2 * 0.5 * gradient
            else:
                A -= 0.5 * gradient
        wanted = np.concatenate([(A - start[0]).ravel(), (B - start[1]).ravel()])
        mine = change.double().numpy()
        assert np.linalg.norm(mine - wanted) < 1e-4 * np.linalg.norm(wanted)


def test_la_lora_with_one_local_step_trains_b_alone():
    server, _ = digits_server("la-lora", rounds=1, local_epochs=None, local_steps=1)
    updates = seen_updates(server)
    server.run()
    for _, change, _ in updates:
        A, B = change.split(8 * 64)
        assert not A.any() and B.any()


def test_rates_of_a_kind_reach_either_optimizer():
    """AdamW's first step is the rate itself, whatever the gradient."""
    for engine in ("sequential", "batched"):
        server, _ = digits_server(
            "la-lora", rounds=1, local_epochs=None, local_steps=2, optimizer="adamw", engine=engine
        )
        updates = seen_updates(server)
        server.run()
        for _, change, _ in updates:
            A, B = change.split(8 * 64)
            assert abs(A.abs().max() - 0.5) < 1e-3 and abs(B.abs().max() - 1.0) < 1e-3
