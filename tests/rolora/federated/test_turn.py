"""Re-factoring: the same product, the same bits on every machine, and what FedSVD and the balanced
hand-over make of the factors.
"""

import numpy as np
import pytest
import torch

from rolora.federated import turn, wire
from rolora.federated.layout import TERM, Entry, Layout, fingerprint
from rolora.federated.peer import Peer
from rolora.federated.state import GlobalState
from tests.rolora.federated import toy
from tests.rolora.federated.factor_pairs import factors, random_state


def test_a_turn_is_summed_in_index_order_and_rounded_once():
    """Bit for bit what Python's own floats give, one product and one addition at a time."""
    layout, state = random_state()
    matrices = torch.from_numpy(np.random.default_rng(1).normal(size=turn.length(layout)))
    ranks, start = {path: r for path, (r, _, _) in layout.adapters().items()}, 0
    new = {kind: turn.turned(layout, kind, state.published[kind], matrices) for kind in ("A", "B")}
    for path, (A, B) in factors(layout, state.published).items():
        r = ranks[path]
        G = matrices[start : start + r * r].view(r, r).tolist()
        start += r * r
        for kind, wanted in (
            (
                "A",
                [
                    [sum_in_order([G[i][j] * A[j][k] for j in range(r)]) for k in range(A.shape[1])]
                    for i in range(r)
                ],
            ),
            (
                "B",
                [
                    [sum_in_order([B[n][j] * G[j][i] for j in range(r)]) for i in range(r)]
                    for n in range(B.shape[0])
                ],
            ),
        ):
            assert np.array_equal(
                layout.views(new, kind)[path].numpy(), np.array(wanted).astype(np.float32)
            )


def sum_in_order(values):
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def before_and_after(layout, *states):
    return zip(*(factors(layout, state.published).values() for state in states), strict=True)


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_the_frozen_factor_is_orthonormal_up_to_a_scalar_and_the_product_stays(frozen):
    layout, state = random_state(3)
    turns = turn.balanced(layout, state.published, frozen)
    after = state.turn(layout, turns, ())
    for (A, B), (new_A, new_B) in before_and_after(layout, state, after):
        np.testing.assert_allclose(new_B @ new_A, B @ A, rtol=0, atol=1e-6 * np.linalg.norm(B @ A))
        gram, old = (new_B.T @ new_B, B) if frozen == "B" else (new_A @ new_A.T, A)
        r = len(gram)
        np.testing.assert_allclose(
            gram, np.eye(r) * np.linalg.norm(old) ** 2 / r, atol=1e-5 * np.linalg.norm(old) ** 2
        )
        assert np.isclose(np.linalg.norm(new_B if frozen == "B" else new_A), np.linalg.norm(old)), (
            "c keeps the factor's own scale"
        )


def test_zero_and_ill_conditioned_adapters_are_left_as_they_are():
    layout, state = random_state(4)
    published = {kind: flat.clone() for kind, flat in state.published.items()}
    first, second = layout.adapters()
    layout.views(published, "B")[first].zero_()
    turns = turn.balanced(layout, published, "B")
    G = turn.matrices(layout, turns["A"])
    assert torch.equal(G[first], torch.eye(len(G[first]), dtype=torch.float64)) and not torch.equal(
        G[second], torch.eye(3).double()
    )
    layout.views(published, "B")[second][:, 1] = layout.views(published, "B")[second][:, 0] * (
        1 + 1e-7
    )
    assert (
        turn.balanced(layout, published, "B") is None
        and turn.singular(layout, {**published, "B": torch.zeros_like(published["B"])}) is None
    )
    server = toy.server("rolora", rounds=1, hand_over="balance")
    server.state = GlobalState.initial(layout.gather(toy.model()[0], tuple(layout.sizes)))
    server.run()  # B was zero before round 1, and is not afterwards
    assert all(torch.isfinite(flat).all() for flat in server.state.published.values())


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_equal_factors_are_the_two_halves_of_the_svd(frozen):
    layout, state = random_state(7)
    after = state.turn(layout, turn.equal(layout, state.published, frozen), ())
    for (A, B), (new_A, new_B) in before_and_after(layout, state, after):
        U, S, Vt = np.linalg.svd(B @ A)
        r = len(A)
        halves = (new_A @ new_A.T, new_B.T @ new_B)
        for gram in halves:
            np.testing.assert_allclose(gram, np.diag(S[:r]), atol=1e-5 * S[0])
        np.testing.assert_allclose(new_B @ new_A, (U[:, :r] * S[:r]) @ Vt[:r], atol=1e-5 * S[0])


def test_a_product_that_lacks_directions_is_not_split():
    """It would be divided by the root of nothing, or of the rounding of fp32."""
    layout, state = random_state(8)
    published = {kind: flat.clone() for kind, flat in state.published.items()}
    first, second = layout.adapters()
    B = layout.views(published, "B")[first]
    B[:, 1] = (B[:, 0] + B[:, 2]) / 3
    turns = turn.equal(layout, published, "A")
    assert torch.equal(turn.matrices(layout, turns["A"])[first], torch.eye(3).double())
    assert not torch.equal(turn.matrices(layout, turns["A"])[second], torch.eye(3).double())
    assert turn.equal(layout, {**published, "B": torch.zeros_like(published["B"])}, "A") is None


