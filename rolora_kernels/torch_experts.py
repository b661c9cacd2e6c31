"""The primitives for a mixture of experts: one frozen weight an expert.

    x [M, K] sorted by expert, W [E, N, K], bias [E, N], A [E, r, K], B [E, N, r]; with C clients a
    factor of their own is [C, E, …], and the rows of an expert lie client by client

`Experts` is torch_ragged with a frozen product an expert, `GroupedExperts` makes one `grouped_mm`
of all that has no fp32 result, `LoopedExperts` calls the primitives of a plan for one expert after
another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rolora_kernels import gemm
from rolora_kernels.dropout import Dropout
from rolora_kernels.expert_rows import ExpertRows
from rolora_kernels.primitives import Backend
from rolora_kernels.torch_ragged import Ragged, Scaling, zeros


class Experts(Ragged):
    """A `primitives.Backend` on vendor libraries, an expert at a time."""

    def __init__(self, rows: ExpertRows):
        super().__init__(rows.parts, rows.lead)
        self.rows = rows

    def _runs(
        self, factor: Tensor, scaling: Scaling = 1.0
    ) -> Iterator[tuple[slice, Tensor, float]]:
        """(rows, their factor, the scaling); a factor that clients have in common meets all rows of
        its expert at once.
        """
        if factor.ndim == 2 + len(self.lead):
            yield from super()._runs(factor, scaling)
            return
        for expert, rows in self.rows.spans:
            yield rows, factor[expert], self._own(scaling, (expert,))

    def _base(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(len(x), W.shape[1])
        for expert, rows in self.rows.spans:
            y[rows] = gemm.abt(x[rows], W[expert], None if bias is None else bias[expert])
        return y

    def _base_dx(self, dys: list[Tensor], weights: list[Tensor]) -> Tensor:
        return self._base(dys[0], weights[0].transpose(1, 2), None)


class GroupedExperts(Experts):
    """On a GPU: PyTorch's grouped matmul, for bf16 and sizes in eights. The factors' gradients, for
    which it has no fp32 result, are a product an expert.
    """

    @staticmethod
    def takes(x: Tensor, W: Tensor, rank: int) -> bool:
        """Whether `grouped_mm` takes these: it addresses rows in steps of 16 bytes."""
        if not x.is_cuda or x.dtype != torch.bfloat16:
            return False
        if torch.cuda.get_device_capability(x.device) < (8, 0):
            return False
        return not any(size % 8 for size in (*W.shape[1:], rank))

    def _product(self, rows: Tensor, factor: Tensor) -> Tensor:
        """rows_g F_g of every group g: `[M, n]` and `[…, n, m]` → `[M, m]`."""
        ends = [own.stop for own in self._every(factor)]
        if factor.ndim == 4:
            factor = factor.transpose(0, 1).flatten(0, 1)
        offsets = torch.tensor(ends, dtype=torch.int32, device=rows.device)
        return torch.nn.functional.grouped_mm(rows.contiguous(), factor, offs=offsets)

    def _every(self, factor: Tensor) -> Iterator[slice]:
        """The rows of every matrix of a factor, of none too, expert by expert."""
        each = self.rows.clients if factor.ndim == 3 else 1
        counts, end = self.rows.pairs.counts, 0
        for first in range(0, len(counts), each):
            start, end = end, end + sum(counts[first : first + each])
            yield slice(start, end)

    def _base(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        y = self._product(x, W.transpose(1, 2))
        if bias is not None:
            for expert, rows in self.rows.spans:
                y[rows] += bias[expert]
        return y

    def shrink(self, x: Tensor, A: Tensor, dropout: Dropout | None) -> Tensor:
        return self._product(x, A.transpose(-2, -1))

    def expand_base(
        self, x: Tensor, W: Tensor, S: Tensor, B: Tensor, scaling: Scaling, bias: Tensor | None
    ) -> Tensor:
        y = self._base(x, W, bias)
        return y.add_(self._product(S, B.transpose(-2, -1)), alpha=self._own(scaling, (0,)))

    def grads_of_dy(
        self,
        dy: Tensor,
        B: Tensor | None,
        S: Tensor | None,
        scaling: Scaling,
        T: Tensor | None = None,
        clients: int = 0,
    ) -> tuple[Tensor | None, Tensor | None]:
        if B is not None:
            made = self._product(dy, B).mul_(self._own(scaling, (0,)))
            T = made if T is None else T.copy_(made)
        return T, super().grads_of_dy(dy, None, S, scaling)[1]

    def base_dx(
        self,
        dys: list[Tensor],
        weights: list[Tensor],
        T: Tensor,
        A: Tensor,
        dropout: Dropout | None,
    ) -> Tensor:
        return self._base_dx(dys, weights).add_(self._product(T, A))


class LoopedExperts:
    """The primitives `ops` of one linear, an expert after another, without clients."""

    def __init__(self, rows: ExpertRows, ops: Backend):
        self.rows, self.ops, self.factor = rows, ops, ops.factor

    def _joined(self, like: Tensor, width: int, each: Callable[[int, slice], Tensor]) -> Tensor:
        """`[M, width]` of what `each` makes of an expert's rows."""
        made = like.new_empty(len(like), width)
        for expert, rows in self.rows.spans:
            made[rows] = each(expert, rows)
        return made

    def rank_buffer(self, like: Tensor, rank: int) -> Tensor:
        return like.new_empty(len(like), rank)

    def shrink(self, x: Tensor, A: Tensor, dropout: Dropout | None) -> Tensor:
        return self._joined(x, A.shape[1], lambda e, own: self.ops.shrink(x[own], A[e], None))

    def expand_base(
        self, x: Tensor, W: Tensor, S: Tensor, B: Tensor, scaling: float, bias: Tensor | None
    ) -> Tensor:
        def one(expert: int, own: slice) -> Tensor:
            b = None if bias is None else bias[expert]
            return self.ops.expand_base(x[own], W[expert], S[own], B[expert], scaling, b)

        return self._joined(x, W.shape[1], one)

    def grads_of_dy(
        self,
        dy: Tensor,
        B: Tensor | None,
        S: Tensor | None,
        scaling: float,
        T: Tensor | None,
        clients: int = 0,
    ) -> tuple[Tensor | None, Tensor | None]:
        dB = None if S is None else zeros(dy, self.rows.experts, dy.shape[1], S.shape[1])
        for expert, own in self.rows.spans:
            part = None if S is None else S[own]
            into = None if B is None or T is None else T[own]
            whole = None if B is None else B[expert]
            _, made = self.ops.grads_of_dy(dy[own], whole, part, scaling, into)
            if dB is not None and made is not None:
                dB[expert] = made
        return T, dB

    def base_dx(
        self,
        dys: list[Tensor],
        weights: list[Tensor],
        T: Tensor,
        A: Tensor,
        dropout: Dropout | None,
    ) -> Tensor:
        (dy,), (W,) = dys, weights

        def one(expert: int, own: slice) -> Tensor:
            return self.ops.base_dx([dy[own]], [W[expert]], T[own], A[expert], None)

        return self._joined(dy, W.shape[2], one)

    def grad_A(self, T: Tensor, x: Tensor, dropout: Dropout | None, clients: int = 0) -> Tensor:
        dA = zeros(x, self.rows.experts, T.shape[1], x.shape[1])
        for expert, own in self.rows.spans:
            dA[expert] = self.ops.grad_A(T[own], x[own], None)
        return dA
