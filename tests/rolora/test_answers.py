"""Answers of other owners are hostile bytes: failures by a fixed word, never an exception."""

import importlib
import json
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest

from rolora.transport.answers import REASONS, BadAnswer, Bindings, arrival_of, client_of

DEEP = b"[" * 5000


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "U",
        7,
        [b"U"],
        b"",
        b"X",
        b"F",
        b"Fmy own words: x",
        b"\xff\xfe",
        b"F\xff\x00: \x1b[2J",
    ],
)
def test_what_is_no_answer_is_a_failure(answer):
    arrival = arrival_of(3, answer)
    assert arrival.client == 3 and arrival.message is None
    assert arrival.failure.reason == "unreadable answer" and str(arrival.failure).isprintable()


def test_updates_and_known_reasons_come_through():
    assert arrival_of(1, b"Uxyz").message == b"xyz"
    for reason in REASONS:
        failure = arrival_of(1, f"F{reason}: a\x1b[2J\n".encode() + b"b" * 5000).failure
        assert failure.reason == reason and str(failure).isprintable() and len(str(failure)) < 250


@pytest.mark.parametrize(
    "greeting",
    [None, "x", b"", b"{", b"\xff", DEEP, b"7", b"[]", b"{}", b'{"client": "1"}']
    + [json.dumps({"client": value}).encode() for value in (True, -1, 1.0, 1 << 31, None, [1])],
)
def test_what_is_no_greeting_is_refused(greeting):
    with pytest.raises(BadAnswer):
        client_of(greeting)


def test_a_client_stays_with_its_first_node_while_that_is_known():
    bindings = Bindings()
    bindings.bind(4, 70)
    bindings.bind(4, 70)
    with pytest.raises(BadAnswer, match="it says that it is client 4, which node 70 is"):
        bindings.bind(4, 71)
    bindings.keep({71})
    bindings.bind(4, 71)
    assert bindings.nodes == {4: 71}


class Grid:
    """Nodes that answer by a given rule: node → content, or None for silence."""

    def __init__(self, answers):
        self.answers, self.sent = answers, {}

    def get_node_ids(self):
        return list(self.answers)

    def push_messages(self, messages):
        start = len(self.sent)
        for message in messages:
            self.sent[str(len(self.sent))] = message
        return [str(number) for number in range(start, len(self.sent))]

    def pull_messages(self, ids):
        found = []
        for name in ids:
            sent = self.sent[name]
            content = self.answers[sent.dst_node_id](sent.message_type)
            if content is not None:
                metadata = SimpleNamespace(reply_to_message_id=name)
                found.append(
                    SimpleNamespace(content=content, metadata=metadata, has_error=lambda: False)
                )
        return found


@pytest.fixture
def flower(monkeypatch):
    """The transport's module; where flwr is not installed its three names are stood in for."""
    app = ModuleType("flwr.app")
    app.ConfigRecord = app.RecordDict = dict
    app.Message = SimpleNamespace
    monkeypatch.setitem(sys.modules, "flwr", ModuleType("flwr"))
    monkeypatch.setitem(sys.modules, "flwr.app", app)
    monkeypatch.delitem(sys.modules, "rolora.transport.flower", raising=False)
    module = importlib.import_module("rolora.transport.flower")
    monkeypatch.setattr(module, "_GATHERING", 0.3)
    yield module
    sys.modules.pop("rolora.transport.flower", None)


def node(hello, update=b"Uok"):
    def answer(kind):
        data = hello if kind == "query" else update
        return {"rolora": {"message": data}} if isinstance(data, bytes) else data

    return answer


def test_a_round_among_hostile_nodes(flower, capsys):
    grid = Grid(
        {
            10: node(b'{"client": 0}'),
            11: node(b"not JSON"),
            12: node({"other": 1}),
            13: node({"rolora": {"message": 5}}),
            14: node(b'{"client": 1}', {"rolora": 7}),
            15: node(b'{"client": 2}', b"Fwhatever I like: \x1b"),
        }
    )
    transport = flower.FlowerTransport(grid)
    deadline = time.monotonic() + 5
    tasks = [(client, b"task") for client in range(4)]
    arrivals = {a.client: a for a in transport.run_round(tasks, deadline)}
    assert arrivals[0].message == b"ok"
    reasons = [arrivals[client].failure.reason for client in (1, 2, 3)]
    assert reasons == ["unreadable answer", "unreadable answer", "absent"]
    assert "(3 greetings refused)" in str(arrivals[3].failure)
    grid.answers[16] = node(b'{"client": 0}')
    list(transport.run_round(tasks, time.monotonic() + 5))
    assert transport.nodes[0] == 10
    assert "node 16 is refused: it says that it is client 0, which node 10 is" in (
        capsys.readouterr().out
    )


def test_greetings_end_with_the_round(flower):
    transport = flower.FlowerTransport(Grid({10: node(None)}))
    start = time.monotonic()
    (arrival,) = transport.run_round([(0, b"task")], start + 1)
    assert arrival.failure.reason == "absent" and time.monotonic() - start < 2
