"""Messages: safetensors bytes with a JSON header. No pickle.

A task goes to a client, an update comes back. Sizes are checked before anything is allocated, the
digest (SHA-256 over header and tensors) before anything is believed. What a message claims is
judged by `guard`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor

PROTOCOL = 1
Header = dict[str, Any]  # JSON: `_build` judges every value before anything uses one
_HEADER_LIMIT = 1 << 16  # bytes of JSON; ours are under a thousand
_PARTS = ("full", "delta", "turn", "masking")  # of a task


def printable(text: str, most: int) -> str:
    """A peer's text as a terminal and a log bear it: no control characters or lone surrogates, cut
    at `most`.
    """
    cut = text[: most + 1]
    clean = "".join(c if c.isprintable() else "?" for c in cut[:most])
    return clean + "…" if len(cut) > most else clean


class BadMessage(ValueError):
    """A message that cannot be read; the text names why, and is printable."""

    def __init__(self, text: str):
        super().__init__(printable(text, 300))


@dataclass(frozen=True)
class Task:
    """One client's order for a round.

    `versions` and `fingerprints` say which published factors the client must hold; `full`, `delta`
    and `turn` bring it there (fp32 buffers to take over, wire buffers to add, fp64 matrices to turn
    factors by). `masking`: empty, or the bytes of the order to answer under masks.
    """

    run: str
    round: int
    phase: str
    client: int
    layout: str
    versions: dict[str, int]
    fingerprints: dict[str, str]
    exchange_dtype: str
    lr: float
    full: dict[str, Tensor]
    delta: dict[str, Tensor]
    turn: dict[str, Tensor] = field(default_factory=dict)
    masking: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """One client's answer: the change of the travelling kinds, flat, in the wire's dtype, and what
    it rests on.

    `weight` is the number of the client's examples (its share in the mean); `examples` and `tokens`
    were processed, `loss` is their mean training loss. `ranks`: None, or one bit for every rank of
    every adapter, packed: the ranks that `change` holds, where a client sends some only.
    """

    run: str
    round: int
    phase: str
    client: int
    layout: str
    versions: dict[str, int]
    weight: int
    loss: float
    examples: int
    tokens: int
    change: Tensor
    ranks: Tensor | None = None


M = TypeVar("M")


def encode_task(task: Task) -> bytes:
    tensors = {
        f"{part}.{kind}": value for part in _PARTS for kind, value in getattr(task, part).items()
    }
    return encode_message("task", _header(task, _PARTS), tensors)


def decode_task(data: bytes, limit: int) -> Task:
    header, tensors = decode_message("task", data, limit)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for name, tensor in tensors.items():
        mode, _, kind = name.partition(".")
        if mode not in parts:
            raise BadMessage(f"unexpected tensor {name[:40]!r}")
        parts[mode][kind] = tensor
    return built(Task, header, parts)


def encode_update(update: Update) -> bytes:
    tensors = {"change": update.change} | ({} if update.ranks is None else {"ranks": update.ranks})
    return encode_message("update", _header(update, ("change", "ranks")), tensors)


def decode_update(data: bytes, limit: int) -> Update:
    header, tensors = decode_message("update", data, limit)
    if set(tensors) not in ({"change"}, {"change", "ranks"}):
        names = [name[:40] for name in sorted(tensors)[:4]]
        raise BadMessage(f"expected a tensor 'change', got {names}")
    return built(Update, header, {"ranks": None} | tensors)


def _header(message: Task | Update, tensors: tuple[str, ...]) -> Header:
    return {
        name: getattr(message, name) for name in message.__dataclass_fields__ if name not in tensors
    }


def encode_message(kind: str, header: Header, tensors: dict[str, Tensor]) -> bytes:
    """Bytes of a message of any kind, with its protocol and digest."""
    header = {"protocol": PROTOCOL, "kind": kind, **header}
    header["digest"] = _digest(header, tensors)
    return save(
        {k: v.contiguous() for k, v in tensors.items()},
        metadata={"rolora": json.dumps(header, sort_keys=True)},
    )


def decode_message(kind: str, data: bytes, limit: int) -> tuple[Header, dict[str, Tensor]]:
    """(header, tensors) of a message of that kind; raises BadMessage for anything else."""
    if len(data) > limit:
        raise BadMessage(f"{len(data)} bytes are over the limit of {limit}")
    if len(data) < 8 or struct.unpack("<Q", data[:8])[0] > min(_HEADER_LIMIT, len(data) - 8):
        raise BadMessage("truncated or with an oversized header")
    length = struct.unpack("<Q", data[:8])[0]
    try:
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["rolora"])
        tensors = load(data)
        claimed = header.pop("digest", None)
        digest = _digest(header, tensors)
    except Exception as error:  # a peer's bytes may fail in any way that a parser knows
        raise BadMessage(f"not a message: {type(error).__name__}") from None
    protocol = header.get("protocol")
    if protocol != PROTOCOL or type(protocol) is not int or header.get("kind") != kind:  # True == 1
        raise BadMessage(f"not a {kind} of protocol {PROTOCOL}")
    if claimed != digest:
        raise BadMessage("the digest does not match: damaged or altered on the way")
    del header["protocol"], header["kind"]
    return header, tensors


def _digest(header: Header, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(
            tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        )
    return digest.hexdigest()


_MOST_COUNT = 1 << 53  # beyond it a float skips whole numbers
_MOST_TEXT, _MOST_KINDS = 128, 8


def _count(value: object) -> bool:
    return type(value) is int and abs(value) < _MOST_COUNT


def _number(value: object) -> bool:
    """NaN and infinity are numbers here: whether they are borne is the guard's to say."""
    return type(value) is float or _count(value)


