"""Asynchronous rounds: the schedule by hand, the sum by NumPy, and synchronous rounds bit for bit."""

from collections import defaultdict

import numpy as np
import pytest
import torch

from rolora.federated.buffered import supply
from rolora.federated.buffered.settings import Buffered
from rolora.federated.checkpoint import load_newest, save_checkpoint
from rolora.federated.local import TrainingFailed
from tests.rolora.federated import digits_run, toy

ONE, TAIL = (lambda client: 1.0), (lambda client: 10.0 if client == 1 else 1.0 + client / 8)


def made(size, seconds=TAIL, limit=None, exponent=0.5, options=None, **given):
    settings = Buffered(size, exponent, limit)
    return toy.server(options={"buffered": settings} | (options or {}), seconds=seconds, **given)


def counted(server):
    """(round, phase, [(client, the round of its order), …]) of every round, as it happens."""
    found, own = [], server._summed

    def watched(number, phase, taken):
        found.append((number, phase, [(answer.client, answer.round) for answer in taken]))
        return own(number, phase, taken)

    server._summed = watched
    return found


def timeless(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def same(first, second):
    for group in ("master", "published", "moments"):
        ours, theirs = getattr(first, group), getattr(second, group)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[kind], theirs[kind]) for kind in ours)


class Failing(toy.Drift):
    def train(self, task, published, client_state):
        if task.client == 4:
            raise TrainingFailed("non-finite loss", "as it must")
        return super().train(task, published, client_state)


@pytest.mark.parametrize("method", ["rolora", "fedavg", "ffa", "la-lora"])
@pytest.mark.parametrize("per_round, trainer", [(6, toy.Drift), (2, toy.Drift), (6, Failing)])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_buffer_of_everybody_in_training_is_a_synchronous_run(method, per_round, trainer, dtype):
    given = dict(method=method, per_round=per_round, trainer=trainer, dtype=dtype, rounds=5)
    given |= dict(options=dict(server_momentum=0.5), bound=3.0)
    rows, ours = [], []
    plain = toy.server(on_round=rows.append, **given)
    plain.run()
    buffered = made(per_round, ONE, on_round=ours.append, **given)
    buffered.run()
    same(plain.state, buffered.state)
    assert plain.held == buffered.held
    assert timeless([{name: row[name] for name in rows[0]} for row in ours]) == timeless(rows)
    assert [row["simulated_seconds"] for row in ours[1:]] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert all(row["staleness"] == [0, 0, 0] for row in ours[1:])


@pytest.mark.parametrize("engine", ["batched", "sequential"])
def test_so_it_is_where_clients_train(engine):
    """The digits, by each engine, with moments of the clients' own."""
    given = dict(local_epochs=None, local_steps=2, engine=engine, optimizer="adamw", lr=0.01)
    given |= dict(carry_moments=True, local_coordinates=False)
    plain, _ = digits_run.digits_server("rolora", **given)
    plain.run()
    given |= dict(buffer=10, staleness_exponent=0.5, client_speeds="equal")
    buffered, rows = digits_run.digits_server("rolora", **given)
    buffered.run()
    same(plain.state, buffered.state)
    assert [row["simulated_seconds"] for row in rows[1:]] == [2.0, 4.0, 6.0]


def test_a_schedule_by_hand():
    """Clients 0 and 1 take a second, client 2 three; two answers end a round, and all train."""
    server = made(
        2,
        lambda client: 3.0 if client == 2 else 1.0,
        method="ffa",
        rounds=5,
        per_round=3,
        options=dict(clients=3),
        on_round=(rows := []).append,
    )
    found = counted(server)
    server.run()
    assert [taken for _, _, taken in found] == [
        [(0, 1), (1, 1)],
        [(0, 2), (1, 2)],
        [(0, 3), (1, 3)],
        [(2, 1), (0, 4)],  # client 2 answers at 3, too late for the round that ended then
        [(1, 4), (0, 5)],
    ]
    assert [row["simulated_seconds"] for row in rows[1:]] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [row["staleness"] for row in rows[1:]][3:] == [[0, 1.5, 3], [0, 0.5, 1]]
    assert [row["training"] for row in rows[1:]] == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("exponent", [0.5, 0.0, 1.0])
