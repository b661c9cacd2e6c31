"""The primitives on vendor libraries for adapters of different numbers of rows, and rows of none.

    x [M, K] sorted by adapter, A [C, R, K], B [C, N, r]: the rows of a segment meet the A and B of
    its adapter, the rows after the last segment none

The frozen matmul and what the adapters have in common run once over all the rows; the rest is a
product a segment, as torch_ops makes it. Where all adapters have as many rows, torch_clients makes
batched products of them instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rolora_kernels import dropping, gemm, torch_ops
from rolora_kernels.dropout import Dropout
from rolora_kernels.rows import AdapterRows

Scaling = float | tuple[float, ...]


class Ragged:
    """A `primitives.Backend` for segments `(where, rows)`: rows whose own matrix a factor has at
    `factor[where]`. `lead` are the axes before that matrix; with one, a scaling may be one an
    adapter.
    """

    rank_buffer = staticmethod(torch_ops.rank_buffer)
    factor = staticmethod(torch_ops.factor)

    def __init__(self, segments: Sequence[tuple[tuple[int, ...], slice]], lead: tuple[int, ...]):
        self.segments, self.lead = tuple(segments), lead

    @classmethod
    def of(cls, rows: AdapterRows, count: int) -> Ragged:
        """For `count` rows, sorted by adapter."""
        found = [((adapter,), own) for adapter, own in rows.segments(count)]
        return cls(found, (len(rows.counts),))

    def _runs(
        self, factor: Tensor, scaling: Scaling = 1.0
    ) -> Iterator[tuple[slice, Tensor, float]]:
        """(rows, their factor, their scaling): a segment each, or one for all where both are
        common.
        """
        if factor.ndim == 2 and not isinstance(scaling, tuple):
            if self.segments:
                yield slice(0, self.segments[-1][1].stop), factor, scaling
            return
        for where, rows in self.segments:
            own = factor[where] if factor.ndim > 2 else factor
            yield rows, own, self._own(scaling, where)

    @staticmethod
    def _own(scaling: Scaling, where: tuple[int, ...]) -> float:
        return scaling[where[0]] if isinstance(scaling, tuple) else scaling

    def _base(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        return gemm.abt(x, W, bias)

    def _base_dx(self, dys: list[Tensor], weights: list[Tensor]) -> Tensor:
        return torch_ops.base_dx(dys, weights, None, None)

    def shrink(self, x: Tensor, A: Tensor, dropout: Dropout | None) -> Tensor:
        """S = drop(x) Aᵀ; nothing is written for rows of no adapter."""
        S, (x, scale) = torch_ops.rank_buffer(x, A.shape[-2]), _dropped(x, dropout)
        for rows, own, _ in self._runs(A):
            torch_ops.skinny(x[rows], own, scale, S[rows])
        return S

    def expand_base(
        self, x: Tensor, W: Tensor, S: Tensor, B: Tensor, scaling: Scaling, bias: Tensor | None
    ) -> Tensor:
        """y = x Wᵀ + bias + scaling · S Bᵀ."""
        y = self._base(x, W, bias)
        for rows, own, scale in self._runs(B, scaling):
            y[rows].addmm_(S[rows], own.t(), alpha=scale)
        return y

    def grads_of_dy(
        self,
        dy: Tensor,
        B: Tensor | None,
        S: Tensor | None,
        scaling: Scaling,
        T: Tensor | None = None,
        clients: int = 0,
    ) -> tuple[Tensor | None, Tensor | None]:
        """T = scaling · dy B, and dB fp32 `[*lead, N, r]`, zero where there are no rows."""
        if B is not None:
            T = torch_ops.rank_buffer(dy, B.shape[-1]) if T is None else T
            for rows, own, scale in self._runs(B, scaling):
                torch_ops.skinny(dy[rows], own.t(), scale, T[rows])
        dB = None
        if S is not None:
            dB = zeros(dy, *self.lead, dy.shape[1], S.shape[1])
            for where, rows in self.segments:
                part = torch_ops.accumulate(S[rows], dy[rows], self._own(scaling, where))
                dB[where] = part.t()
        return (T if B is not None else None), dB

    def base_dx(
        self,
        dys: list[Tensor],
        weights: list[Tensor],
        T: Tensor,
        A: Tensor,
        dropout: Dropout | None,
    ) -> Tensor:
        """dx = Σ_g dy_g W_g + drop(T A)."""
        dx = self._base_dx(dys, weights)
        for rows, own, _ in self._runs(A):
            if dropout is None:
                dx[rows].addmm_(T[rows], own)
                continue
            TA, scale = _dropped(T[rows] @ own, _of_rows(dropout, rows))
            dx[rows] += TA.mul_(scale)
        return dx

    def grad_A(self, T: Tensor, x: Tensor, dropout: Dropout | None, clients: int = 0) -> Tensor:
        """dA fp32 `[*lead, R, K]`, zero where there are no rows."""
        dA, (x, scale) = zeros(x, *self.lead, T.shape[1], x.shape[1]), _dropped(x, dropout)
        for where, rows in self.segments:
            dA[where] = torch_ops.accumulate(T[rows], x[rows], scale)
        return dA


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros in the type that sums over rows are made in."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.zeros(*shape, dtype=dtype, device=like.device)


def _dropped(x: Tensor, dropout: Dropout | None) -> tuple[Tensor, float]:
    """x without what is dropped, and what the rest is still to be multiplied by."""
    if dropout is None:
        return x, 1.0
    return dropping.zero_dropped(x, dropout), dropout.scale


def _of_rows(dropout: Dropout, rows: slice) -> Dropout:
    """The dropout of some of the rows; every row has its own key here."""
    assert dropout.rows is not None
    return Dropout(dropout.p, dropout.key[rows], dropout.rows[rows])
