"""Masked rounds: bit for bit the plain round of those who stayed, whoever leaves and whenever, and
nothing that the server could take apart.
"""

import numpy as np
import pytest
import torch

from rolora.federated import wire
from rolora.federated.delivery import Arrival
from rolora.federated.local import TrainingFailed
from rolora.federated.secure import messages
from rolora.federated.secure.settings import MARK, Secure
from rolora.federated.server import QuorumMissed
from rolora.transport.local import LocalTransport
from tests.rolora.federated import toy


def step_of(request):
    return {b"K": "keys", b"S": "shares", b"U": "unmask"}[request[len(MARK) :][:1]]


def leaving(leavers, tamper=None):
    """A transport whose clients answer no more from a step of a round on; `leavers`: (round, step)
    → clients. `tamper(step, client, message)` may alter what comes back.
    """

    class Leaving(LocalTransport):
        def __init__(self, cohort, limit):
            super().__init__(cohort, limit)
            self.heard = []  # (step, client, request, answer)
            self.round = 1

        def gone(self, step, client):
            steps = ["keys", "shares", "train", "unmask"]
            return any(
                client in leavers.get((self.round, earlier), ())
                for earlier in steps[: steps.index(step) + 1]
            )

        def _passed(self, step, asked, arrivals):
            for arrival in arrivals:
                self.heard.append((step, arrival.client, asked[arrival.client], arrival.message))
                if self.gone(step, arrival.client):
                    failure = TrainingFailed("absent", "gone")
                    yield Arrival(arrival.client, None, failure)
                elif tamper is not None and arrival.message is not None:
                    message = tamper(step, arrival.client, arrival.message)
                    yield Arrival(arrival.client, message)
                else:
                    yield arrival

        def ask(self, requests, deadline):
            first = next(iter(requests.values()))
            step = step_of(first)
            if step == "keys":
                kind = messages.requested(first.removeprefix(MARK), 1 << 20)
                self.round = kind.round
            yield from self._passed(step, requests, super().ask(requests, deadline))

        def run_round(self, tasks, deadline=None):
            asked = dict(tasks)
            if not any(wire.decode_task(m, 1 << 30).masking for m in asked.values()):
                raise AssertionError("a task in the clear")
            yield from self._passed("train", asked, super().run_round(asked.items(), deadline))

    return Leaving


def plain(without, **given):
    """The same federation in the clear, without the clients that left in a round."""

    class Fewer(LocalTransport):
        def run_round(self, tasks, deadline=None):
            for arrival in super().run_round(tasks, deadline):
                number = wire.decode_update(arrival.message, 1 << 30).round
                if arrival.client not in without.get(number, ()):
                    yield arrival

    made = toy.server(transport=Fewer, **given)
    made.run()
    return made.state


def secure(threshold=4, degree=None, **given):
    options = {"secure": Secure(threshold, degree), "quorum": threshold} | given.pop("options", {})
    return toy.server(options=options, **given)


