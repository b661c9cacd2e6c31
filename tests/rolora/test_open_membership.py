"""`--membership open`: nodes that come, leave and come back while a run lives, over Flower's grid."""

import importlib
import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tomli_w

from rolora import config, worker
from rolora.errors import BadInput
from rolora.federated.peer import Peer
from rolora.run.federation import message_limit
from rolora.run.job import prepare
from rolora.transport.resident import Resident
from tests.rolora.commands import bits, rows

VALUES = {
    "task_type": "classification",
    "clients": 4,
    "clients_per_round": 6,
    "rounds": 5,
    "local_steps": 1,
    "batch_size": 4,
    "rank": 2,
    "max_length": 32,
    "max_weight": 30,
    "device": "cpu",
    "threads": 1,
}


class Nodes:
    """Workers in this process: node 100 + c is client c, there while `there(round)` has it."""

    def __init__(self, made, there):
        self.made, self.there, self.round, self.answers = made, there, 1, {}
        self.workers = {}

    def get_node_ids(self):
        return [100 + client for client in self.there(self.round)]

    def push_messages(self, messages):
        for message in messages:
            name, client = str(len(self.answers)), message.dst_node_id - 100
            data = message.content["rolora"]["message"]
            if message.message_type == "query":
                size = len(self.made.clients[client])
                answer = json.dumps({"client": client, "examples": size}).encode()
            else:
                answer = self.worker(client).answer(data)
                self.round = 1 + max(n for _, n in self.worker(client).states)
            self.answers[name] = answer
            yield name

    def worker(self, client):
        if client not in self.workers:
            limit, peer = message_limit(self.made), Peer(self.made.layout)
            self.workers[client] = Resident(client, self.made.trainer(), peer, limit)
        return self.workers[client]

    def pull_messages(self, ids):
        for name in ids:
            yield SimpleNamespace(
                content={"rolora": {"message": self.answers[name]}},
                metadata=SimpleNamespace(reply_to_message_id=name),
                has_error=lambda: False,
            )


def test_nodes_that_come_and_go_are_the_run_whose_schedule_says_so(
    flower, files, tmp_path, call, monkeypatch, capsys
):
    """Bit for bit, with the same rows but for the one in which the first nodes come."""
    monkeypatch.delitem(sys.modules, "rolora.run.served", raising=False)
    served = importlib.import_module("rolora.run.served")
    names = {"model": "llama", "train_file": "train", "eval_file": "eval"}
    values = VALUES | {option: str(files[name]) for option, name in names.items()}

    def there(number):
        return {0, 2} | ({3} if number >= 2 else set()) | ({1} if number not in (3, 4) else set())

    path = tmp_path / "run.toml"
    open_values = values | {"membership": "open", "carry_moments": False}
    path.write_text(tomli_w.dumps(open_values | {"output_dir": str(tmp_path / "open")}))
    nodes = Nodes(prepare(config.resolve(open_values)), there)
    served.serve(nodes, {"rolora-config": str(path), "gathering": 0.3})
    planned = values | {"membership": "2:+3,3:-1,5:+1", "clients_per_round": 4}
    flags = [part for n, v in planned.items() for part in (f"--{n.replace('_', '-')}", v)]
    flags += ["--no-carry-moments", "--engine", "sequential"]
    assert call(*flags, "--output-dir", tmp_path / "planned")[0] == 0
    found, expected = bits(tmp_path / "open"), bits(tmp_path / "planned")
    assert found[0][1].pop("joined") == [0, 1, 2]
    assert found == expected
    told = rows(tmp_path / "open")[1:]
    everybody, fewer = [0, 1, 2, 3], [0, 2, 3]
    assert [row["took_part"] for row in told] == [[0, 1, 2], everybody, fewer, fewer, everybody]
    sys.modules.pop("rolora.run.served", None)


def test_present_waits_for_those_who_are_wanted_and_longer_for_those_who_are_needed(flower):
    made = SimpleNamespace(clients={client: np.arange(9) for client in range(4)})
    begun = time.monotonic()
    nodes = Nodes(made, lambda _: {0, 1} if time.monotonic() > begun + 0.3 else {0})
    transport = flower.FlowerTransport(nodes, 1.0)
    assert transport.present(wanted=2, least=1) == {0, 1}
    assert transport.present(wanted=5, least=1) == {0, 1}, "nobody new: no wait"
    nodes.there = lambda _: set()
    assert transport.present(wanted=2, least=1) == set()


def test_a_worker_beyond_the_partition_brings_its_own_data():
    settled = config.resolve({"membership": "open", "clients_per_round": 2, "max_weight": 5})
    worker._require_client(7, 3, settled, "mine.jsonl")
    worker._require_client(2, 3, settled, None)
    with pytest.raises(BadInput, match="--client 7 has no part of the configuration's data"):
        worker._require_client(7, 3, settled, None)
    with pytest.raises(BadInput, match="--client 7: this configuration has clients 0 to 2"):
        worker._require_client(7, 3, config.resolve({}), "mine.jsonl")