@pytest.mark.parametrize("method", ["rolora", "ffa"])
def test_the_sum_is_fedbuffs_in_float64(method, exponent):
    """`Σ w (1 + s)^-a Δ / Σ w` of what each client was keyed to answer."""
    masters = {}
    server = made(
        2,
        method=method,
        exponent=exponent,
        rounds=40,
        dtype="fp32",
        on_checkpoint=lambda s: masters.update({s.state.round: s.state.master}),
    )
    found, layout = counted(server), server.layout
    server.run()
    assert len(found) == 40 and max(n - r for n, _, t in found for _, r in t) >= 9
    for number, phase, taken in found:
        total, weights = 0.0, 0
        for client, ordered in taken:
            generator = torch.Generator().manual_seed(1000 * ordered + client)
            size = layout.travelling_size(phase)
            change = (torch.randn(size, generator=generator) * 0.1).numpy().astype(np.float64)
            total += toy.WEIGHTS[client] * (1 + number - ordered) ** -exponent * change
            weights += toy.WEIGHTS[client]
        kinds = layout.travelling(phase)
        moved = [masters[number][kind] - masters[number - 1][kind] for kind in kinds]
        np.testing.assert_allclose(torch.cat(moved).numpy(), total / weights, atol=2e-7)


def test_rounds_alternate_and_a_frozen_factor_rests():
    states = []
    server = made(2, rounds=16, on_checkpoint=lambda s: states.append(s.state))
    found = counted(server)
    server.run()
    asked = {(number, client, phase) for number, client, phase in server.trainer.phases}
    for number, phase, taken in found:
        assert phase == ("B" if number % 2 else "A")
        assert len({client for client, _ in taken}) == 2, "a client counts once in a round"
        assert all((ordered, client, phase) in asked for client, ordered in taken)
        before, after = states[number - 1], states[number]
        rests = "A" if phase == "B" else "B"
        assert torch.equal(before.master[rests], after.master[rests])
        assert before.versions[rests] == after.versions[rests]


def test_a_client_trains_exactly_what_was_published_when_it_was_asked():
    """Stale ones too: what it holds is proven by hash, and is the server's of that time."""
    published, rows = {}, []
    server = made(
        2,
        rounds=20,
        on_checkpoint=lambda s: published.update({s.state.round + 1: s.state.published}),
        on_round=rows.append,
    )
    server.run()
    assert not any(row["rejected"] for row in rows)
    for number, _, held in server.trainer.saw:
        for kind in ("A", "B", "head"):
            assert torch.equal(held[kind], published[number][kind])