def same(a, b):
    return all(
        torch.equal(a.master[k], b.master[k]) and torch.equal(a.published[k], b.published[k])
        for k in a.master
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("method", ["rolora", "fedavg"])
def test_a_masked_run_is_bit_for_bit_the_plain_one(method, dtype):
    rows = []
    server = secure(method=method, dtype=dtype, rounds=4, on_round=rows.append)
    server.run()
    assert same(server.state, plain({}, method=method, dtype=dtype, rounds=4))
    for row in rows[1:]:
        assert row["clients"] == 6 and row["train_loss"] == 1.0 and row["examples"] == 30
        assert row["norm"] is None and row["client_loss"] is None, "of one client nothing is known"
        assert row["bytes_up"] > 6 * 8 * 30


@pytest.mark.parametrize("degree", [None, 4])
def test_whoever_leaves_at_whatever_step(degree):
    """The sum is that of those whose masked term came, even when they leave right after it."""
    leavers = {
        (1, "keys"): {0},
        (2, "shares"): {1},
        (3, "train"): {2, 5},
        (4, "unmask"): {3},
        (5, "shares"): {4},
        (6, "train"): {0},
    }
    counted = {1: {0}, 2: {1}, 3: {2, 5}, 5: {4}, 6: {0}}
    server = secure(4, degree, rounds=6, transport=leaving(leavers))
    if degree is not None:  # a circle of six with four neighbours each bears one that leaves
        leavers[3, "train"], counted[3] = {2}, {2}
    rows = []
    server.on_round = rows.append
    server.run()
    assert same(server.state, plain(counted, rounds=6))
    assert [row["clients"] for row in rows[1:]] == [
        6 - len(counted.get(n, ())) for n in range(1, 7)
    ]


def test_too_few_that_stay_end_the_attempt_before_anything_is_unmasked():
    """Three of six leave: the round is repeated with new keys, then given up; no share was told."""
    leavers = {(1, "train"): {0, 1, 2}}
    server = secure(4, rounds=2, transport=leaving(leavers))
    with pytest.raises(QuorumMissed, match=r"3 of 6|0 of 6"):
        server.run()
    heard = server.transport.heard
    assert not [entry for entry in heard if entry[0] == "unmask"]
    keys = [answer for step, _, _, answer in heard if step == "keys"]
    public = {messages.raw(messages.decode(messages.Keys, k, 1 << 20).keys) for k in keys}
    assert len(public) == 3 * 6, "every attempt has keys of its own"


def test_what_the_server_sees_of_one_term_is_noise():
    """The same change twice gives terms that have nothing in common, uniform in every bit."""
    server = secure(rounds=1, transport=leaving({}))
    server.run()
    other = secure(rounds=1, transport=leaving({}))
    other.run()

    def terms(server):
        return {
            client: messages.decode(messages.Masked, answer, 1 << 20).values
            for step, client, _, answer in server.transport.heard
            if step == "train"
        }

    for client, values in terms(server).items():
        again = terms(other)[client]
        assert not torch.equal(values, again)
        for both in (values, values - again):
            bits = np.unpackbits(both.numpy().view(np.uint8))
            assert abs(bits.mean() - 0.5) < 5 * 0.5 / len(bits) ** 0.5


def flipped(step, who):
    """A client whose shares are wrong in one bit."""

    def tamper(at, client, message):
        if at != step or client not in who:
            return message
        answer = messages.decode(messages.Unmasking, message, 1 << 20)
        answer.seeds[:, 40] ^= 1
        return messages.encode(answer)

    return tamper


def test_a_peer_that_lies_about_its_shares_changes_nothing_where_enough_are_right():
    server = secure(4, rounds=4, transport=leaving({}, flipped("unmask", {2})))
    server.run()
    assert same(server.state, plain({}, rounds=4))


def test_too_many_lies_repeat_the_round_and_say_why():
    server = secure(4, rounds=2, transport=leaving({}, flipped("unmask", {0, 1, 2})))
    with pytest.raises(QuorumMissed, match="do not join"):
        server.run()
    assert server.state.round == 0


def test_a_sum_out_of_bounds_is_refused():
    """A client that sends another term than its own under its masks."""

    def tamper(step, client, message):
        if step != "train" or client != 1:
            return message
        answer = messages.decode(messages.Masked, message, 1 << 20)
        answer.values[3] += 3 << 61
        return messages.encode(answer)

    server = secure(4, rounds=2, transport=leaving({}, tamper))
    with pytest.raises(QuorumMissed, match="over what its clients may send"):
        server.run()


@pytest.mark.parametrize("step", ["keys", "shares", "train", "unmask"])
@pytest.mark.parametrize("what", ["torn", "empty", "another's", "replayed"])
def test_a_bad_answer_costs_its_client_alone(step, what):
    kept = {}

    def tamper(at, client, message):
        first = kept.setdefault((at, client), message)
        if at != step or client != 4:
            return message
        if what == "torn":
            return message[:-3]
        if what == "empty":
            return b""
        return kept.get((at, 3), b"") if what == "another's" else first

    server = secure(4, rounds=3, transport=leaving({}, tamper))
    rows = []
    server.on_round = rows.append
    server.run()
    missing = {1, 2, 3} if what != "replayed" else {2, 3}  # the first answer is its own
    counted = {} if step == "unmask" else {number: {4} for number in missing}
    assert same(server.state, plain(counted, rounds=3))
    assert all(sum(row["rejected"].values()) == 1 for row in rows[1:] if row["round"] in missing)


def test_an_exchange_does_not_take_the_time_of_the_next_ones():
    """Somebody who is gone takes a fifth of a round's time at first, never all of it."""
    ends = []

    class Asked(LocalTransport):
        def ask(self, requests, deadline):
            ends.append(deadline)
            yield from super().ask(requests, deadline)

        def run_round(self, tasks, deadline=None):
            ends.append(deadline)
            yield from super().run_round(tasks, deadline)

    made = secure(transport=Asked, rounds=1, options={"deadline": 1000.0})
    made.run()
    first, *later = [end - ends[-1] for end in ends]
    assert later[-1] == 0.0 and first == pytest.approx(-800, abs=5)
    assert later[:2] == pytest.approx([-600, -200], abs=5)
