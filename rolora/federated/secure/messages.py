"""What server and clients say to each other in a masked round, as `wire` writes messages.

Every answer is named like what it answers to: `KeysWanted` → `Keys`, `SharesWanted` → `Sealed`, a
task with `MaskingWanted` → `Masked`, `UnmaskingWanted` → `Unmasking`. All of them belong to one
attempt at one round of one run. Tensors are on the CPU.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from rolora.federated import wire
from rolora.federated.secure.crypto import TAG
from rolora.federated.secure.settings import MARK
from rolora.federated.secure.shamir import SHARE
from rolora.federated.wire import BadMessage

KEY = 32
PAIR = 2 * SHARE + TAG  # bytes of what one client seals for another
SIGNATURE = 128  # bytes of a row: the signature's length, the signature, zeros
EXTRAS = 4  # values behind a masked change: weight, weighted loss, examples, tokens
LOSS_STEPS = 1 << 20  # of one unit of a loss

Shape = tuple[torch.dtype, tuple[int | None, ...]]


@dataclass(frozen=True)
class Message:
    """What all of them say: the attempt that they belong to, and the client."""

    run: str
    round: int
    attempt: int
    client: int

    TENSORS: ClassVar[dict[str, Shape]] = {}

    @property
    def session(self) -> tuple[str, int, int]:
        """The attempt that this belongs to."""
        return self.run, self.round, self.attempt


@dataclass(frozen=True)
class KeysWanted(Message):
    """The server begins an attempt."""


@dataclass(frozen=True)
class Keys(Message):
    """A client's public keys for sealing and for masks, and the commitment to its own seed; and its
    signature under them, of no length where it has no identity key.
    """

    keys: Tensor
    signature: Tensor

    TENSORS: ClassVar[dict[str, Shape]] = {
        "keys": (torch.uint8, (3 * KEY,)),
        "signature": (torch.uint8, (None,)),
    }


@dataclass(frozen=True)
class SharesWanted(Message):
    """Who takes part, with their keys; how many must stay (`threshold`) and how many neighbours a
    client has (`degree`, 0: all). `signatures` under the keys: a row for each client, or none.
    """

    threshold: int
    degree: int
    clients: Tensor
    keys: Tensor
    signatures: Tensor

    TENSORS: ClassVar[dict[str, Shape]] = {
        "clients": (torch.int64, (None,)),
        "keys": (torch.uint8, (None, 3 * KEY)),
        "signatures": (torch.uint8, (None, SIGNATURE)),
    }


@dataclass(frozen=True)
class Sealed(Message):
    """A client's shares of its mask key and of its seed, sealed for each neighbour."""

    to: Tensor
    sealed: Tensor

    TENSORS: ClassVar[dict[str, Shape]] = {
        "to": (torch.int64, (None,)),
        "sealed": (torch.uint8, (None, PAIR)),
    }


@dataclass(frozen=True)
class MaskingWanted(Message):
    """What a client's neighbours sealed for it, from those that did; what its change is rounded to
    first, and the bounds of the sum.
    """

    exchange_dtype: str
    max_abs: float
    max_weight: int
    max_terms: int
    senders: Tensor
    sealed: Tensor

    TENSORS: ClassVar[dict[str, Shape]] = {
        "senders": (torch.int64, (None,)),
        "sealed": (torch.uint8, (None, PAIR)),
    }


@dataclass(frozen=True)
class Masked(Message):
    """A client's term of the sum under its masks, int64 modulo 2**64: its weighted change in units
    of the sum, then its weight, weighted loss, examples and tokens.
    """

    phase: str
    layout: str
    versions: dict[str, int]
    values: Tensor

    TENSORS: ClassVar[dict[str, Shape]] = {"values": (torch.int64, (None,))}


@dataclass(frozen=True)
class UnmaskingWanted(Message):
    """Which of a client's neighbours sent their term, and which are gone."""

    stayed: Tensor
    gone: Tensor

    TENSORS: ClassVar[dict[str, Shape]] = {
        "stayed": (torch.int64, (None,)),
        "gone": (torch.int64, (None,)),
    }


@dataclass(frozen=True)
class Unmasking(Message):
    """A client's shares of the seeds of those that stayed, and of the mask keys of those gone, in
    the order in which they were asked for.
    """

    seeds: Tensor
    keys: Tensor

    TENSORS: ClassVar[dict[str, Shape]] = {
        "seeds": (torch.uint8, (None, SHARE)),
        "keys": (torch.uint8, (None, SHARE)),
    }


M = TypeVar("M", bound=Message)
_LETTERS: dict[type[Message], bytes] = {
    KeysWanted: b"K",
    SharesWanted: b"S",
    UnmaskingWanted: b"U",
}


def encode(message: Message) -> bytes:
    names = [field.name for field in dataclasses.fields(message)]
    tensors = {name: getattr(message, name) for name in message.TENSORS}
    header: dict[str, Any] = {name: getattr(message, name) for name in names if name not in tensors}
    return wire.encode_message(type(message).__name__, header, tensors)


def decode(cls: type[M], data: bytes, limit: int) -> M:
    """A message of that class; raises BadMessage for anything else."""
    header, tensors = wire.decode_message(cls.__name__, data, limit)
    if tensors.keys() != cls.TENSORS.keys():
        raise BadMessage(f"expected the tensors {sorted(cls.TENSORS)}")
    for name, (dtype, shape) in cls.TENSORS.items():
        found = tensors[name]
        fits = len(found.shape) == len(shape) and all(
            wanted in (None, size) for wanted, size in zip(shape, found.shape, strict=True)
        )
        if found.dtype != dtype or not fits:
            raise BadMessage(f"{name} is {found.dtype} {list(found.shape)}")
    return wire.built(cls, header, tensors)


def request(message: Message) -> bytes:
    """A message that is no task, as a client is asked it."""
    return MARK + _LETTERS[type(message)] + encode(message)


def requested(data: bytes, limit: int) -> Message:
    """The message in a request, after MARK; raises BadMessage for anything but one of the three."""
    for kind, letter in _LETTERS.items():
        if data.startswith(letter):
            return decode(kind, data[len(letter) :], limit)
    raise BadMessage("no request of a masked round")


def blob(data: bytes) -> Tensor:
    """Bytes as uint8 `[n]`."""
    if not data:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def raw(tensor: Tensor) -> bytes:
    """uint8 of any shape as bytes."""
    return tensor.contiguous().numpy().tobytes()


def rows(parts: list[bytes], width: int) -> Tensor:
    """Byte strings of one length as uint8 `[n, width]`."""
    if not parts:
        return torch.empty(0, width, dtype=torch.uint8)
    return blob(b"".join(parts)).view(len(parts), width)


def signature_rows(signatures: list[bytes]) -> Tensor:
    """Signatures of less than SIGNATURE bytes as rows; no rows where there are none at all."""
    if not any(signatures):
        return rows([], SIGNATURE)
    lines = [bytes([len(one)]) + one for one in signatures]
    return rows([line.ljust(SIGNATURE, b"\0") for line in lines], SIGNATURE)


def signature_in(row: Tensor) -> bytes:
    """The signature in such a row."""
    line = raw(row)
    return line[1 : 1 + line[0]]