@pytest.mark.parametrize("shape", [(2, 9), (8, 2)], ids=["few outputs", "few inputs"])
def test_a_rank_over_a_side_is_left_as_it_is(shape):
    out, width = shape
    layout = Layout((Entry("layer", "A", (3, width), 0), Entry("layer", "B", (out, 3), 0)))
    published = {kind: torch.randn(size) for kind, size in layout.sizes.items()}
    assert turn.singular(layout, published) is None
    for frozen in ("A", "B"):
        assert turn.equal(layout, published, frozen) is None
        assert turn.balanced(layout, published, frozen) is None


def test_fedsvd_gives_the_singular_vectors_of_the_product():
    layout, state = random_state(5)
    after = state.turn(layout, turn.singular(layout, state.published), ())
    for (A, B), (new_A, new_B) in before_and_after(layout, state, after):
        U, S, Vt = np.linalg.svd(B @ A)
        r = len(A)
        np.testing.assert_allclose(new_A @ new_A.T, np.eye(r), atol=1e-5)
        np.testing.assert_allclose(new_B.T @ new_B, np.diag(S[:r] ** 2), atol=1e-5 * S[0] ** 2)
        np.testing.assert_allclose(new_B @ new_A, (U[:, :r] * S[:r]) @ Vt[:r], atol=1e-5 * S[0])
        np.testing.assert_allclose(np.abs((new_A * Vt[:r]).sum(1)), 1.0, atol=1e-4)


def test_moments_and_the_master_turn_with_the_factor():
    """A run with momentum whose factors are turned and turned back every round is the run without
    turns.
    """
    layout, state = random_state(6)
    change = {"A": torch.randn(layout.sizes["A"], generator=torch.Generator().manual_seed(1))}
    plain = state.apply(change, momentum=0.5).publish(("A",), "fp32", 0)
    turns = turn.balanced(layout, plain.published, "A")
    back = {"A": turns["B"], "B": turns["A"]}
    moved = plain.turn(layout, turns, ("A",)).turn(layout, back, ())
    for held, wanted in (
        (moved.master, plain.master),
        (moved.moments, plain.moments),
        (moved.published, plain.published),
    ):
        for kind in wanted:
            torch.testing.assert_close(
                held[kind], wanted[kind], rtol=0, atol=1e-5 * float(wanted[kind].abs().max())
            )
    turned = plain.turn(layout, turns, ("A",))
    assert turned.versions == {"A": 1, "B": 1, "head": 0} and not torch.equal(
        turned.moments["A"], plain.moments["A"]
    )


@pytest.mark.parametrize("per_round", [None, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    "how", ["rolora+balance", "rolora+equal_factors", "fedsvd", "flora", "fedex"]
)
def test_every_client_holds_the_same_bits_in_every_round(how, dtype, per_round):
    published = {}
    method, _, hand_over = how.partition("+")
    server = toy.server(
        method,
        rounds=7,
        per_round=per_round,
        dtype=dtype,
        hand_over=hand_over or None,
        on_checkpoint=lambda s: published.update({s.state.round + 1: dict(s.state.published)}),
    )
    server.run()
    assert len(server.trainer.saw) == 7 * (per_round or 6)
    for number, _, held in server.trainer.saw:
        assert all(torch.equal(held[kind], published[number][kind]) for kind in published[number])


def test_what_a_turn_adds_to_the_bytes():
    rows = {how: [] for how in (None, "balance", "equal_factors")}
    for how in rows:
        toy.server(rounds=5, dtype="fp32", hand_over=how, on_round=rows[how].append).run()
    _, layout = toy.model()
    for number in range(2, 6):  # each round's tasks carry what the round before published
        for how in ("balance", "equal_factors"):
            if how == "equal_factors" and number == 2:
                continue  # after one round of B the toy's product has too few directions
            more = rows[how][number]["bytes_down"] - rows[None][number]["bytes_down"]
            assert 0 < more - 6 * 2 * 8 * turn.length(layout) < 6 * 400
            assert rows[how][number]["bytes_up"] == rows[None][number]["bytes_up"]


def test_a_peer_refuses_a_change_that_does_not_fit():
    layout, state = random_state()
    peer = Peer(layout, dict(state.published) | {TERM: torch.zeros(layout.term_unit)}, {})
    grown = torch.cat([torch.zeros(layout.term_unit), torch.ones(2 * layout.term_unit)])
    after = dict(state.published) | {TERM: grown}

    def task(**parts):
        return wire.Task(
            "r",
            1,
            "B",
            0,
            layout.hash,
            dict.fromkeys(after, 1),
            {kind: fingerprint(flat) for kind, flat in after.items()},
            "bf16",
            0.1,
            **({"full": {}, "delta": {}, "turn": {}} | parts),
        )

    for parts in (
        dict(turn={"A": torch.zeros(3, dtype=torch.float64)}),
        dict(turn={"A": torch.zeros(turn.length(layout))}),
        dict(turn={"head": torch.zeros(turn.length(layout), dtype=torch.float64)}),
        dict(delta={"A": torch.zeros(5).bfloat16()}),
        dict(delta={TERM: torch.zeros(layout.term_unit - 1).bfloat16()}),
        dict(delta={TERM: torch.zeros(0).bfloat16()}),
        dict(delta={"other": torch.zeros(5).bfloat16()}),
        dict(delta={"A": torch.zeros(layout.sizes["A"])}),
    ):
        with pytest.raises(wire.BadMessage, match="does not hold it"):
            peer.receive(task(**parts))
    peer.receive(task(delta={TERM: torch.ones(2 * layout.term_unit).bfloat16()}))
    assert len(peer.published[TERM]) == 3 * layout.term_unit
