"""The rival methods against their rules, stated in NumPy, and the bytes that each sends."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rolora.experiments import digits, two_layers
from rolora.federated import aggregate, codec, guard, methods, term, wire
from rolora.federated.layout import TERM
from rolora.federated.state import GlobalState
from rolora.run.federation import build_server
from tests.rolora.federated import toy
from tests.rolora.federated.test_rounds import collected, products


def weighted(values):
    return sum(w * v for w, v in zip(toy.WEIGHTS, values, strict=True)) / sum(toy.WEIGHTS)


def mean_product(layout, locals_, path):
    return weighted([products(layout, local)[path] for local in locals_])


def base_change(layout, state):
    """U V of every adapter, NumPy."""
    return {
        path: U.double().numpy() @ V.double().numpy()
        for path, (U, V) in layout.term_views(state.master[TERM]).items()
    }


def test_flora_adds_the_stack_to_the_base_exactly_and_starts_afresh():
    layout, locals_, state = collected("flora", "BOTH")
    for path, change in base_change(layout, state).items():
        wanted = mean_product(layout, locals_, path)
        assert np.linalg.norm(change - wanted) < 1e-6 * np.linalg.norm(wanted)
    assert term.rank(layout, state.master[TERM]) == 6 * 3
    bound = 1 / np.sqrt(layout.views(state.master, "A")["q_proj"].shape[1])
    A = layout.views(state.master, "A")["q_proj"]
    assert A.abs().max() <= bound and A.abs().max() > 0.8 * bound, (
        "uniform in ±1/sqrt(in), as PEFT draws A"
    )


def test_flora_s_model_after_three_rounds_is_the_sum_of_what_was_learnt():
    """Published term + s·B·A, and the base itself unchanged, on a model that runs."""
    server = toy.server("flora", rounds=3, dtype="fp32")
    changes = []
    advance = server._advance
    server._advance = lambda number, change: changes.append(change[TERM]) or advance(number, change)
    term.most, kept = lambda layout: 1000, term.most  # so that nothing is cut
    try:
        server.run()
    finally:
        term.most = kept
    assert (
        torch.equal(server.state.published[TERM], torch.cat(changes))
        and not server.state.master["B"].any()
    )
    net, layout = toy.model()
    weights = {path: net.get_submodule(path).weight.clone() for path in layout.adapters()}
    layout.scatter(net, server.state.published)
    x = torch.randn(5, 10)
    whole = {
        path: sum(
            U.double() @ V.double()
            for U, V in [layout.term_views(piece)[path] for piece in changes]
        )
        for path in weights
    }
    layer = net.get_submodule("q_proj")
    wanted = x.double() @ (layer.weight.double() + layer.scaling * whole["q_proj"]).t() + layer.bias
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)
    assert all(
        torch.equal(net.get_submodule(path).weight, weight) for path, weight in weights.items()
    )
    layer.merge()
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)


def test_fedex_adds_what_the_product_of_the_means_lacks():
    layout, locals_, state = collected("fedex", "BOTH")
    of_means = products(layout, state.master)
    for path, change in base_change(layout, state).items():
        wanted = mean_product(layout, locals_, path)
        assert np.linalg.norm(of_means[path] + change - wanted) < 1e-6 * np.linalg.norm(wanted)
        assert np.linalg.norm(of_means[path] - wanted) > 1e-2 * np.linalg.norm(wanted), (
            "or nothing was tested"
        )
    plain = collected("fedavg", "BOTH")[2]
    assert all(torch.equal(plain.master[kind], state.master[kind]) for kind in ("A", "B", "head"))


def test_fedex_with_equal_clients_has_no_residual():
    net, layout = toy.model()
    state = GlobalState.initial(layout.gather(net, tuple(layout.sizes)), changes_base=True)
    mean = aggregate.collector("mean", 0.0, layout, "BOTH", guard.Bounds(64.0, 10, 3))
    collector = methods.load("fedex").collect(
        methods.Context(state, layout, "BOTH", 0, lambda c: None), mean
    )
    change = torch.randn(layout.travelling_size("BOTH")) * 0.1
    for client in range(3):
        collector.add(client, change, 10)
    layout_term = collector.finish().get(TERM, torch.zeros(0))
    views = layout.term_views(layout_term) if len(layout_term) else {}
    assert all(float((U @ V).abs().max()) < 1e-6 for U, V in views.values())


def test_a_term_past_its_rank_is_cut_to_the_best_one_and_says_what_that_cost():
    layout, _, state = collected("flora", "BOTH")
    before = base_change(layout, state)
    assert term.rank(layout, state.master[TERM]) > term.most(layout)
    cut, error = term.compress(layout, state)
    kept = max(1, term.most(layout) // 2)
    lost = whole = 0.0
    for path, change in base_change(layout, cut).items():
        U, S, Vt = np.linalg.svd(before[path])
        np.testing.assert_allclose(change, (U[:, :kept] * S[:kept]) @ Vt[:kept], atol=1e-5 * S[0])
        lost, whole = lost + (S[kept:] ** 2).sum(), whole + (S**2).sum()
    assert np.isclose(error, np.sqrt(lost / whole), rtol=1e-4) and error > 1e-3
    assert term.compress(layout, cut) == (cut, 0.0)


def test_flexlora_and_flora_take_ranks_of_each_client():
    ranks = (1, 3, 2)
    for method in ("flexlora", "flora"):
        layout, locals_, _ = collected(method, "BOTH")
        start = GlobalState.initial(
            {k: torch.zeros(n) for k, n in layout.sizes.items()}, changes_base=method == "flora"
        )
        mean = aggregate.collector("mean", 0.0, layout, "BOTH", guard.Bounds(64.0, 40, 6))
        collector = methods.load(method).collect(
            methods.Context(start, layout, "BOTH", 0, lambda client: ranks[client % 3]), mean
        )
        for client, local in enumerate(locals_):
            collector.add(client, layout.join(local, "BOTH"), toy.WEIGHTS[client])
        state = start.apply(collector.finish())
        for path in layout.adapters():
            own = []
            for client, local in enumerate(locals_):
                A, B = (layout.views(local, kind)[path].double().numpy() for kind in ("A", "B"))
                r = ranks[client % 3]
                own.append(B[:, :r] @ A[:r])
            wanted = weighted(own)
            if method == "flexlora":
                U, S, Vt = np.linalg.svd(wanted)
                wanted, mine = (U[:, :3] * S[:3]) @ Vt[:3], products(layout, state.master)[path]
            else:
                mine = base_change(layout, state)[path]
            assert np.linalg.norm(mine - wanted) < 1e-5 * np.linalg.norm(wanted)


def digits_server(method, rounds=3, rank=8, **values):
    rows = []
    job = two_layers.prepare(
        two_layers.Setting(method, "10x1", 0.5, 0, rounds, rank, "digits"),
        digits.load(None),
        "test",
    )
    job.config = job.config.with_values(**values)
    server = build_server(job, on_round=rows.append)
    server.norms.multiple = 0.0
    return server, rows


def seen_updates(server):
    """Every accepted update, with its change as the guard gives it."""
    caught, judge = [], server._judge

    def watched(arrival, expected, tally):
        update, change, norm = judge(arrival, expected, tally)
        caught.append((update, change, dict(expected.state.published)))
        return update, change, norm

    server._judge = watched
    return caught


def test_fedsa_shares_a_and_every_client_keeps_its_own_b():
    server, _ = digits_server("fedsa", rounds=2)
    updates = seen_updates(server)
    starts = []
    train = server.transport.cohort.trainer.train

    def watched(task, published, client_state):
        starts.append((task.round, task.client, dict(client_state)))
        update, after = train(task, published, client_state)
        starts.append((task.round, task.client, dict(after)))
        return update, after

    server.transport.cohort.trainer.train = watched
    server.run()
    layout, B0 = server.layout, server.state.published["B"]
    assert all(
        update.phase == "A" and len(change) == layout.sizes["A"] for update, change, _ in updates
    )
    after = {client: state["B"] for number, client, state in starts if number == 1 and state}
    again = {client: state["B"] for number, client, state in starts[20:][::2]}
    assert all(torch.equal(after[c], again[c]) for c in range(10)), (
        "round 2 starts from the client's own B"
    )
    assert (
        all(not torch.equal(after[c], B0) for c in range(10))
        and len({after[c].numpy().tobytes() for c in range(10)}) == 10
    )
    mean = np.average(
        [change.double().numpy() for u, change, _ in updates if u.round == 1],
        axis=0,
        weights=[u.weight for u, _, _ in updates if u.round == 1],
    )
    job = two_layers.prepare(
        two_layers.Setting("fedsa", "10x1", 0.5, 0, 2, 8, "digits"), digits.load(None), "test"
    )
    start = layout.gather(job.model, ("A",))["A"].double().numpy()
    np.testing.assert_allclose(updates[-1][2]["A"].numpy(), start + mean, atol=1e-6)


@pytest.mark.parametrize("ranks", [None, "2,5"])
def test_lora_a2_sends_the_ranks_that_move_the_product_most(ranks):
    server, _ = digits_server("lora-a2" + (f"+client-ranks={ranks}" if ranks else ""), rounds=2)
    full, _ = digits_server("rolora", rounds=2)
    partial, whole = seen_updates(server), seen_updates(full)
    server.run(), full.run()
    for (update, change, published), (_, everything, _) in zip(
        partial[:10], whole[:10], strict=True
    ):  # round 1: the same training
        budget = 4 if ranks is None else (2, 5)[update.client % 2]
        B, A = everything.view(64, 8).double().numpy(), published["A"].view(8, 64).double().numpy()
        chosen = np.argsort(-np.linalg.norm(B, axis=0) * np.linalg.norm(A, axis=1), kind="stable")[
            :budget
        ]
        wanted = np.zeros_like(B)
        wanted[:, chosen] = B[:, chosen]
        np.testing.assert_array_equal(change.view(64, 8).double().numpy(), wanted)
        assert update.change.numel() == 64 * budget


def test_lora_a2_refuses_ranks_that_are_not_the_client_s_to_send():
    server, _ = digits_server("lora-a2", rounds=1)
    updates = seen_updates(server)
    server.run()
    server, _ = digits_server("lora-a2", rounds=1)
    good = updates[0][0]
    bounds = guard.Bounds(64.0, 1000, 10)
    expected = guard.Round(
        good.run,
        1,
        "B",
        frozenset(range(10)),
        server.layout,
        server.state,
        "fp32",
        bounds,
        lambda client: 1000,
        server._budget(),
    )
    assert guard.check(wire.encode_update(good), 0, expected, set())
    for bad, reason in (
        (replace(good, ranks=None), "wrong shape"),
        (replace(good, ranks=torch.zeros(2, dtype=torch.uint8)), "wrong shape"),
        (replace(good, ranks=codec.pack_bits(torch.ones(8, dtype=torch.bool))), "over the bound"),
        (replace(good, ranks=codec.pack_bits(torch.zeros(8, dtype=torch.bool))), "wrong shape"),
        (replace(good, ranks=good.ranks.float()), "wrong shape"),
    ):
        with pytest.raises(guard.Rejected) as verdict:
            guard.check(wire.encode_update(bad), 0, expected, set())
        assert verdict.value.reason == reason
    plain = replace(expected, budget=None)
    with pytest.raises(guard.Rejected, match="ranks are named where all are sent"):
        guard.check(wire.encode_update(good), 0, plain, set())


def test_clients_of_small_rank_train_and_send_their_own_ranks_only():
    server, _ = digits_server("flexlora+client-ranks=2,8", rounds=2, engine="sequential")
    updates = seen_updates(server)
    server.run()
    for update, change, _ in updates:
        A, B = change.split([8 * 64, 8 * 64])
        rank = (2, 8)[update.client % 2]
        assert update.change.numel() == 2 * 64 * rank
        assert (
            not A.view(8, 64)[rank:].any()
            and not B.view(64, 8)[:, rank:].any()
            and A.view(8, 64)[:rank].any()
        )


# Floats per adapted d × d matrix, client and round, up and down (Table of the methods; d = 64, r =
# 8, 10 clients). FedSVD's A travels as a turn of 2 r² doubles; FLoRA sends its fresh A beside the
# stack, cut to rank 16 = d / 4 where it passes it, then whole.
D, R, K = 64, 8, 10
FLOATS = {
    "fedavg": (2 * D * R, 2 * D * R),
    "ffa": (D * R, D * R),
    "rolora": (D * R, D * R),
    "flexlora": (2 * D * R, 2 * D * R),
    "fedsvd": (D * R, D * R + 2 * 2 * R * R),
    "fedsa": (D * R, D * R),
    "lora-a2": (D * R // 2, D * R),
    "flora": (2 * D * R, 2 * D * 8 + D * R),
    "fedex": (2 * D * R, 2 * D * R + 2 * D * 8),
    "fedrot": (2 * D * R, 2 * D * R),
    "la-lora": (2 * D * R, 2 * D * R),
}


@pytest.mark.parametrize("method", FLOATS)
def test_what_travels(method):
    server, rows = digits_server(method, rounds=4)
    server.run()
    up, down = FLOATS[method]
    assert set(FLOATS) == set(methods.NAMES)
    for row in rows[2:]:
        assert 4 * up < row["bytes_up"] / K < 4 * up + 700
        assert 4 * down < row["bytes_down"] / K < 4 * down + 900


@pytest.mark.parametrize("method", ["flexlora", "flora", "fedex"])
def test_a_round_that_nobody_came_to_changes_nothing(method):
    server = toy.server(method, rounds=2, options=dict(quorum=0))
    server.run()
    before, server.config = (
        server.state,
        replace(server.config, rounds=3, max_abs=1e-9),
    )  # everybody is rejected
    server.run()
    assert server.state.round == 3 and all(
        torch.equal(server.state.published[k], before.published[k]) for k in before.published
    )
