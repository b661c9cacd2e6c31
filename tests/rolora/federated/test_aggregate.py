"""Robust rules, weights, norm bounds, momentum and deadlines against independent statements."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from rolora.federated import aggregate, wire
from rolora.federated.delivery import Arrival
from rolora.federated.guard import Bounds, Norms
from rolora.federated.server import QuorumMissed
from rolora.transport.local import LocalTransport
from rolora_kernels.codecs import CODECS
from tests.rolora.federated import toy


def changes(layout, clients, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(clients, layout.travelling_size("B"))).astype(np.float32)


def aggregated(rule, trim, layout, values, order):
    collector = aggregate.collector(rule, trim, layout, "B", Bounds(64.0, 100, len(values)))
    for client in order:
        collector.add(client, torch.from_numpy(values[client]), 1 + client)
    return layout.join(collector.finish(), "B").numpy()


@pytest.mark.parametrize("clients", [1, 2, 5, 6])
def test_robust_rules_against_numpy_in_every_order(clients):
    _, layout = toy.model()
    values = changes(layout, clients)
    for rule, trim, truth in (
        ("median", 0.0, np.median(values.astype(np.float64), axis=0)),
        (
            "trimmed-mean",
            0.2,
            np.sort(values.astype(np.float64), 0)[(cut := int(0.2 * clients)) : clients - cut].mean(
                0
            ),
        ),
    ):
        results = [
            aggregated(rule, trim, layout, values, order)
            for order in itertools.islice(itertools.permutations(range(clients)), 24)
        ]
        np.testing.assert_allclose(results[0], truth, rtol=1e-6, atol=1e-7)
        assert all(np.array_equal(results[0], other) for other in results[1:])


def test_a_few_wrong_clients_move_the_mean_and_not_the_robust_rules():
    _, layout = toy.model()
    honest = changes(layout, 9)
    poisoned = honest.copy()
    poisoned[:2] = 50.0
    far = np.linalg.norm(honest.mean(0))
    moved = {
        rule: np.linalg.norm(
            aggregated(rule, 0.25, layout, poisoned, range(9))
            - aggregated(rule, 0.25, layout, honest, range(9))
        )
        for rule in aggregate.RULES
    }
    assert (
        moved["mean"] > 10 * far and moved["median"] < 3 * far and moved["trimmed-mean"] < 3 * far
    )


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_a_run_by_a_robust_rule_takes_every_client_once(rule):
    servers = [toy.server(rounds=4, options=dict(rule=rule, trim=0.2)) for _ in range(2)]
    for server in servers:
        server.run()
    assert torch.equal(servers[0].state.master["A"], servers[1].state.master["A"])
    mean = toy.server(rounds=4)
    mean.run()
    assert not torch.equal(mean.state.master["A"], servers[0].state.master["A"])


def sent(server, number, phase):
    """What the toy's clients send in a round, decoded, fp64 `[clients, n]`."""
    size, rows, bf16 = server.layout.travelling_size(phase), [], CODECS["bf16"]
    for client in range(len(toy.WEIGHTS)):
        generator = torch.Generator().manual_seed(1000 * number + client)
        rows.append(
            bf16.decode(bf16.encode(torch.randn(size, generator=generator) * 0.1)).double().numpy()
        )
    return np.stack(rows)


@pytest.mark.parametrize(
    "cap, weights", [(None, toy.WEIGHTS), (20, np.minimum(toy.WEIGHTS, 20)), (1, np.ones(6))]
)
def test_a_weight_counts_no_more_than_its_cap(cap, weights):
    server = toy.server(rounds=1, options=dict(max_weight=cap))
    before = {k: v.clone() for k, v in server.state.master.items()}
    server.run()
    moved = (
        server.layout.join({k: server.state.master[k] - before[k] for k in before}, "B")
        .double()
        .numpy()
    )
    np.testing.assert_allclose(
        moved, np.average(sent(server, 1, "B"), axis=0, weights=weights), atol=1e-6
    )


