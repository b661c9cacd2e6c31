"""Clients of asynchronous rounds that are late, lie, repeat themselves or say nothing."""

from dataclasses import replace

import pytest
import torch

from rolora.federated import wire
from rolora.federated.delivery import Arrival
from rolora.federated.local import TrainingFailed
from rolora.federated.server import QuorumMissed
from rolora.transport.local import LocalTransport
from tests.rolora.federated import toy
from tests.rolora.federated.test_buffered import ONE, counted, made, timeless

LIMIT, BAD = 1 << 30, 2
SLOW = dict(seconds=lambda client: 3.0 if client == BAD else 1.0 + client / 8)


def transport(change):
    """`change(update, message, earlier)`: the messages that come in the place of client 2's."""

    class Changed(LocalTransport):
        def run_round(self, tasks, deadline=None):
            for arrival in super().run_round(tasks, deadline):
                if arrival.client != BAD:
                    yield arrival
                    continue
                earlier = self.__dict__.setdefault("earlier", [])
                update = wire.decode_update(arrival.message, LIMIT)
                for message in change(update, arrival.message, earlier):
                    yield Arrival(BAD, message)
                earlier.append(arrival.message)

    return Changed


def altered(**fields):
    return transport(lambda update, *_: [wire.encode_update(replace(update, **fields))])


def moved(update, message, earlier):
    """The answer's number is the round's that is waited for, not its order's."""
    return [wire.encode_update(replace(update, round=update.round + 1))]


CASES = {
    "an old answer again": (transport(lambda u, m, old: [old[0] if old else m]), None),
    "a later round's number": (transport(moved), "stale or replayed"),
    "an earlier round's number": (altered(round=0), "stale or replayed"),
    "a version that nobody holds": (
        altered(versions={"A": 99, "B": 0, "head": 0}),
        "stale factors",
    ),
    "no version": (altered(versions={}), "stale factors"),
    "the other factor": (transport(lambda u, m, old: [other_phase(u)]), "other phase"),
    "another client's name": (altered(client=3), "other client"),
    "another run": (altered(run="other"), "other run"),
    "a huge weight": (altered(weight=10**6), "bad weight"),
    "not finite": (transport(lambda u, m, old: [filled(u, float("nan"))]), "not finite"),
    "over the bound": (transport(lambda u, m, old: [filled(u, 65.0)]), "over the bound"),
    "cut": (transport(lambda u, m, old: [m[:-9]]), "unreadable"),
    "empty": (transport(lambda u, m, old: [b""]), "unreadable"),
    "nothing": (transport(lambda u, m, old: []), "no answer"),
}


def other_phase(update):
    return wire.encode_update(replace(update, phase="A" if update.phase == "B" else "B"))


def filled(update, value):
    return wire.encode_update(replace(update, change=torch.full_like(update.change, value)))


@pytest.mark.parametrize("case", CASES)
def test_a_bad_answer_is_refused_by_name_and_counts_nowhere(case):
    """It comes when its sender is due; the others' rounds go on, and the sender is asked again."""
    changed, reason = CASES[case]
    rows = []
    server = made(2, rounds=24, transport=changed, on_round=rows.append, **SLOW)
    found = counted(server)
    server.run()
    refused = {
        name: sum(row["rejected"].get(name, 0) for row in rows)
        for row in rows[1:]
        for name in row["rejected"]
    }
    assert all(torch.isfinite(flat).all() for flat in server.state.published.values())
    assert all(row["clients"] == 2 for row in rows[1:])
    counts = [client for _, _, taken in found for client, _ in taken].count(BAD)
    if reason is None:
        assert counts == 1 and refused.keys() == {"stale or replayed"}
        return
    assert counts == 0 and refused.keys() == {reason} and refused[reason] >= 2
    assert BAD not in server.held or BAD in server.book.training


def test_who_answers_twice_is_counted_once():
    """And an answer without an order is refused at once, not when somebody else is due."""
    rows, plain = [], []
    server = made(2, rounds=12, transport=transport(lambda u, m, old: [m, m]), on_round=rows.append)
    server.run()
    honest = made(2, rounds=12, on_round=plain.append)
    honest.run()
    assert all(torch.equal(server.state.master[k], honest.state.master[k]) for k in ("A", "B"))
    assert sum(row["rejected"].get("not asked", 0) for row in rows) == len(
        [number for number, client, _ in server.trainer.saw if client == BAD]
    )
    bare = ("rejected", "failures")
    strip = [{k: v for k, v in row.items() if k not in bare} for row in timeless(rows)]
    assert strip == [{k: v for k, v in row.items() if k not in bare} for row in timeless(plain)]


