"""Clients that come and go: who is asked, what a newcomer is sent, what is recorded, what a resumed
run remembers.
"""

import math

import pytest
import torch

from rolora.config import parse_membership
from rolora.errors import BadInput
from rolora.federated import sampling, wire
from rolora.federated.changing import ChangingServer
from rolora.federated.checkpoint import load_newest, save_checkpoint
from rolora.federated.membership import Members, Schedule, Turn
from rolora.federated.server import QuorumMissed
from rolora.transport.local import LocalTransport
from tests.rolora.federated import toy


def schedule(text, clients=6):
    return Schedule.of(parse_membership(text), clients)


def test_who_is_there_in_every_round():
    plan = schedule("3:+4-5, 5:-0 5:-2 7:+0\n9:-1")
    assert [plan.at(n) for n in (1, 2)] == [[0, 1, 2, 3]] * 2
    assert plan.at(3) == plan.at(4) == [0, 1, 2, 3, 4, 5]
    assert (
        plan.at(5) == [1, 3, 4, 5] and plan.at(8) == [0, 1, 3, 4, 5] and plan.at(99) == [0, 3, 4, 5]
    )
    assert plan.turns[5] == Turn((), (0, 2)) and plan.turns[7] == Turn((0,), ())
    assert plan.fewest() == (1, 4)
    assert schedule("2:-0-4").fewest() == (2, 1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("3:+4 5:+4", "client 4 comes in round 5, and is there"),
        ("3:-4 5:-4", "client 4 leaves in round 5, and is not there"),
        ("3:+4 3:-4", "client 4 stands twice in round 3"),
        ("3:+6", "there is no client 6: there are 0 to 5"),
    ],
)
def test_what_cannot_happen_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        schedule(text)


@pytest.mark.parametrize("text", ["3", "3:8", "+8", "3:+8-", "0:+8", "3:+8-7", "", "3:+a"])
def test_what_is_no_event_is_refused_in_one_line(text):
    with pytest.raises(BadInput, match=r"^--membership[^\n]*$"):
        parse_membership(text)


def test_a_newcomer_moves_one_other_at_most_and_who_leaves_leaves_its_place():
    members = list(range(0, 90, 3))
    moved = 0
    for number in range(200):
        before = set(sampling.cohort_of(5, number, members, 8))
        after = set(sampling.cohort_of(5, number, [*members, 100], 8))
        assert len(before) == len(after) == 8 and before <= set(members)
        assert (100 in after and len(before - after) == 1) or before == after
        moved += 100 in after
        fewer = set(sampling.cohort_of(5, number, members[1:], 8))
        assert before - {0} <= fewer and len(fewer) == 8
        joined = sampling.poisson_of(5, number, [*members, 100], 0.3)
        assert [c for c in joined if c != 100] == sampling.poisson_of(5, number, members, 0.3)
    assert abs(moved / 200 - 8 / 31) < 0.1


def test_draws_are_uniform():
    """Each of 30 clients 8 times in 30, and each pair with the probability of a draw without
    replacement: within five deviations of a binomial.
    """
    rounds, counts, pairs = 4000, [0] * 30, 0
    for number in range(rounds):
        drawn = sampling.cohort_of(1, number, range(30), 8)
        assert drawn == sorted(set(drawn))
        for client in drawn:
            counts[client] += 1
        pairs += {3, 4} <= set(drawn)
    for found, p in [*((count, 8 / 30) for count in counts), (pairs, 8 / 30 * 7 / 29)]:
        assert abs(found - rounds * p) < 5 * math.sqrt(rounds * p * (1 - p))
    poisson = [len(sampling.poisson_of(1, n, range(30), 0.2)) for n in range(rounds)]
    assert abs(sum(poisson) - rounds * 6) < 5 * math.sqrt(rounds * 30 * 0.2 * 0.8)
    assert sampling.cohort_of(1, 1, [7, 3], 8) == [3, 7]
    assert sampling.cohort_of(1, 1, range(30), 8) != sampling.cohort_of(
        1, 1, range(30), 8, attempt=1
    )


