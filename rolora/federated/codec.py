"""Q: how a change is written on the wire. One codec for both directions.

Server to clients: `published += decode(encode(master − published))`; client to server:
`encode(local − published)`. What rounding leaves on the way down stays in the master for next time.
int8 rounds at random, keyed by (seed, round, sender), so that it is unbiased without any feedback
state.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rolora.federated import sampling
from rolora_kernels.exchange import add_decoded, decode, encode
from rolora_kernels.wire_format import WIRE, values_in, wire_length

__all__ = [
    "WIRE",
    "add_decoded",
    "decode",
    "encode",
    "key",
    "pack_bits",
    "unpack_bits",
    "values_in",
    "wire_bytes",
    "wire_shape",
]


def key(seed: int, round: int, sender: str) -> int:
    """What a message's rounding is drawn from; sender: "client 3", "server A"."""
    return sampling.key64(seed, "codec", round, sender)


def wire_shape(values: int, dtype: str) -> tuple[torch.dtype, int]:
    """(dtype, elements) of a wire buffer for so many values."""
    return WIRE[dtype], wire_length(values, WIRE[dtype])


def wire_bytes(values: int, dtype: str) -> int:
    """Bytes of a wire buffer for so many values: 4, 2, 2 or 1 + 4/256 each."""
    wire, length = wire_shape(values, dtype)
    return length * wire.itemsize


def pack_bits(bits: Tensor) -> Tensor:
    """bool `[n]` as uint8 `[n / 8]`, rounded up."""
    return torch.from_numpy(np.packbits(bits.numpy()))


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits of a packed buffer, bool `[count]`."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count)).bool()