def _text(value: object) -> bool:
    return type(value) is str and len(value) <= _MOST_TEXT and value.isprintable()


def _counts(value: object) -> bool:
    return isinstance(value, dict) and _of_kinds(value) and all(map(_count, value.values()))


def _texts(value: object) -> bool:
    return isinstance(value, dict) and _of_kinds(value) and all(map(_text, value.values()))


def _of_kinds(value: dict[object, object]) -> bool:
    return len(value) <= _MOST_KINDS and all(map(_text, value))


# What every field of a header must be, judged before anything computes with it.
_FIELDS = {
    "run": (_text, "a short text"),
    "round": (_count, "a whole number"),
    "attempt": (_count, "a whole number"),
    "phase": (_text, "a short text"),
    "client": (_count, "a whole number"),
    "layout": (_text, "a short text"),
    "versions": (_counts, "whole numbers by kind"),
    "fingerprints": (_texts, "short texts by kind"),
    "exchange_dtype": (_text, "a short text"),
    "lr": (_number, "a number"),
    "weight": (_count, "a whole number"),
    "loss": (_number, "a number"),
    "examples": (_count, "a whole number"),
    "tokens": (_count, "a whole number"),
    "threshold": (_count, "a whole number"),
    "degree": (_count, "a whole number"),
    "max_abs": (_number, "a number"),
    "max_weight": (_count, "a whole number"),
    "max_terms": (_count, "a whole number"),
}


def built(cls: type[M], header: Header, tensors: dict[str, Any]) -> M:
    """A message of dataclass `cls`, its header's values judged; raises BadMessage."""
    declared: Any = cls  # a dataclass
    fields = {field.name for field in dataclasses.fields(declared)} - set(tensors)
    if set(header) != fields:
        differing = sorted(set(header) ^ fields)[:4]
        raise BadMessage(f"header fields differ: {[name[:40] for name in differing]}")
    for name, value in header.items():
        is_right, expected = _FIELDS[name]
        if not is_right(value):
            raise BadMessage(f"{name} is no {expected.partition(' ')[2]} within bounds")
    return cls(**header, **tensors)