@pytest.mark.parametrize("training, size", [(6, 3), (6, 2), (6, 1), (4, 2), (6, 4), (5, 2)])
@pytest.mark.parametrize("looks_ahead", [True, False])
def test_no_answer_is_older_than_the_buffers_that_fill_ahead_of_it(
    training, size, looks_ahead, monkeypatch
):
    """Clients that are all as fast: `training / size` rounds are under way at a time. Were all given
    the phase of the round that is waited for, answers would be twice as old.
    """
    if not looks_ahead:
        monkeypatch.setattr(
            supply, "needed", lambda phase, number, own, found, count: [phase(number)] * count
        )
    server = made(size, ONE, per_round=training, rounds=24)
    found = counted(server)
    server.run()
    ages = [number - ordered for number, _, taken in found for _, ordered in taken]
    assert max(ages) == (-(-training // size) - 1) * (1 if looks_ahead else 2)


def test_what_is_needed_and_who_is_given_it():
    def phase_of(number):
        return "BA"[(number - 1) % 2]

    two, fresh = Buffered(2), Buffered(2, limit=1)
    assert supply.needed(phase_of, 1, Buffered(3), {}, 3) == ["B"] * 3
    assert supply.needed(phase_of, 1, two, {"B": 1}, 6) == ["B", "A", "A", "B", "B", "A"]
    assert supply.needed(phase_of, 2, two, {"B": 5, "A": 2}, 3) == ["A", "A", "A"]
    # What would be two rounds old when it counts is not asked for.
    assert supply.needed(phase_of, 1, fresh, {"B": 1}, 6) == ["B", "A", "A", "B", "B", "B"]
    assert supply.assigned(["B", "B", "A"], [4, 2, 9], {}) == {"B": [2, 4], "A": [9]}
    # Who may not train B takes the A, and who may train nothing stays idle.
    assert supply.assigned(["B", "A"], [1, 2], {1: {"B"}}) == {"B": [2], "A": [1]}
    assert supply.assigned(["B"], [1, 2], {1: {"B"}, 2: {"B", "A"}}) == {}


KINDS = {
    "rolora": dict(),
    "one at a time": dict(size=1),
    "bounded": dict(limit=6, bound=1.5, options=dict(server_momentum=0.9)),
    "int8 of four": dict(dtype="int8", per_round=4),
    "both factors": dict(method="fedavg", trainer=Failing),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [1, 2, 5, 8])
def test_a_run_that_goes_on_ends_with_the_same_bits(kind, stop, tmp_path):
    rows, again, given = [], [], {"size": 2} | KINDS[kind]
    whole = made(rounds=9, on_round=rows.append, **given)
    whole.run()
    first = made(
        rounds=stop,
        on_round=again.append,
        on_checkpoint=lambda s: save_checkpoint(tmp_path, s),
        **given,
    )
    first.run()
    second = made(rounds=9, on_round=again.append, **given)
    loaded, problems = load_newest(tmp_path, second.layout.hash)
    assert (
        not problems and loaded.book.training and loaded.book.now == again[-1]["simulated_seconds"]
    )
    second.restore(loaded)
    second.run()
    same(whole.state, second.state)
    assert whole.held == second.held and timeless(rows) == timeless(again)
    assert numbers(whole.snapshot()) == numbers(second.snapshot())


def test_a_snapshot_does_not_change_afterwards():
    kept = []
    server = made(2, rounds=7, on_checkpoint=lambda s: kept.append((s, numbers(s), tensors(s))))
    server.run()
    for snapshot, before, flat in kept:
        assert numbers(snapshot) == before
        assert all(torch.equal(flat[name], value) for name, value in tensors(snapshot).items())


def numbers(snapshot):
    return snapshot.book.numbers()


def tensors(snapshot):
    return {name: value.clone() for name, value in snapshot.book.tensors().items()}


def test_rounds_that_wait_have_the_slowest_ones_time():
    rows = []
    server = toy.server(rounds=8, per_round=2, seconds=TAIL, on_round=rows.append)
    server.run()
    cohorts = defaultdict(list)
    for number, client, _ in server.trainer.saw:
        cohorts[number].append(client)
    ends = np.cumsum([max(map(TAIL, cohorts[number])) for number in range(1, 9)])
    assert [row["simulated_seconds"] for row in rows[1:]] == ends.tolist()
    assert "simulated_seconds" not in toy_row(seconds=None) and "staleness" not in rows[-1]


def toy_row(**given):
    rows = []
    toy.server(rounds=1, on_round=rows.append, **given).run()
    return rows[-1]


def test_stragglers_hold_nobody_up():
    """In the time of ten synchronous rounds with one client that is ten times slower."""
    buffered, waiting = [], []
    made(3, rounds=40, on_round=buffered.append).run()
    toy.server(rounds=10, seconds=TAIL, on_round=waiting.append).run()
    assert waiting[-1]["simulated_seconds"] == 100.0
    assert buffered[-1]["simulated_seconds"] < 50.0
