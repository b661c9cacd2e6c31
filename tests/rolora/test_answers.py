"""Answers of other owners are hostile bytes: failures by a fixed word, never an exception."""

import json
import time
from types import SimpleNamespace

import pytest

from rolora.transport.answers import REASONS, BadAnswer, Bindings, arrival_of, greeting_of

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
    [None, "x", b"", b"{", b"\xff", DEEP, b"7", b"[]", b"{}", b'{"client": 1}', b'{"examples": 1}']
    + [
        json.dumps({"client": 1, "examples": 1, name: value}).encode()
        for name in ("client", "examples")
        for value in (True, -1, 1.0, 1 << 31, None, [1], "1")
    ]
    + [b'{"client": 1, "examples": 0}'],
)
def test_what_is_no_greeting_is_refused(greeting):
    with pytest.raises(BadAnswer):
        greeting_of(greeting)


def test_a_greeting_says_who_it_is_and_how_much_it_has():
    greeting = greeting_of(b'{"client": 0, "examples": 27, "layout": "x"}')
    assert (greeting.client, greeting.examples) == (0, 27)


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
    """Nodes that answer by a given rule: node → content, None for silence, a text for an error."""

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
                failed = isinstance(content, str)
                found.append(
                    SimpleNamespace(
                        content=content,
                        metadata=metadata,
                        has_error=lambda failed=failed: failed,
                        error=SimpleNamespace(reason=content),
                    )
                )
        return found


def hello(client, examples=27):
    return json.dumps({"client": client, "examples": examples}).encode()


def node(greeting, update=b"Uok"):
    def answer(kind):
        data = greeting if kind == "query" else update
        return {"rolora": {"message": data}} if isinstance(data, bytes) else data

    return answer


def test_a_round_among_hostile_nodes(flower, capsys):
    grid = Grid(
        {
            10: node(hello(0)),
            11: node(b"not JSON"),
            12: node({"other": 1}),
            13: node({"rolora": {"message": 5}}),
            14: node(hello(1), {"rolora": 7}),
            15: node(hello(2), b"Fwhatever I like: \x1b"),
        }
    )
    transport = flower.FlowerTransport(grid, 0.3)
    deadline = time.monotonic() + 600
    tasks = [(client, b"task") for client in range(4)]
    arrivals = {a.client: a for a in transport.run_round(tasks, deadline)}
    assert arrivals[0].message == b"ok"
    reasons = [arrivals[client].failure.reason for client in (1, 2, 3)]
    assert reasons == ["unreadable answer", "unreadable answer", "absent"]
    assert "(3 greetings refused)" in str(arrivals[3].failure)
    grid.answers[16] = node(hello(0))
    list(transport.run_round(tasks, time.monotonic() + 600))
    assert transport.nodes[0] == 10
    assert "node 16 is refused: it says that it is client 0, which node 10 is" in (
        capsys.readouterr().out
    )


def asked(grid, node, kind):
    return sum(m.dst_node_id == node and m.message_type == kind for m in grid.sent.values())


def round_of(transport, clients=2):
    tasks = [(client, b"task") for client in range(clients)]
    arrivals = transport.run_round(tasks, time.monotonic() + 600)
    return {a.client: a.failure.reason if a.failure else "ok" for a in arrivals}


def test_a_node_that_failed_is_greeted_again_and_counts_again(flower):
    grid = Grid({10: node(hello(0)), 11: node(hello(1))})
    transport = flower.FlowerTransport(grid, 0.3)
    assert round_of(transport) == {0: "ok", 1: "ok"}
    whole = grid.answers[11]
    grid.answers[11] = lambda kind: "its app raised"  # all it is asked, greetings too
    assert round_of(transport) == {0: "ok", 1: "node failed"}
    assert round_of(transport) == {0: "ok", 1: "absent"}
    assert asked(grid, 11, "query") == 2, "once a round"
    grid.answers[11] = whole
    assert round_of(transport) == {0: "ok", 1: "ok"}
    assert asked(grid, 10, "query") == 1, "a node that answers is not greeted again"


def test_a_greeting_that_is_answered_late_is_heard_in_a_later_round(flower, monkeypatch):
    monkeypatch.setattr(flower, "_GREETING", 0.5)
    grid = Grid({10: node(hello(0)), 11: node(None)})
    transport = flower.FlowerTransport(grid, 0.3)
    assert round_of(transport) == {0: "ok", 1: "absent"}
    assert round_of(transport) == {0: "ok", 1: "absent"}
    grid.answers[11] = node(hello(1))
    assert round_of(transport) == {0: "ok", 1: "ok"} and asked(grid, 11, "query") == 1


def test_a_client_is_held_to_the_examples_it_first_said_it_has(flower):
    grid = Grid({10: node(hello(0, 27)), 11: node(hello(1, 54))})
    transport = flower.FlowerTransport(grid, 0.3)
    round_of(transport)
    grid.answers = {12: node(hello(0, 5000)), 11: grid.answers[11]}  # back as another node
    assert round_of(transport) == {0: "ok", 1: "ok"}
    assert transport.claims == {0: 27, 1: 54}


def test_greetings_end_with_the_round(flower):
    transport = flower.FlowerTransport(Grid({10: node(None)}), 0.3)
    (arrival,) = transport.run_round([(0, b"task")], time.monotonic() + 1)
    assert arrival.failure.reason == "absent"


def test_greetings_leave_half_of_the_time_to_those_that_are_here(flower):
    transport = flower.FlowerTransport(Grid({10: node(hello(0)), 11: node(None)}), 600)
    start = time.monotonic()
    tasks = [(0, b"task"), (1, b"task")]
    arrivals = {a.client: a for a in transport.run_round(tasks, start + 2)}
    assert arrivals[0].message == b"ok" and arrivals[1].failure.reason == "absent"


def test_messages_are_pushed_together_and_one_that_is_not_taken_is_a_failure(flower, monkeypatch):
    pushes = []

    class Refusing(Grid):
        def push_messages(self, messages):
            pushes.append([message.dst_node_id for message in messages])
            names = super().push_messages(messages)
            return ["" if m.dst_node_id == 11 else n for m, n in zip(messages, names, strict=True)]

    grid = Refusing({10 + client: node(hello(client)) for client in range(4)})
    transport = flower.FlowerTransport(grid, 0.3)
    transport.nodes = {client: 10 + client for client in range(4)}
    transport.met = set(grid.answers)
    monkeypatch.setattr(flower, "_TOGETHER", 8)
    tasks = [(client, b"task") for client in range(5)]
    found = {a.client: a.failure for a in transport.run_round(tasks, time.monotonic() + 600)}
    assert pushes == [[10, 11], [12, 13]], "eight bytes at a time"
    assert found[0] is found[2] is found[3] is None
    assert str(found[1]) == "node failed: Flower has not taken its task"
    assert found[4].reason == "absent"
