"""A client in a masked round: what it answers, what it refuses, and what that rests on."""

import itertools

import pytest
import torch

from rolora.federated import wire
from rolora.federated.secure import client as masking
from rolora.federated.secure import crypto, graph, messages, shamir

UNSIGNED = messages.signature_rows([])


def session(client, clients=(0, 1, 2, 3, 4), threshold=4):
    """(clients of an attempt that have shared, the sealed shares by sender and receiver)."""
    found = {c: masking.MaskingClient(c) for c in clients}
    at = ("r", 1, 0)
    public = {c: m.keys(messages.KeysWanted(*at, c)).keys for c, m in found.items()}
    roster = torch.tensor(sorted(clients)), torch.stack([public[c] for c in sorted(clients)])
    sealed = {}
    for c, m in found.items():
        answer = m.shares(messages.SharesWanted(*at, c, threshold, 0, *roster, UNSIGNED))
        sealed[c] = dict(zip(answer.to.tolist(), answer.sealed, strict=True))
    return found[client], found, sealed, roster


def update(client=0, value=0.5, loss=1.0, weight=3):
    change = torch.full((7,), value)
    return wire.Update("r", 1, "A", client, "l", {"A": 0}, weight, loss, 1, 1, change)


def order(client, sealed, senders=None, max_abs=64.0):
    senders = senders or [c for c in sealed if c != client]
    parts = torch.stack([sealed[s][client] for s in senders])
    return messages.MaskingWanted(
        "r", 1, 0, client, "fp32", max_abs, 10, 5, torch.tensor(senders), parts
    )


def unmask(client, stayed, gone):
    ids = (torch.tensor(list(c), dtype=torch.int64) for c in (stayed, gone))
    return messages.UnmaskingWanted("r", 1, 0, client, *ids)


def test_a_client_never_gives_both_shares_of_a_neighbour():
    me, _, sealed, _ = session(0)
    me.mask(order(0, sealed), update())
    me.unmask(unmask(0, [0, 1, 2, 3], [4]))
    for stayed, gone in (([0, 1, 2, 3], [4]), ([0, 1, 2, 4], [3]), ([0, 1, 2, 3, 4], [])):
        with pytest.raises(wire.BadMessage, match="another attempt"):
            me.unmask(unmask(0, stayed, gone))


@pytest.mark.parametrize(
    "stayed, gone, why",
    [
        ([0, 1, 2, 3, 4], [4], "each once"),
        ([0, 1, 2, 3], [], "each once"),
        ([0, 1, 2, 3, 9], [4], "each once"),
        ([1, 2, 3, 4], [0], "said to be gone"),
        ([0, 1, 2], [3, 4], "must"),
    ],
)
def test_a_client_refuses_to_unmask(stayed, gone, why):
    me, _, sealed, _ = session(0)
    me.mask(order(0, sealed), update())
    with pytest.raises(wire.BadMessage, match=why):
        me.unmask(unmask(0, stayed, gone))
    assert me.unmask(unmask(0, [0, 1, 2, 3], [4])).seeds.shape == (4, shamir.SHARE)


def test_a_client_answers_each_step_once_and_in_order():
    me, _, sealed, roster = session(0)
    with pytest.raises(wire.BadMessage, match="no masked term"):
        me.unmask(unmask(0, [0, 1, 2, 3, 4], []))
    with pytest.raises(wire.BadMessage, match="given already"):
        me.shares(messages.SharesWanted("r", 1, 0, 0, 4, 0, *roster, UNSIGNED))
    me.mask(order(0, sealed), update())
    with pytest.raises(wire.BadMessage, match="not at its masks"):
        me.mask(order(0, sealed), update())
    me.keys(messages.KeysWanted("r", 1, 1, 0))  # a new attempt: the old one is gone
    with pytest.raises(wire.BadMessage, match="another attempt"):
        me.unmask(unmask(0, [0, 1, 2, 3, 4], []))


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda ids, keys: (ids[1:], keys[1:]), "own keys"),
        (lambda ids, keys: (ids, keys.flip(0)), "own keys"),
        (lambda ids, keys: (ids, torch.cat([keys[:4], keys[3:4]])), "one key"),
        (lambda ids, keys: (torch.tensor([0, 1, 2, 3, 3]), keys), "named twice"),
        (lambda ids, keys: (ids[:3], keys[:3]), "threshold of 4 of 3"),
    ],
)
def test_a_client_refuses_a_roster(change, why):
    _, _, _, roster = session(0)
    me = masking.MaskingClient(0)
    own = me.keys(messages.KeysWanted("r", 1, 0, 0)).keys
    ids, keys = roster[0], torch.cat([own[None], roster[1][1:]])
    with pytest.raises(wire.BadMessage, match=why):
        me.shares(messages.SharesWanted("r", 1, 0, 0, 4, 0, *change(ids, keys), UNSIGNED))


