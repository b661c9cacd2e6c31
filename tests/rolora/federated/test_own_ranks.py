"""Methods whose clients keep a factor, or send ranks of their own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rolora.experiments import digits, two_layers
from rolora.federated import codec, guard, wire
from tests.rolora.federated.digits_run import digits_server, seen_updates


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
