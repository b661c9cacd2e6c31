"""Many adapters in one step on one base, outside any federation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rolora_kernels.linear import grouped_lora_linear
from rolora_kernels.rows import AdapterRows
from rolora_kernels.uncompiled import uncompiled
from rolora_kernels.weights import FrozenWeight


@uncompiled
def multi_lora_linear(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float],
    bias: Tensor | None = None,
    *,
    rows: AdapterRows,
    trainable: str | None = None,
    dropout_p: float = 0.0,
    dropout_key: Tensor | int | None = None,
) -> Tensor:
    """`lora_linear` in which every row has the adapter that `rows` names, or none:
    `y_i = W x_i + bias + scaling_c · B_c A_c drop(x_i)` for a row i of adapter c.

    The frozen product, and what a factor common to all adapters computes, runs once over all the
    rows.

    Args:
        x: `[..., in]`, in any order of rows; weight, bias, dropout_p: as in `lora_linear`.
        lora_A: `[C, r, in]`, or C tensors `[r_c, in]` of ranks that may differ, or one `[r, in]`
            that all adapters have in common and none trains; lora_B: `[C, out, r]`, C tensors
            `[out, r_c]`, or one `[out, r]`. `requires_grad` says what trains.
        scaling: `alpha / r`, one for all or one an adapter.
        rows: AdapterRows.by_index(…) or .by_counts(…), made once a step for all layers.
        trainable: "A", "B" or "BOTH" narrows what `requires_grad` says for this call.
        dropout_key: one key, with which a row drops what its place in x says; or int64 `[2, rows]`
            in x's order of rows: every row's key, and its place in its adapter's own batch.

    Returns: `[..., out]` in x's order of rows. An adapter that has no row in the step gets a
    gradient of exact zeros.

    Raises:
        ValueError: as `lora_linear` does, and where rows and factors do not speak of the same
        adapters.

    Source: the client axis of RoLoRA's cohorts; serving engines call it multi-LoRA (Punica's SGMV,
    Chen et al. 2023).
    """
    adapters = len(rows.counts)
    A, B = _stacked("lora_A", lora_A, adapters, -2), _stacked("lora_B", lora_B, adapters, -1)
    own: float | tuple[float, ...]
    own = float(scaling) if isinstance(scaling, int | float) else tuple(map(float, scaling))
    if isinstance(own, tuple) and len(own) != adapters:
        raise ValueError(f"{len(own)} scalings for {adapters} adapters: give one, or one each")
    if isinstance(own, tuple) and len(set(own)) == 1:
        own = own[0]
    return grouped_lora_linear(
        x,
        [weight],
        [A],
        [B],
        [own],
        [bias],
        trainable=trainable,
        dropout_p=dropout_p,
        dropout_key=dropout_key,
        rows=rows,
    )[0]


def _stacked(
    name: str, factors: Tensor | Sequence[Tensor], adapters: int, rank_axis: int
) -> Tensor:
    """The factors of all adapters as one tensor, ranks padded by zeros to the largest."""
    if isinstance(factors, Tensor):
        return factors
    if len(factors) != adapters or any(factor.ndim != 2 for factor in factors):
        raise ValueError(
            f"{name} has {len(factors)} factors of shapes {[list(f.shape) for f in factors]} for "
            f"{adapters} adapters: give one matrix each, or one tensor [{adapters}, …]"
        )
    rank = max(factor.shape[rank_axis] for factor in factors)
    before = [0, 0] * (-1 - rank_axis)  # pad names the last axis first
    return torch.stack(
        [F.pad(factor, [*before, 0, rank - factor.shape[rank_axis]]) for factor in factors]
    )