@pytest.mark.parametrize("momentum, lr", [(0.9, 1.0), (0.5, 0.3), (0.0, 0.3)])
def test_momentum_is_kept_for_each_factor_and_rests_with_it(momentum, lr):
    server = toy.server(rounds=6, options=dict(server_momentum=momentum, server_lr=lr))
    state = {k: v.double().numpy() for k, v in server.state.master.items()}
    moment = {k: np.zeros_like(v) for k, v in state.items()}
    server.run()
    for number in range(1, 7):
        phase = "B" if number % 2 else "A"
        mean = server.layout.part(
            torch.from_numpy(np.average(sent(server, number, phase), axis=0, weights=toy.WEIGHTS)),
            phase,
        )
        for kind, delta in mean.items():
            moment[kind] = momentum * moment[kind] + delta.numpy()
            state[kind] = state[kind] + lr * moment[kind]
    for kind, value in state.items():
        np.testing.assert_allclose(server.state.master[kind].double().numpy(), value, atol=2e-6)
    assert set(server.state.moments) == ({"A", "B", "head"} if momentum else set())


def test_momentum_is_that_of_torch_s_sgd():
    server = toy.server(rounds=6, options=dict(server_momentum=0.9, server_lr=0.7))
    judges = {k: v.double().clone().requires_grad_() for k, v in server.state.master.items()}
    optimizers = {kind: torch.optim.SGD([p], 0.7, momentum=0.9) for kind, p in judges.items()}
    server.run()
    for number in range(1, 7):
        phase = "B" if number % 2 else "A"
        mean = np.average(sent(server, number, phase), axis=0, weights=toy.WEIGHTS)
        for kind, delta in server.layout.part(torch.from_numpy(mean), phase).items():
            judges[kind].grad = -delta.clone()
            optimizers[kind].step()
    for kind, value in judges.items():
        gap = (server.state.master[kind] - value.detach()).abs().max()
        assert gap < 2e-6, kind


def loud(factor, since):
    """Client 2 sends `factor` times its change from round `since` on."""

    class Loud(LocalTransport):
        def run_round(self, tasks, deadline=None):
            for arrival in super().run_round(tasks, deadline):
                update = wire.decode_update(arrival.message, 1 << 30)
                if arrival.client == 2 and update.round >= since:
                    arrival = Arrival(
                        2, wire.encode_update(replace(update, change=(update.change * factor)))
                    )
                yield arrival

    return Loud


def test_the_norm_bound_is_the_phases_own_and_waits_for_two_rounds_of_it():
    rows = []
    toy.server(rounds=8, transport=loud(6.0, 1), bound=4.0, on_round=rows.append).run()
    assert [row["rejected"] for row in rows[1:5]] == [{}] * 4, (
        "two rounds of B and two of A are the warm-up"
    )
    assert [row["rejected"] for row in rows[5:]] == [{"norm over the bound": 1}] * 4
    assert "client 2: norm over the bound: a change of norm" in rows[5]["failures"][0]
    rows.clear()
    toy.server(rounds=8, transport=loud(6.0, 1), on_round=rows.append).run()
    assert all(not row["rejected"] for row in rows)


def test_norms_are_remembered_by_phase():
    norms = Norms(3.0)
    norms.record("B", [1.0, 2.0, 9.0]), norms.record("A", [100.0]), norms.record("B", [4.0])
    assert norms.bound("A") is None and norms.bound("B") == 3.0 * 3.0
    norms.record("B", [])
    assert len(norms.medians["B"]) == 2 and Norms(0.0, norms.medians).bound("B") is None


def test_a_deadline_closes_the_round_with_who_has_answered(monkeypatch):
    """By a clock that a client's training moves on by a second, and nothing else does."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slowly(server):
        train = server.trainer.train

        def slow(task, published, client_state):
            now[0] += 1.0
            return train(task, published, client_state)

        server.trainer.train = slow
        return server

    rows = []
    slowly(toy.server(rounds=2, options=dict(deadline=2.5), on_round=rows.append)).run()
    for row in rows[1:]:
        assert row["clients"] == 3 and row["rejected"] == {"deadline": 3}
    server = slowly(toy.server(rounds=1, options=dict(deadline=2.5, quorum=6)))
    with pytest.raises(QuorumMissed, match="deadline: the round's time was over before its turn"):
        server.run()


def test_a_repeated_round_asks_other_clients():
    asked = []

    class Deaf(LocalTransport):
        def run_round(self, tasks, deadline=None):
            asked.append([client for client, _ in tasks])
            return iter(()) if len(asked) < 3 else super().run_round(iter(()), deadline)

    with pytest.raises(QuorumMissed):
        toy.server(per_round=2, transport=Deaf).run()
    assert len({tuple(clients) for clients in asked}) > 1 and all(
        len(clients) == 2 for clients in asked
    )
