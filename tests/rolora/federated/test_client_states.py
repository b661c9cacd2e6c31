"""What clients keep, on disk: as a dict in memory would have it, and nothing of many clients in
memory.
"""

import numpy as np
import pytest
import torch

from rolora.federated import orders
from rolora.federated.checkpoint import load_newest, prune, save_checkpoint
from rolora.federated.client_states import ClientStates
from tests.rolora.federated import toy


def state(*values):
    return {"step": torch.tensor([1.0]), "own": torch.tensor(values, dtype=torch.float32)}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_a_dict_whatever_is_done(seed, tmp_path):
    """Against a dict, over writes, states that become empty, flushes in mid-round, seals, and
    being opened anew from any of the last three seals.
    """
    rng = np.random.default_rng(seed)
    states, plain, seals = ClientStates(tmp_path, most=200), {}, []
    for number in range(40):
        for client in rng.choice(30, 5, replace=False).tolist():
            made = state(*rng.standard_normal(int(rng.integers(1, 6))))
            states[client] = plain[client] = made
        if rng.random() < 0.2:
            gone = int(rng.choice(sorted(plain)))
            states[gone] = plain[gone] = {}
        memory, segments = states.sealed()
        assert memory == {} and sorted(states) == sorted(plain) and len(states) == len(plain)
        assert all(equal(states[client], plain[client]) for client in plain)
        seals = [*seals[-2:], (segments, dict(plain))]
        if number % 7 == 0:
            segments, plain = seals[int(rng.integers(len(seals)))]
            states, plain = ClientStates.opened(tmp_path, segments, {}), dict(plain)
            states.most, seals = 200, []
            assert all(equal(states[client], plain[client]) for client in plain)
    assert 31 not in states and states.get(31) is None


def test_the_disk_holds_twice_what_counts_at_most(tmp_path):
    states = ClientStates(tmp_path)
    for number in range(60):
        for client in np.random.default_rng(number).choice(50, 5, replace=False).tolist():
            states[client] = state(*range(100))
        _, segments = states.sealed()
        whole = sum((tmp_path / segment.name).stat().st_size for segment in segments)
        headers = 250 * 2 * len(states) + 100 * len(segments)
        assert whole <= 2 * 404 * len(states) + 2 * headers


def test_a_state_that_is_empty_is_none_and_one_that_becomes_empty_stays_so(tmp_path):
    states = ClientStates(tmp_path)
    states[3] = {}
    assert states.sealed() == ({}, ()) and not list(tmp_path.iterdir())
    states[3], states[4] = state(1.0), {"empty": torch.empty(0)}
    segments = states.sealed()[1]
    again = ClientStates.opened(tmp_path, segments, {})
    assert sorted(again) == [3, 4] and equal(again[4], {"empty": torch.empty(0)})
    states[3] = {}
    again = ClientStates.opened(tmp_path, states.sealed()[1], {})
    assert again[3] == {} and not equal(again[4], {})


class Keeping(toy.Drift):
    """Clients that keep what they were sent last, and count their rounds."""

    def train(self, task, published, client_state):
        update, _ = super().train(task, published, client_state)
        rounds = client_state.get("rounds", torch.zeros(1)) + 1
        return update, {"rounds": rounds, "sent": published["A"].clone()}


def kept_on_disk(folder):
    """A transport for `toy.server` whose clients' states are beside the checkpoints in `folder`."""
    from rolora.transport.local import LocalTransport

    return lambda cohort, limit: LocalTransport(cohort, limit, states=folder / "clients")


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_goes_on_with_the_states_of_its_checkpoint(stop, tmp_path):
    whole = toy.server(rounds=7, per_round=2, trainer=Keeping)
    whole.run()

    def begun(rounds):
        return toy.server(
            rounds=rounds,
            per_round=2,
            trainer=Keeping,
            transport=kept_on_disk(tmp_path),
            on_checkpoint=lambda s: save_checkpoint(tmp_path, s),
        )

    begun(stop).run()
    (tmp_path / "clients" / "states-000000099.safetensors").write_bytes(b"of a killed run")
    prune(tmp_path)
    second = begun(7)
    loaded, problems = load_newest(tmp_path, second.layout.hash)
    assert problems == [] and loaded.state.round == stop
    second.state, second.held, second.norms.medians = loaded.state, loaded.held, loaded.norms
    second.transport.restore(loaded.state, loaded.held, loaded.client_states)
    second.run()
    last = load_newest(tmp_path, second.layout.hash)[0].client_states
    memory = whole.transport.client_states
    assert sorted(last) == sorted(memory)
    assert all(equal(last[client], memory[client]) for client in memory)
    assert sum(own["rounds"].item() for own in last.values()) == 14


def test_a_checkpoint_writes_the_states_that_changed(tmp_path):
    """The new bytes of a round are those of its two clients, and of what it moves from old files."""
    server = toy.server(rounds=12, per_round=2, trainer=Keeping, transport=kept_on_disk(tmp_path))
    written = []

    def save(snapshot):
        before = {path.name for path in (tmp_path / "clients").glob("*")}
        target = save_checkpoint(tmp_path, snapshot)
        assert not any(b"client/" in path.read_bytes() for path in target.iterdir())
        written.append(before)

    server.on_checkpoint = save
    server.run()
    assert len(set().union(*written)) <= 24  # at most one file moved for one that is written


def test_a_damaged_file_of_states_is_named_and_the_checkpoint_before_it_taken(tmp_path):
    server = toy.server(
        rounds=4,
        trainer=Keeping,
        transport=kept_on_disk(tmp_path),
        on_checkpoint=lambda s: save_checkpoint(tmp_path, s),
    )
    server.run()
    newest = max((tmp_path / "clients").iterdir())
    data = newest.read_bytes()
    newest.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    loaded, problems = load_newest(tmp_path, server.layout.hash)
    assert loaded.state.round == 3
    assert problems == [f"round-000004: the digest of clients/{newest.name} does not hold"]


def test_what_is_remembered_of_clients_does_not_grow_with_those_that_were_asked(monkeypatch):
    """30 clients, two a round: peers and what the server knows of them are those of a few rounds,
    and every message is as it would be if nothing were forgotten.
    """
    monkeypatch.setattr(toy, "WEIGHTS", [5] * 30)

    def ran():
        rows = []
        server = toy.server(rounds=40, per_round=2, on_round=rows.append)
        server.run()
        return server, [row["bytes_down"] for row in rows]

    server, sent = ran()
    assert len(server.held) <= 8 and len(server.transport.peers) <= 8
    monkeypatch.setattr(orders, "useful", lambda versions, held: held)
    other, everything = ran()
    assert len(other.held) > 20 and sent == everything
    for kind, flat in server.state.published.items():
        assert torch.equal(flat, other.state.published[kind])