class Watched(LocalTransport):
    """Notes what every task brings along."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.tasks = []

    def run_round(self, tasks, deadline=None):
        for client, message in tasks:
            task = wire.decode_task(message, 1 << 30)
            self.tasks.append((task.round, client, set(task.full)))
            yield from super().run_round([(client, message)], deadline)


def changing(members, **more):
    return toy.server(kind=ChangingServer, transport=Watched, members=members, **more)


def test_a_newcomer_is_sent_everything_once_and_counts_from_then_on():
    rows = []
    server = changing(Members(schedule("3:+5 4:-1 6:+1")), rounds=7, on_round=rows.append)
    server.run()
    full = {(number, client): kinds for number, client, kinds in server.transport.tasks}
    everything = {"A", "B", "head"}
    assert full[3, 5] == everything and full[6, 1] == everything
    assert all(not full[number, 5] for number in (4, 5, 6, 7)) and not full[7, 1]
    assert (2, 5) not in full and (4, 1) not in full and (5, 1) not in full
    assert [row["members"] for row in rows[1:]] == [5, 5, 6, 5, 5, 6, 6]
    assert {r["round"]: r["joined"] for r in rows if "joined" in r} == {3: [5], 6: [1]}
    assert {r["round"]: r["left"] for r in rows if "left" in r} == {4: [1]}
    assert [row["took_part"] for row in rows[1:4]] == [[0, 1, 2, 3, 4]] * 2 + [[0, 1, 2, 3, 4, 5]]
    assert all(row["clients"] == len(row["took_part"]) for row in rows[1:])


def test_a_round_is_the_sum_of_its_members():
    """Against a server whose clients are those members from the beginning."""
    first = changing(Members(schedule("2:-3-5")), rounds=2)
    first.run()
    again = toy.server(rounds=2)
    again._cohort = lambda number, attempt: list(range(6)) if number == 1 else [0, 1, 2]
    again.run()
    for kind, flat in first.state.master.items():
        assert torch.equal(flat, again.state.master[kind])


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_run_that_goes_on_remembers_its_members(stop, tmp_path):
    class Coming(Watched):
        """Clients elsewhere that are there in some rounds."""

        def present(self, wanted, least):
            number = 1 + max((number for number, _, _ in self.tasks), default=self.begun)
            return {0, 1, 2} | ({5} if number in (2, 3, 5) else set())

        begun = 0

    def begun(rounds, rows, folder, number=0):
        made = toy.server(
            kind=ChangingServer,
            transport=Coming,
            per_round=2,
            rounds=rounds,
            on_round=rows.append,
            on_checkpoint=lambda s: save_checkpoint(folder, s),
        )
        made.transport.begun = number
        return made

    rows, again = [], []
    whole = begun(6, rows, tmp_path / "whole")
    whole.run()
    begun(stop, again, tmp_path / "parts").run()
    second = begun(6, again, tmp_path / "parts", stop)
    loaded, problems = load_newest(tmp_path / "parts", second.layout.hash)
    assert loaded.state.round == stop and loaded.members is not None
    second.restore(loaded)
    second.run()
    assert problems == []
    assert {r["round"]: r["joined"] for r in rows if "joined" in r} == {
        1: [0, 1, 2],
        2: [5],
        5: [5],
    }
    assert {r["round"]: r["left"] for r in rows if "left" in r} == {4: [5], 6: [5]}
    timeless = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in rs] for rs in (rows, again)
    ]
    assert timeless[0] == timeless[1]
    for kind, flat in whole.state.published.items():
        assert torch.equal(flat, second.state.published[kind])


def test_when_everybody_is_gone_the_run_ends_in_one_line():
    class Leaving(Watched):
        def present(self, wanted, least):
            return {0} if not self.tasks else set()

    server = toy.server(kind=ChangingServer, transport=Leaving, rounds=3)
    with pytest.raises(QuorumMissed, match=r"^round 2: no client is there any more$"):
        server.run()
    assert server.state.round == 1
