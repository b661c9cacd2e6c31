"""The client axis of the primitives on vendor libraries: factors of one matrix a client, rows
grouped by client.

    x [C·m, K], A [C, R, K], B [C, N, r]: rows c·m … (c + 1)·m − 1 belong to client c and meet
    A[c], B[c] only

The frozen matmul runs once over all the rows, and so does every factor that the clients have in
common (torch_ops): what is here is the half of the LoRA path that differs between them, as batched
matmuls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolora_kernels import dropping
from rolora_kernels.dropout import Dropout


def by_client(rows: Tensor, clients: int) -> Tensor:
    """`[C·m, n]` as `[C, m, n]`; a view."""
    return rows.unflatten(0, (clients, -1))


def shrink(x: Tensor, A: Tensor, dropout: Dropout | None) -> Tensor:
    """S = drop(x) Aᵀ, `[C·m, R]`."""
    scale = 1.0
    if dropout is not None:
        x, scale = dropping.zero_dropped(x, dropout), dropout.scale
    return _batched(by_client(x, len(A)), A.transpose(1, 2), scale).flatten(0, 1)


def add_expanded(y: Tensor, S: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y += scaling · S Bᵀ in place."""
    by_client(y, len(B)).baddbmm_(by_client(S, len(B)), B.transpose(1, 2), alpha=scaling)
    return y


def times_B(dy: Tensor, B: Tensor, scaling: float, T: Tensor | None) -> Tensor:
    """T = scaling · dy B, `[C·m, r]`, into `T` where given."""
    made = _batched(by_client(dy, len(B)), B, scaling).flatten(0, 1)
    return made if T is None else T.copy_(made)


def accumulate(narrow: Tensor, wide: Tensor, scaling: float, clients: int, each) -> Tensor:
    """scaling · narrow[c]ᵀ wide[c], fp32 `[C, r, n]`; `each` computes one client where there is no
    batched product with an fp32 result.
    """
    narrow, wide = by_client(narrow, clients), by_client(wide, clients)
    if wide.dtype in (torch.float32, torch.float64):
        return torch.bmm(narrow.transpose(1, 2), wide).mul_(scaling)
    if wide.is_cuda:
        return torch.bmm(narrow.transpose(1, 2), wide, out_dtype=torch.float32).mul_(scaling)
    return torch.stack([each(n, w, scaling) for n, w in zip(narrow, wide, strict=True)])


def add_TA(dx: Tensor, T: Tensor, A: Tensor, dropout: Dropout | None) -> Tensor:
    """dx += drop(T A) in place."""
    if dropout is None:
        by_client(dx, len(A)).baddbmm_(by_client(T, len(A)), A)
        return dx
    TA = _batched(by_client(T, len(A)), A, 1.0).flatten(0, 1)
    return dropping.add_dropped(dx, TA, dropout)


def _batched(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling · a b for every client, the scaling in the accumulator."""
    if scaling == 1.0:
        return torch.bmm(a, b)
    unread = a.new_empty(()).expand(len(a), a.shape[1], b.shape[2])  # beta is 0
    return torch.baddbmm(unread, a, b, beta=0, alpha=scaling)
