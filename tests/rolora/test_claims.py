"""How many examples a client may claim: those it is known to have, not those of the largest one."""

from dataclasses import replace

import pytest

from rolora import config
from rolora.cohort.sequential import Sequential
from rolora.federated import wire
from rolora.federated.delivery import Arrival
from rolora.run.federation import build_server, message_limit
from rolora.run.job import prepare
from rolora.transport.local import LocalTransport


class Claiming(LocalTransport):
    """Client 1 claims `claim` examples; `claims` are what clients said first."""

    def __init__(self, job, claim, claims=None):
        super().__init__(Sequential(job.trainer()), message_limit(job))
        self.claim, self.claims = claim, claims or {}

    def run_round(self, tasks, deadline=None):
        for arrival in super().run_round(tasks, deadline):
            if arrival.client == 1:
                update = wire.decode_update(arrival.message, 1 << 30)
                message = wire.encode_update(replace(update, weight=self.claim))
                yield Arrival(1, message)
            else:
                yield arrival


@pytest.fixture
def job(files):
    """make(options) → a job of three clients, of which the second has the fewest examples."""

    def make(**options):
        made = prepare(
            config.resolve(
                {
                    "model": str(files["llama"]),
                    "train_file": str(files["train"]),
                    "eval_file": str(files["eval"]),
                    "task_type": "classification",
                    "clients": 3,
                    "rounds": 1,
                    "local_steps": 1,
                    "batch_size": 4,
                    "rank": 2,
                    "max_length": 32,
                    "device": "cpu",
                    "threads": 1,
                    "engine": "sequential",
                }
                | options
            )
        )
        first, second, third = made.clients
        half = len(second) // 2
        made.clients = [first, second[:half], third]
        return made

    return make


def first_round(made, transport=None):
    rows = []
    build_server(made, on_round=rows.append, transport=transport).run()
    return rows[1]


def test_a_small_client_cannot_claim_what_the_largest_one_has(job):
    made = job()
    own, largest = len(made.clients[1]), max(map(len, made.clients))
    assert own < largest
    assert first_round(made, Claiming(made, own))["rejected"] == {}
    row = first_round(made, Claiming(made, largest))
    assert row["rejected"] == {"bad weight": 1} and row["clients"] == 2
    assert row["failures"] == [f"client 1: bad weight: {largest}, expected 1 to {own}"]


def test_a_client_with_a_file_of_its_own_is_held_to_what_it_said_first(job):
    made, said = job(max_weight=50), {0: 1000, 1: 27, 2: 1000}
    assert first_round(made, Claiming(made, 27, said))["rejected"] == {}
    row = first_round(made, Claiming(made, 54, said))
    assert row["failures"] == ["client 1: bad weight: 54, expected 1 to 27"]


def test_clients_here_are_held_to_the_partition_under_every_option(job):
    """--max-weight caps what counts; it does not let anybody claim more than it has."""
    for options in ({}, {"max_weight": 50}, {"weighting": "uniform"}):
        made = job(**options)
        examples_of = build_server(made, on_round=print).config.examples_of
        assert [examples_of(client) for client in range(3)] == [len(c) for c in made.clients]
