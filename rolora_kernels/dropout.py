"""Counter-based LoRA dropout: the mask is a function of a key and of the element's place, so
backward makes it again.

`keep[row, column]` is decided by Philox-4x32-10 (Salmon et al., SC 2011) with the 64-bit key in
`key` and the counter `(column // 4, row, 0, 0)`; lane `column % 4` is compared with `p * 2**32`.
Nothing of size [M, K] outlives a call. Rows count from the start of the client's own tokens, so a
cohort trained together draws what each client would draw alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


@dataclass(frozen=True)
class Dropout:
    """Probability of dropping `p`, and the key: int64 tensor `[]` on the device of x (all 64 bits
    count).

    For a cohort trained together the key is `[M]`, each row's client's, and `rows` int64 `[M]` says
    which row of its client's own batch, as it would be padded alone, a row is.
    """

    p: float
    key: Tensor
    rows: Tensor | None = None

    @property
    def scale(self) -> float:
        """What kept elements are multiplied by; callers do it in an accumulator, so that no
        rounding is added.
        """
        return 1.0 / (1.0 - self.p) if self.p < 1.0 else 0.0


def philox(c0: Tensor, c1: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds on the counters `(c0, c1, 0, 0)`; int64 tensors that hold 32-bit words in and
    out, of any shapes that broadcast.

    The products wrap modulo 2**64, so their two halves are right although int64 is signed. A low
    half keeps what stands above its 32 bits until a mask comes by: it is only xor-ed until then.
    The words of the first rounds differ along rows or columns alone, and are no larger than that.
    """
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    c2 = c3 = torch.zeros((), dtype=torch.int64, device=key.device)
    for number in range(10):
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        if number < 3:
            c0, c2 = ((product_b >> 32) ^ c1 ^ k0) & _LOW, ((product_a >> 32) ^ c3 ^ k1) & _LOW
        else:  # whole by now: in place, which halves the memory that is gone through
            c0 = (product_b >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_LOW)
            c2 = (product_a >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_LOW)
        c1, c3 = product_b, product_a
        k0, k1 = (k0 + _KEY_A) & _LOW, (k1 + _KEY_B) & _LOW
    return c0, c1 & _LOW, c2, c3 & _LOW


def keep_mask(rows: range, columns: int, dropout: Dropout) -> Tensor:
    """Boolean `[len(rows), columns]`: True where the element is kept."""
    device, key = dropout.key.device, dropout.key
    if dropout.rows is None:
        row = torch.arange(rows.start, rows.stop, device=device).unsqueeze(1)
    else:  # every row has its own key, and its place in its client's batch
        row, key = dropout.rows[rows.start : rows.stop, None], key[rows.start : rows.stop, None]
    # One Philox block decides four neighbouring columns; the last one may decide too many.
    block = torch.arange((columns + 3) // 4, device=device).unsqueeze(0)
    least = round(dropout.p * 2**32)
    kept = torch.stack([word >= least for word in philox(block, row, key)], dim=-1)
    return kept.flatten(1)[:, :columns]
