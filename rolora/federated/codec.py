"""What the federation adds to a codec: the key that a message's rounding is drawn from, and bits.

One codec for both directions (`rolora_kernels.codecs`). Server to clients: `published +=
decode(encode(master − published))`; client to server: `encode(local − published)`. What rounding
leaves on the way down stays in the master for next time. int8 rounds at random, keyed by (seed,
round, sender), so that it is unbiased without any feedback state.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rolora.federated import sampling


def key(seed: int, round: int, sender: str) -> int:
    """What a message's rounding is drawn from; sender: "client 3", "server A"."""
    return sampling.key64(seed, "codec", round, sender)


def pack_bits(bits: Tensor) -> Tensor:
    """bool `[n]` as uint8 `[n / 8]`, rounded up."""
    return torch.from_numpy(np.packbits(bits.numpy()))


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits of a packed buffer, bool `[count]`."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count)).bool()