@pytest.mark.parametrize("threshold", [0, 1, 2, 6, -4])
def test_a_threshold_of_half_or_of_more_than_all_is_refused(threshold):
    _, _, _, (ids, keys) = session(1)
    me = masking.MaskingClient(0)
    own = me.keys(messages.KeysWanted("r", 1, 0, 0)).keys
    keys = torch.cat([own[None], keys[1:]])
    with pytest.raises(wire.BadMessage, match="more than half"):
        me.shares(messages.SharesWanted("r", 1, 0, 0, threshold, 0, ids, keys, UNSIGNED))


def test_shares_that_do_not_open_are_named():
    me, _, sealed, _ = session(0)
    sealed[3][0] = sealed[3][0].clone()
    sealed[3][0][5] ^= 1
    with pytest.raises(wire.BadMessage, match="client 3 do not open"):
        me.mask(order(0, sealed), update())


@pytest.mark.parametrize("value, loss", [(65.0, 1.0), (float("nan"), 1.0), (0.5, float("inf"))])
def test_a_change_that_no_server_could_reject_is_not_sent(value, loss):
    me, _, sealed, _ = session(0)
    with pytest.raises(wire.BadMessage):
        me.mask(order(0, sealed), update(value=value, loss=loss))


@pytest.mark.parametrize("count, threshold", [(1, 1), (3, 2), (7, 5), (60, 41)])
def test_shamir(count, threshold):
    """Any `threshold` shares give the secret; one fewer fit every other secret equally well."""
    secret = bytes(range(32))
    places = list(range(2, count + 2))
    shares = shamir.split(secret, threshold, places)
    for chosen in itertools.islice(itertools.combinations(range(count), threshold), 20):
        joiner = shamir.Joiner([places[i] for i in chosen])
        assert joiner.join([shares[i] for i in chosen]) == secret
    if threshold > 1:
        some = list(range(threshold - 1))
        short = shamir.Joiner([places[i] for i in some])
        assert short.join([shares[i] for i in some]) != secret
        # Whatever is guessed, some last share makes the others join to it: they tell nothing.
        joiner = shamir.Joiner(places[:threshold])
        for guess in (bytes(32), b"\xff" * 32):
            known = sum(
                w * int.from_bytes(shares[i], "big")
                for i, w in zip(some, joiner.weights, strict=False)
            )
            missing = (int.from_bytes(guess, "big") - known) * pow(
                joiner.weights[-1], -1, shamir.PRIME
            )
            share = (missing % shamir.PRIME).to_bytes(shamir.SHARE, "big")
            assert joiner.join([*(shares[i] for i in some), share]) == guess
            assert share != shares[threshold - 1]


def test_shamir_is_a_polynomial_over_that_field(monkeypatch):
    """By hand: f(x) = 5 + 3 x + 2 x^2."""
    drawn = iter([2, 3])
    monkeypatch.setattr(shamir.secrets, "randbelow", lambda most: next(drawn))
    shares = shamir.split((5).to_bytes(32, "big"), 3, [1, 2, 10])
    assert [int.from_bytes(s, "big") for s in shares] == [10, 19, 235]
    assert pow(3, shamir.PRIME - 1, shamir.PRIME) == 1


def test_a_mask_is_chacha20():
    """RFC 8439's stream for a key, nonce and counter of zeros (its appendix A.1, vectors 1 and 2)."""
    total = torch.zeros(16, dtype=torch.int64)
    crypto.add_mask(total, bytes(32), 1)
    text = total.numpy().tobytes().hex()
    assert text.startswith("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    assert text[128:].startswith("9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed")
    crypto.add_mask(total, bytes(32), -1)
    assert not total.any()


def test_two_sides_agree_and_purposes_differ():
    """What one side computes is what the other does, and another key for another purpose."""
    alice = crypto.new_key()
    bob = crypto.new_key()
    one = crypto.agreed(alice, crypto.public_of(bob), "mask")
    assert one == crypto.agreed(bob, crypto.public_of(alice), "mask")
    assert one != crypto.agreed(alice, crypto.public_of(bob), "seal by 1")
    with pytest.raises(ValueError):
        crypto.agreed(alice, bytes(32), "mask")  # a point of small order agrees with everybody


@pytest.mark.parametrize("count, degree", [(5, None), (9, 4), (100, 20), (6, 4), (3, 8)])
def test_neighbours_are_mutual_and_as_many_as_asked(count, degree):
    clients = [3 * c for c in range(count)]
    around = graph.neighbours(reversed(clients), degree, "key")
    assert sorted(around) == clients
    for client, near in around.items():
        assert len(set(near)) == min(degree or count - 1, count - 1) and client not in near
        assert all(client in around[other] for other in near) and near == sorted(near)
    if count == 100:
        assert around != graph.neighbours(clients, degree, "another key")
