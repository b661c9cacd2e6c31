"""What a call was given, looked at before anything is computed: shapes, dtypes, devices, and which
factors train. An error says what was given, what was expected and how to mend it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rolora_kernels.dropout import Dropout
from rolora_kernels.rows import AdapterRows
from rolora_kernels.transfer import to_device
from rolora_kernels.weights import FrozenWeight

PHASES = ("A", "B", "BOTH")


def clients_of(lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor]) -> int:
    """The clients of a call whose factors have the client axis; 0 without one."""
    return next((factor.shape[0] for factor in (*lora_As, *lora_Bs) if factor.ndim == 3), 0)


def narrowed(
    lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], trainable: str | None
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The factors, detached where `trainable` leaves them out."""
    if trainable is None:
        return lora_As, lora_Bs
    if trainable not in PHASES:
        raise ValueError(f"trainable must be one of {', '.join(PHASES)} or None, got {trainable!r}")
    for name, factors in (("A", lora_As), ("B", lora_Bs)):
        if trainable in (name, "BOTH") and not all(factor.requires_grad for factor in factors):
            raise ValueError(
                f"trainable={trainable!r} names lora_{name}, which does not require grad"
            )
    if trainable == "B":
        lora_As = [A.detach() for A in lora_As]
    elif trainable == "A":
        lora_Bs = [B.detach() for B in lora_Bs]
    return lora_As, lora_Bs


def check(
    x: Tensor,
    weights: Sequence[Tensor | FrozenWeight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    rows: AdapterRows | None = None,
) -> None:
    """Raises ValueError where the operands of a group do not fit together."""
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    clients = clients_of(lora_As, lora_Bs)
    if clients:
        _check_clients(clients, x, lora_As, lora_Bs, rows)
    elif rows is not None:
        raise ValueError(
            f"rows speaks of {len(rows.counts)} adapters, but no factor has an axis of them: "
            f"expected lora_A [{len(rows.counts)}, r, in] or lora_B [{len(rows.counts)}, out, r]"
        )
    for W, A, B, bias in zip(weights, lora_As, lora_Bs, biases, strict=True):
        _check_shapes(x, W, A, B, bias)
        if (isinstance(W, Tensor) and W.requires_grad) or (bias is not None and bias.requires_grad):
            raise ValueError(
                "weight and bias are frozen here but one of them requires grad: call "
                "requires_grad_(False) on it"
            )
        devices = {t.device for t in (x, W, A, B, bias) if t is not None}
        if len(devices) > 1:
            raise ValueError(f"tensors are on different devices: {sorted(map(str, devices))}")


def _check_shapes(x: Tensor, W, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
    fits = (
        x.ndim >= 1
        and len(W.shape) == 2 <= min(A.ndim, B.ndim)
        and max(A.ndim, B.ndim) <= 3
        and A.shape[-2] == B.shape[-1] >= 1
        and tuple(W.shape) == (B.shape[-2], A.shape[-1])
        and x.shape[-1] == A.shape[-1]
        and (bias is None or tuple(bias.shape) == (B.shape[-2],))
    )
    if fits:
        return
    named = {"x": x, "weight": W, "lora_A": A, "lora_B": B, "bias": bias}
    given = ", ".join(f"{name} {list(t.shape)}" for name, t in named.items() if t is not None)
    raise ValueError(
        f"shapes do not fit: {given}; expected x [..., in], weight [out, in], lora_A [r, in], "
        "lora_B [out, r], bias [out]"
    )


def _check_clients(
    clients: int,
    x: Tensor,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    rows: AdapterRows | None,
) -> None:
    M = x.numel() // x.shape[-1] if x.ndim else 0
    if rows is None and M % clients:
        raise ValueError(
            f"x {list(x.shape)} has {M} rows, which {clients} clients cannot share evenly"
        )
    if rows is not None:
        if len(rows.counts) != clients:
            raise ValueError(
                f"rows speaks of {len(rows.counts)} adapters, the factors are those of {clients}"
            )
        rows.each(M)
    for name, factors in (("lora_A", lora_As), ("lora_B", lora_Bs)):
        kinds = {tuple(f.shape[:-2]) for f in factors}
        if not (kinds == {()} or kinds == {(clients,)}):
            raise ValueError(
                f"the {name} of a group must all be common to the clients or all have {clients} of "
                f"them, got shapes {[list(f.shape) for f in factors]}"
            )
        if kinds == {()} and any(f.requires_grad for f in factors):
            raise ValueError(
                f"{name} {list(factors[0].shape)} trains, so {clients} clients need one each: "
                f"[{clients}, …]"
            )


def check_dtype(x: Tensor, weights: Sequence[Tensor | FrozenWeight]) -> None:
    """Raises ValueError where a weight cannot be multiplied with x as it is."""
    for W in weights:
        if W.dtype is not None and W.dtype != x.dtype:
            raise ValueError(
                f"x is {x.dtype} but weight is {W.dtype}: cast one of them, or use torch.autocast"
            )


def by_row(dropout: Dropout | None, rows: AdapterRows, M: int) -> Dropout | None:
    """A key and a place for each of M rows, sorted by adapter: what a row drops does not depend on
    where sorting puts it.
    """
    if dropout is None:
        return None
    key, places = dropout.key, dropout.rows
    if places is None:
        places = torch.arange(M, device=key.device)
    return Dropout(dropout.p, rows.sort(key.expand(M)), rows.sort(places))


def dropout_of(p: float, key: Tensor | int | None, device: torch.device) -> Dropout | None:
    """The dropout of a call, None at p = 0."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], got {p}")
    if p == 0.0:
        return None
    if key is None:
        raise ValueError(
            "dropout_p > 0 needs dropout_key: the 64-bit key that backward makes the same mask from"
        )
    if not isinstance(key, Tensor):
        key = to_device(torch.tensor(key, dtype=torch.int64), device)
    return Dropout(p, key) if key.ndim == 0 else Dropout(p, *key)


def stacked(factors: Sequence[Tensor], dtype: torch.dtype, ops) -> Tensor:
    """[A_1; …; A_G] as one [R, K] matrix, as the backend takes factors."""
    return ops.factor(factors[0] if len(factors) == 1 else torch.cat(list(factors), dim=-2), dtype)


def split(columns: Tensor, lora_As: Sequence[Tensor]) -> Sequence[Tensor]:
    """The column blocks of an [M, R] tensor that belong to each linear; views."""
    return [columns] if len(lora_As) == 1 else columns.split([A.shape[-2] for A in lora_As], dim=1)
