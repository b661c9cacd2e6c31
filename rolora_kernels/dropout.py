"""Counter-based LoRA dropout: the mask is a function of a key and of the element's place, so
backward makes it again.

`keep[row, column]` is decided by Philox-4x32-7 (Salmon et al., SC 2011; seven rounds are the fewest
that pass every test of BigCrush) with the 64-bit key in `key` and the counter `(column // 8, row,
0, 0)`. Its four words are eight signed 16-bit lanes, the low half of a word first; an element is
dropped where lane `column % 8` is less than `p * 2**16 - 2**15`. So p is a multiple of 2**-16, and
a mask costs half the Philox blocks that a word an element would.

Nothing of size [M, K] outlives a call, but on a CPU the mask that backward needs again. Rows count
from the start of the client's own tokens, so a cohort trained together draws what each client would
draw alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

ROUNDS = 7
LANES = 8  # elements that a Philox block decides
_STEPS = 1 << 16  # values of a lane
_LOW = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


@dataclass(frozen=True)
class Dropout:
    """Probability of dropping `p`, and the key: int64 tensor `[]` on the device of x (all 64 bits
    count).

    For a cohort trained together the key is `[M]`, each row's client's, and `rows` int64 `[M]` says
    which row of its client's own batch, as it would be padded alone, a row is.

    made: None, or the masks that vendor libraries have made, a byte an element, for a backward that
    needs them twice.
    """

    p: float
    key: Tensor
    rows: Tensor | None = None
    made: dict[tuple[int, int, int], Tensor] | None = field(default=None, compare=False, repr=False)

    @property
    def dropped_lanes(self) -> int:
        """How many of a lane's 2**16 values drop an element: p in the mask's own steps. A p above
        zero is at least one of them.
        """
        nearest = round(self.p * _STEPS)
        return max(nearest, 1) if self.p > 0 else 0

    @property
    def last_dropped(self) -> int:
        """The greatest signed 16-bit lane that drops an element."""
        return self.dropped_lanes - 1 - _STEPS // 2

    @property
    def scale(self) -> float:
        """What kept elements are multiplied by, the inverse of the share that the mask keeps;
        callers do it in an accumulator, so that no rounding is added.
        """
        kept = _STEPS - self.dropped_lanes
        return _STEPS / kept if kept else 0.0


def philox(c0: Tensor, c1: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Seven rounds on the counters `(c0, c1, 0, 0)`; int64 tensors that hold 32-bit words in and
    out, of any shapes that broadcast.

    The products wrap modulo 2**64, so their two halves are right although int64 is signed. A low
    half keeps what stands above its 32 bits until a mask comes by: it is only xor-ed until then.
    The words of the first rounds differ along rows or columns alone, and are no larger than that.
    """
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    c2 = c3 = torch.zeros((), dtype=torch.int64, device=key.device)
    for number in range(ROUNDS):
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
    if dropout.dropped_lanes == 0:  # no lane is as low as would drop nothing
        return torch.ones(len(rows), columns, dtype=torch.bool, device=device)
    # One Philox block decides eight neighbouring columns; the last one may decide too many.
    block = torch.arange((columns + LANES - 1) // LANES, device=device).unsqueeze(0)
    lanes = torch.stack(philox(block, row, key), dim=-1).to(torch.int32).view(torch.int16)
    return (lanes > dropout.last_dropped).flatten(1)[:, :columns]
