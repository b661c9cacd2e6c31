"""Messages that are damaged, junk or claim too much: refused, never a crash, and never memory."""

import json
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from rolora.federated import wire

_MESSAGE = wire.encode_update(
    wire.Update("r", 1, "B", 0, "l", {"A": 0}, 3, 0.5, 1, 1, torch.randn(20))
)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(_MESSAGE) - 1), st.binary(min_size=1, max_size=12))
def test_damaged_messages_never_crash_and_never_pass(place, junk):
    damaged = _MESSAGE[:place] + junk + _MESSAGE[place + len(junk) :]
    if damaged == _MESSAGE:
        return
    with pytest.raises(wire.BadMessage):
        wire.decode_update(damaged, 1 << 16)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_junk_is_no_message(junk):
    with pytest.raises(wire.BadMessage):
        wire.decode_update(junk, 1 << 16)


def test_messages_survive_the_way():
    update = wire.Update(
        "r", 3, "A", 7, "l", {"A": 1, "B": 2}, 9, 0.25, 40, 900, torch.randn(33).bfloat16()
    )
    again = wire.decode_update(wire.encode_update(update), 1 << 16)
    assert replace(again, change=None) == replace(update, change=None) and torch.equal(
        again.change, update.change
    )


def test_a_header_that_claims_much_allocates_nothing():
    """A terabyte claimed in a hundred bytes; and nesting, and numbers beyond any size."""
    import resource

    def message(metadata, **tensor):
        header = json.dumps({"__metadata__": {"rolora": metadata}, "change": tensor}).encode()
        return struct.pack("<Q", len(header)) + header + b"\0" * 64

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (
        message("{}", dtype="F32", shape=[1 << 40], data_offsets=[0, 1 << 42]),
        message("{}", dtype="F32", shape=[1 << 40], data_offsets=[0, 64]),
        message("{}", dtype="F32", shape=[1 << 62, 1 << 62], data_offsets=[0, 64]),
        message("{}", dtype="F32", shape=[-1], data_offsets=[0, 64]),
        message("[" * 60_000, dtype="F32", shape=[16], data_offsets=[0, 64]),
        struct.pack("<Q", (1 << 63) + 5) + b"{}",
        struct.pack("<Q", 1 << 30) + b"{" * 100,
    ):
        with pytest.raises(wire.BadMessage):
            wire.decode_update(data, 1 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"


_HEADER = dict(
    protocol=1,
    kind="update",
    run="r",
    round=1,
    phase="B",
    client=0,
    layout="l",
    versions={"A": 0},
    weight=3,
    loss=0.5,
    examples=1,
    tokens=1,
)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(_HEADER)), _JSON, st.booleans())
def test_a_header_with_any_value_in_any_field_is_a_message_or_is_refused(name, value, drop):
    """The digest is right, as an attacker can make it: types and fields are judged for
    themselves.
    """
    header = {k: v for k, v in _HEADER.items() if not (drop and k == name)} | (
        {} if drop else {name: value}
    )
    try:
        header["digest"] = wire._digest(header, {"change": torch.zeros(4)})
    except (ValueError, TypeError):
        return
    data = save({"change": torch.zeros(4)}, metadata={"rolora": json.dumps(header, sort_keys=True)})
    try:
        update = wire.decode_update(data, 1 << 16)
    except wire.BadMessage:
        return
    assert not drop and type(getattr(update, name, value)) in (int, float, str, dict)
