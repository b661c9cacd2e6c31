"""A peer's numbers and texts at their worst, in messages whose digest is right: the round goes on
without them.
"""

import json
import os
import random

import pytest
from safetensors.torch import save

from rolora.federated import guard, wire
from rolora_kernels.codecs import CODECS
from tests.rolora.federated import toy

FIELDS = ("run", "round", "phase", "client", "layout", "versions", "weight", "loss")
FIELDS = (*FIELDS, "examples", "tokens")
HUGE = "9" * 4300  # digits; the most that Python reads by default
# As JSON texts, because an attacker writes bytes and not Python objects.
VALUES = {
    "10^400": "1" + "0" * 400,
    "-10^400": "-1" + "0" * 400,
    "10^308": "1" + "0" * 308,
    "1e308": "1e308",
    "-1e308": "-1e308",
    "1e400": "1e400",
    "4300 digits": HUGE,
    "4301 digits": HUGE + "9",
    "2^53": str(1 << 53),
    "surrogate": '"\\ud800"',
    "escape": '"\\u001b[2J\\u001b]0;owned\\u0007"',
    "long": json.dumps("x" * 5000),
    "nested": "[" * 900 + "]" * 900,
    "nested deeply": "[" * 20000 + "]" * 20000,
    "objects": '{"a":' * 600 + "1" + "}" * 600,
    "NaN": "NaN",
    "-Infinity": "-Infinity",
    "true": "true",
    "null": "null",
    "many kinds": json.dumps({str(i): i for i in range(500)}),
    "huge version": '{"A": 1' + "0" * 400 + ', "B": 0, "head": 0}',
    "escaping kind": '{"\\u001b[2J": 0}',
}


@pytest.fixture(scope="module")
def round_one():
    """(what round 1 expects, an honest header, its tensors)."""
    server = toy.server(rounds=1)
    messages = {}
    for arrival in server.transport.run_round(server._orders(1, "B", [0])):
        messages[arrival.client] = arrival.message
    bounds = guard.Bounds(64.0, 1 << 30, 10)
    expected = guard.Round(
        run="toy",
        number=1,
        phase="B",
        cohort=frozenset([0]),
        layout=server.layout,
        state=server.state,
        exchange_dtype="bf16",
        bounds=bounds,
        examples_of=lambda client: 1 << 30,
    )
    update = wire.decode_update(messages[0], 1 << 30)
    assert guard.check(messages[0], 0, expected, set())
    header = {"protocol": 1, "kind": "update", **wire._header(update, ("change", "ranks"))}
    return expected, header, {"change": update.change}


def message(header, tensors, field, text):
    """An update whose `field` is the JSON `text`; its digest is right where one can be made at
    all.
    """
    marked = json.dumps(header | {field: "<here>"}, sort_keys=True).replace('"<here>"', text)
    try:
        digest = wire._digest(json.loads(marked), tensors)
    except (ValueError, RecursionError):
        digest = "0" * 64
    whole = marked[:-1] + f', "digest": "{digest}"}}'
    return save(tensors, metadata={"rolora": whole})


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("field", FIELDS)
def test_a_field_at_its_worst_is_refused_by_name(field, value, round_one):
    expected, header, tensors = round_one
    with pytest.raises(guard.Rejected) as verdict:
        guard.check(message(header, tensors, field, VALUES[value]), 0, expected, set())
    text = str(verdict.value)
    assert text.isprintable() and len(text) <= 301
    assert verdict.value.reason in REASONS


REASONS = {
    "unreadable",
    "bad report",
    "bad weight",
    "other run",
    "stale or replayed",
    "other phase",
    "other layout",
    "stale factors",
    "other client",
}


def test_structure_aware_fuzzing(round_one):
    """Random fields, values and nestings; ROLORA_FUZZ sets how many (the suite's few thousand are a
    sample of 100,000).
    """
    expected, header, tensors = round_one
    rng = random.Random(0)
    texts = list(VALUES.values())
    accepted = 0
    for _ in range(int(os.environ.get("ROLORA_FUZZ", 2000))):
        field = rng.choice([*FIELDS, "digest", "protocol", "kind", "extra"])
        value = rng.choice([*texts, str(rng.getrandbits(rng.choice([1, 8, 53, 64, 2000])))])
        if rng.random() < 0.3:
            value = rng.choice(["[{}]", '{{"A": {}}}', "-{}", '"{}"']).format(value)
        data = message(header, tensors, field, value)
        try:
            update, _, norm = guard.check(data, 0, expected, set())
        except guard.Rejected as verdict:
            assert str(verdict).isprintable()
        else:
            accepted += 1
            row = [update.loss, update.examples, update.tokens, update.weight, norm]
            assert "Infinity" not in json.dumps(row) and all(abs(v) < 1 << 53 for v in row)
    assert accepted < 1500


def test_an_exception_while_judging_is_a_refusal(round_one, monkeypatch):
    expected, header, tensors = round_one
    monkeypatch.setattr(CODECS["bf16"], "decode", lambda change: 1 / 0)
    data = message(header, tensors, "loss", "0.5")
    with pytest.raises(guard.Rejected, match="unreadable: judging it raised ZeroDivisionError"):
        guard.check(data, 0, expected, set())


def test_a_tensor_s_name_reaches_no_terminal(round_one):
    expected, header, tensors = round_one
    named = {"\x1b[2J" + "x" * 4000: tensors["change"]}
    header = header | {"digest": wire._digest(header, named)}
    data = save(named, metadata={"rolora": json.dumps(header, sort_keys=True)})
    with pytest.raises(guard.Rejected, match="expected a tensor 'change'") as verdict:
        guard.check(data, 0, expected, set())
    assert str(verdict.value).isprintable() and len(str(verdict.value)) < 400


def test_rounds_of_no_change_do_not_close_the_bound():
    """`--schedule AAB`: A's gradient is zero while B is, which says nothing about A's later
    changes.
    """
    norms = guard.Norms(10.0)
    for _ in range(3):
        norms.record("A", [0.0, 0.0, 0.0])
    assert norms.bound("A") is None
    norms.record("A", [2.0, 4.0, 3.0])
    norms.record("A", [0.0, 0.0, 0.0])
    norms.record("A", [5.0])
    assert norms.bound("A") == 40.0


def test_a_run_that_begins_with_rounds_of_zero_goes_on():
    server = toy.server(rounds=6, bound=10.0, trainer=Idle)
    server.run()
    assert server.state.round == 6


class Idle(toy.Drift):
    """Clients that change nothing in rounds 1 to 4."""

    def train(self, task, published, client_state):
        update, state = super().train(task, published, client_state)
        if task.round <= 4:
            update.change.zero_()
        return update, state
