"""What rests on Flower's own classes: bytes inside its messages, and its waits.

Skipped where flwr is not installed.
"""

import os
import time

import pytest

pytest.importorskip("flwr")


def test_bytes_of_any_size_are_packed_and_come_back():
    from flwr.app import ArrayRecord, ConfigRecord, RecordDict

    from rolora.transport.flower_bytes import RECORD, pack, received, unpack

    for size, kind in ((0, ConfigRecord), (1 << 20, ConfigRecord), ((1 << 20) + 1, ArrayRecord)):
        data = os.urandom(size)
        content = pack(data)
        assert isinstance(content[RECORD], kind) and unpack(content) == data
    for content in (
        {},
        {RECORD: ConfigRecord({"other": 1})},
        {RECORD: ConfigRecord({"message": 1})},
    ):
        with pytest.raises((KeyError, TypeError)):
            unpack(RecordDict(content))
    assert received(None) is None


def test_a_message_over_the_limit_is_not_fetched_to_its_end():
    from rolora.transport.flower_node import TooLong, _bounded

    fetched = []

    def pull(object_id):
        fetched.append(object_id)
        return b"x" * 60

    bounded = _bounded(pull, 100)
    assert bounded("a") == bounded("b") == b"x" * 60
    with pytest.raises(TooLong, match="100 bytes"):
        bounded("c")
    assert fetched == ["a", "b"]


def test_the_second_that_flower_waits_for_an_object_can_still_be_shortened():
    """A version of Flower in which `hasten` would do nothing is noticed here."""
    from flwr.supercore.inflatable.inflatable_utils import (
        ObjectUnavailableError,
        pull_objects,
    )

    from rolora.transport.flower_pulls import hasten

    times = []

    def pull(object_id):
        times.append(time.monotonic())
        if len(times) < 3:
            raise ObjectUnavailableError(object_id)
        return b"there"

    hasten()
    waits = pull_objects.__kwdefaults__["initial_backoff"]
    assert pull_objects(["a"], pull) == {"a": b"there"} and len(times) == 3
    assert waits < 0.1
