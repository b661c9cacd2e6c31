"""Asynchronous rounds of random federations, against a schedule that is kept by hand: every order is
accounted for once, and every answer counts when it can have come and not before.
"""

import random

import pytest

from rolora.federated.local import TrainingFailed
from rolora.transport.local import LocalTransport
from tests.rolora.federated import toy
from tests.rolora.federated.test_buffered import made


def failing(seed):
    """Clients whose training fails now and then, by key."""

    class Sometimes(toy.Drift):
        def train(self, task, published, client_state):
            if random.Random(f"{seed} {task.round} {task.client}").random() < 0.15:
                raise TrainingFailed("non-finite loss", "as it must, now and then")
            return super().train(task, published, client_state)

    return Sometimes


class Kept(LocalTransport):
    """Notes who is asked what, when."""

    def run_round(self, tasks, deadline=None):
        noted = []
        for arrival in super().run_round(tasks, deadline):
            noted.append(arrival.client)
            yield arrival
        self.__dict__.setdefault("asked", []).extend((self.clock.now, client) for client in noted)


@pytest.mark.parametrize("seed", range(16))
def test_every_order_is_accounted_for_once(seed):
    drawn = random.Random(seed)
    training = drawn.randint(1, 6)
    size, limit = drawn.randint(1, training), drawn.choice([None, 0, 2, 6])
    speeds = [drawn.choice([0.5, 1.0, 1.0, 3.0, 8.0]) for _ in range(6)]
    rows, flown, counted = [], [], []
    server = made(
        size,
        speeds.__getitem__,
        limit=limit,
        method=drawn.choice(["rolora", "ffa", "fedavg"]),
        rounds=25,
        per_round=training,
        trainer=drawn.choice([toy.Drift, failing(seed)]),
        transport=Kept,
        on_round=rows.append,
    )
    server.transport.clock = server.clock
    take, summed = server._take, server._summed

    def taking(flight, number, tally):
        flown.append(flight)
        assert flight.due <= server.clock.now and flight.client not in server.book.training
        assert len(server.book.training) < training
        take(flight, number, tally)

    def summing(number, phase, taken):
        counted.extend((server.clock.now, number, phase, answer) for answer in taken)
        return summed(number, phase, taken)

    server._take, server._summed = taking, summing
    server.run()

    asked, book = server.transport.asked, server.book
    keys = [(flight.client, flight.round, flight.phase) for flight in flown]
    assert len(set(keys)) == len(keys), "each phase once in a round"
    assert len(asked) == len(flown) + len(book.training)
    refused = sum(sum(row["rejected"].values()) for row in rows)
    waiting = sum(map(len, book.waiting.values()))
    assert len(flown) == refused + waiting + len(counted)
    assert len(counted) == sum(row["clients"] for row in rows)
    due = {(f.client, f.round, f.phase): f.due for f in flown}
    for now, number, phase, answer in counted:
        when = due.pop((answer.client, answer.round, phase))  # none of them twice
        assert when <= now and phase == server.method.phase(number)
        assert limit is None or number - answer.round <= limit
    for began, client in asked:  # one order at a time, and each takes as long as its client does
        ends = [flight.due for flight in flown if flight.client == client]
        assert began + speeds[client] in ends or client in book.training
    times = [row["simulated_seconds"] for row in rows[1:]]
    assert times == sorted(times)
    for row in rows[1:]:
        assert row["training"] <= training and 1 <= row["clients"] <= size
        assert limit is None or row["staleness"][2] <= limit
    if server.trainer.__class__ is toy.Drift and limit is None:
        assert all(row["clients"] == size and not row["rejected"] for row in rows[1:])
