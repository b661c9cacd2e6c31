"""Q: how a change is written on the wire. One codec for both directions (DESIGN.md, "Precision").

Server to clients: `published += decode(encode(master − published))`; client to server: `encode(local − published)`. What
rounding leaves on the way down stays in the master for next time.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def encode(change: Tensor, dtype: str) -> Tensor:
    """fp32 `[n]` → the wire's dtype, rounded to nearest."""
    return change.to(DTYPES[dtype])


def decode(wire: Tensor) -> Tensor:
    """The wire's `[n]` → fp32; exact."""
    return wire.float()
