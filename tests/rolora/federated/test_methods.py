"""The rival methods against their rules, stated in NumPy, and the bytes that each sends."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rolora.federated import aggregate, guard, methods, term
from rolora.federated.layout import TERM
from rolora.federated.state import GlobalState
from tests.rolora.federated import toy
from tests.rolora.federated.digits_run import digits_server, weighted
from tests.rolora.federated.test_rounds import collected, products


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
    "fed-sb": (R * R, R * R),
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