def test_an_answer_that_is_too_old_is_refused_and_its_client_sent_everything():
    rows, given = [], dict(rounds=40, on_round=lambda row: rows.append(row))
    server = made(2, limit=3, **given, **SLOW)
    found = counted(server)
    full = watched(server)
    server.run()
    ages = {number - ordered for number, _, taken in found for _, ordered in taken}
    assert max(ages) <= 3
    late = [failure for row in rows for failure in row["failures"]]
    assert all("expected at most 3" in text for text in late)
    assert sum("client 2: too old: " in text for text in late) >= 3
    assert full[BAD] == [True] * len(full[BAD]) and len(full[BAD]) >= 3
    assert [row["clients"] for row in rows[1:]] == [2] * 40


def watched(server):
    """client → whether its orders held everything in full."""
    found, own = {}, server.transport.run_round

    def run_round(tasks, deadline=None):
        tasks = list(tasks)
        for client, message in tasks:
            found.setdefault(client, []).append(
                set(wire.decode_task(message, LIMIT).full) >= {"A", "B"}
            )
        return own(tasks, deadline)

    server.transport.run_round = run_round
    return found


def test_what_becomes_too_old_while_it_waits_is_dropped():
    """A buffer of six: four alternate quickly, and one's answers of B wait for two more of it."""
    rows = []
    server = made(
        4,
        lambda client: 1.0 + client,
        limit=1,
        rounds=30,
        on_round=rows.append,
    )
    found = counted(server)
    server.run()
    assert max(number - ordered for number, _, taken in found for _, ordered in taken) == 1
    assert sum(row["rejected"].get("too old", 0) for row in rows) > 0


def test_the_norm_bound_of_a_phase_holds_for_late_answers():
    rows = []

    def large(update, message, earlier):
        return [filled(update, 5.0)] if update.round > 8 else [message]

    server = made(2, rounds=30, bound=3.0, transport=transport(large), on_round=rows.append, **SLOW)
    server.run()
    late = sum(row["rejected"].get("norm over the bound", 0) for row in rows)
    assert late >= 2 and max(row["norm"] for row in rows[1:]) < 2.0


@pytest.mark.parametrize("method", ["rolora", "ffa"])
def test_a_run_that_takes_fresh_answers_alone_goes_on(method):
    """Those that are cut off never end a round early, however many they are."""
    rows = []
    server = made(2, method=method, limit=0, rounds=30, on_round=rows.append, **SLOW)
    found = counted(server)
    server.run()
    assert all(number == ordered for number, _, taken in found for _, ordered in taken)
    assert [row["clients"] for row in rows[1:]] == [2] * 30
    assert rows[-1]["simulated_seconds"] < 30 * 3.0, "nobody waits for the slow one"


class Nobody(toy.Drift):
    def train(self, task, published, client_state):
        raise TrainingFailed("non-finite loss", "as it must")


class Few(toy.Drift):
    def train(self, task, published, client_state):
        if task.client > 1:
            raise TrainingFailed("non-finite loss", "as it must")
        return super().train(task, published, client_state)


def test_a_run_of_which_nobody_can_be_counted_ends_with_the_reason():
    server = made(3, rounds=3, trainer=Nobody)
    with pytest.raises(QuorumMissed, match=r"round 1: 0 updates of B .* non-finite loss"):
        server.run()
    assert server.state.round == 0


def test_a_round_takes_what_can_come_where_that_meets_the_quorum():
    rows = []
    server = made(5, ONE, method="ffa", rounds=3, trainer=Few, on_round=rows.append)
    server.run()
    assert [row["clients"] for row in rows[1:]] == [2, 2, 2]
    assert [row["rejected"] for row in rows[1:]] == [{"non-finite loss": 4}] * 3
    strict = made(5, ONE, method="ffa", trainer=Few, options=dict(quorum=3))
    with pytest.raises(QuorumMissed, match="2 updates of B were accepted, 3 are needed"):
        strict.run()


def test_clients_that_all_fail_are_not_asked_for_ever():
    """Three times the clients in training, in every attempt; not each of very many."""
    server = made(
        2,
        ONE,
        rounds=1,
        per_round=2,
        trainer=Nobody,
        options=dict(clients=500, examples_of=lambda client: 40),
    )
    tallies, own = [], server._fill
    server._fill = lambda number, phase, draws, tally: (
        tallies.append(tally) or own(number, phase, draws, tally)
    )
    with pytest.raises(QuorumMissed):
        server.run()
    assert len(tallies) == 3 and len(tallies[-1].refused) == 3 * 3 * 2


def test_a_phase_that_never_comes_again_takes_no_answers(tmp_path):
    """A method of one's own that trains A and B by turns first, and B alone after that."""
    own = tmp_path / "own.py"
    own.write_text("def phase(round, schedule):\n    return 'A' if round in (2, 4) else 'B'\n")
    rows = []
    server = made(2, method=str(own), rounds=20, on_round=rows.append, **SLOW)
    server.run()
    assert [row["phase"] for row in rows[1:]].count("A") == 2
    texts = [text for row in rows for text in row["failures"]]
    assert all("none of the next 64 rounds trains A" in text for text in texts)
