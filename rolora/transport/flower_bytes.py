"""Our messages inside Flower's: bytes as the content of a message, and a node's answer to one.

It imports nothing heavy, because Flower starts a process for every message that a SuperNode gets.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from rolora.transport import unix

RECORD, FIELD = "rolora", "message"
_WHOLE = 1 << 20  # bytes up to which a message is one object; beyond it Flower sends it in chunks
_KIND = "rolora.bytes"  # how an array's data is to be read: as it lies


def pack(data: bytes) -> RecordDict:
    """Bytes as the content of a Flower message, of any size."""
    if len(data) <= _WHOLE:
        return RecordDict({RECORD: ConfigRecord({FIELD: data})})
    array = Array(dtype="uint8", shape=(len(data),), stype=_KIND, data=data)
    return RecordDict({RECORD: ArrayRecord({FIELD: array})})


def unpack(content: RecordDict) -> bytes:
    """The inverse of `pack`; raises KeyError or TypeError for what `pack` did not make."""
    data = content[RECORD][FIELD]
    data = getattr(data, "data", data)
    if not isinstance(data, bytes):
        raise TypeError(f"expected bytes, got {type(data).__name__}")
    return data


def received(message: Message) -> bytes | None:
    """The bytes in an answer of another owner's; None where they are not there."""
    try:
        return unpack(message.content)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def answer(message: Message, node_config: Mapping[str, object]) -> Message:
    """The ClientApp: a message's bytes to the node's worker, and back."""
    return Message(
        pack(unix.ask(str(node_config["socket"]), unpack(message.content))), reply_to=message
    )


def pause(waited: float) -> float:
    """Seconds until one asks again, after having waited for `waited` seconds: a twentieth of them,
    so that what is noticed late is late by little, and what lasts long is asked after seldom.
    """
    return min(max(waited / 20, 0.02), 3.0)
