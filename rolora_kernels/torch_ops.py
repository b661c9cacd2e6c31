"""The five primitives on vendor libraries (cuBLAS, oneDNN, MKL) through PyTorch: any device, any
dtype, always legal.

Shapes: x [M, K], W [N, K] of any strides, A [r, K], B [N, r], S and T [M, r], y and dy [M, N]. r
may be the sum of the ranks of several linears that share x. A factor with a third, leading axis is
one matrix a client, and the rows are grouped by client (torch_clients). Every scaling happens in
the accumulator (`alpha` of addmm), never on a rounded operand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolora_kernels import dropping, gemm, torch_clients
from rolora_kernels.dropout import Dropout

# A [r, K], B [N, r] and what B A is multiplied by
LowRank = tuple[Tensor, Tensor, float]

_CHUNK_BYTES = 8 << 20  # fp32 copies of 16-bit rows are made this much at a time


def rank_buffer(like: Tensor, rank: int) -> Tensor:
    """An empty [M, rank] for S or T.

    On a CPU its columns are contiguous: oneDNN and MKL run the skinny GEMMs up to twice as fast
    that way round, and the linears of a group get contiguous parts.
    """
    if like.device.type == "cpu":
        return like.new_empty(rank, like.shape[0]).t()
    return like.new_empty(like.shape[0], rank)


def factor(A: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor as these functions take it: rounded to the compute dtype."""
    return A if A.dtype == dtype else A.to(dtype)  # a call that does nothing takes a microsecond


def shrink(x: Tensor, A: Tensor, dropout: Dropout | None = None) -> Tensor:
    """S = drop(x) Aᵀ in x's dtype."""
    if A.ndim == 3:
        return torch_clients.shrink(x, A, dropout)
    if dropout is None:
        return skinny(x, A)
    return skinny(dropping.zero_dropped(x, dropout), A, dropout.scale)


def expand_base(
    x: Tensor, W: Tensor, S: Tensor, B: Tensor, scaling: float, bias: Tensor | None
) -> Tensor:
    """y = x Wᵀ + bias + scaling · S Bᵀ: the vendor GEMM, then one read-modify-write of y."""
    y = gemm.abt(x, W, bias)
    if B.ndim == 3:
        return torch_clients.add_expanded(y, S, B, scaling)
    return y.addmm_(S, B.t(), alpha=scaling)


def grads_of_dy(
    dy: Tensor,
    B: Tensor | None,
    S: Tensor | None,
    scaling: float,
    T: Tensor | None = None,
    clients: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """T = scaling · dy B (in dy's dtype, into `T` where given) and dB = scaling · dyᵀ S (fp32 [N,
    r], or [clients, N, r]).

    `B is None` skips T, `S is None` skips dB.
    """
    if B is not None and B.ndim == 3:
        T = torch_clients.times_B(dy, B, scaling, T)
    elif B is not None:
        T = skinny(dy, B.t(), scaling, T)
    if S is None:
        return T, None
    if clients:
        dB = torch_clients.accumulate(S, dy, scaling, clients, accumulate)
        dB = dB.transpose(1, 2).contiguous()
    else:
        dB = accumulate(S, dy, scaling).t().contiguous()
    return (T if B is not None else None), dB


def base_dx(
    dys: list[Tensor],
    weights: list[Tensor],
    T: Tensor | None,
    A: Tensor | None,
    dropout: Dropout | None = None,
) -> Tensor:
    """dx = Σ_g dy_g W_g + drop(T A), accumulated in place over the linears of a group."""
    dx = gemm.ab(dys[0], weights[0])
    for dy, W in zip(dys[1:], weights[1:], strict=True):
        dx = gemm.abt(dy, W.t(), plus=dx)
    if T is None or A is None:
        return dx
    if A.ndim == 3:
        return torch_clients.add_TA(dx, T, A, dropout)
    if dropout is None:
        return dx.addmm_(T, A)
    return dropping.add_dropped(dx, T @ A, dropout)


def grad_A(T: Tensor, x: Tensor, dropout: Dropout | None = None, clients: int = 0) -> Tensor:
    """dA = Tᵀ drop(x), fp32 [r, K], or [clients, r, K]."""
    scale = 1.0
    if dropout is not None:
        x, scale = dropping.zero_dropped(x, dropout), dropout.scale
    if clients:
        return torch_clients.accumulate(T, x, scale, clients, accumulate)
    return accumulate(T, x, scale)


def skinny(wide: Tensor, ranks: Tensor, scaling: float = 1.0, out: Tensor | None = None) -> Tensor:
    """scaling · wide ranksᵀ, the scaling in the accumulator; [M, K] by [r, K], into `out` (a
    `rank_buffer`) where given.
    """
    if gemm.by_onednn(ranks, wide):
        out = rank_buffer(wide, ranks.shape[0]) if out is None else out
        return torch.mul(gemm.abt(ranks, wide).t(), scaling, out=out)
    if not wide.is_cpu:
        out = rank_buffer(wide, ranks.shape[0]) if out is None else out
        return out.addmm_(wide, ranks.t(), beta=0, alpha=scaling)
    if out is None and scaling == 1.0:
        return torch.mm(ranks, wide.t()).t()
    turned = wide.new_empty(ranks.shape[0], wide.shape[0]) if out is None else out.t()
    turned.addmm_(ranks, wide.t(), beta=0, alpha=scaling)
    return turned.t() if out is None else out


def accumulate(narrow: Tensor, wide: Tensor, scaling: float) -> Tensor:
    """scaling · narrowᵀ wide as fp32 [r, wide columns], from an fp32 accumulator (fp64 stays
    fp64).
    """
    if wide.dtype in (torch.float32, torch.float64):
        return gemm.ab(narrow.t(), wide).mul_(scaling)
    if wide.is_cuda:
        return torch.mm(narrow.t(), wide, out_dtype=torch.float32).mul_(scaling)
    if wide.dtype == torch.bfloat16:
        # oneDNN has no bf16 GEMM with an fp32 result. A second one computes, in its accumulator,
        # what the first one's rounding lost, so the two words together carry fp32 (2e-6, measured)
        # at a third of the cost of raising `wide`.
        high = torch.mm(narrow.t(), wide)
        low = high.clone().addmm_(narrow.t(), wide, beta=-1)
        return high.float().add_(low).mul_(scaling)
    # fp16 GEMMs are slow on CPUs: raise a few rows at a time, or all where a trace would unroll it
    out = torch.zeros(narrow.shape[1], wide.shape[1], dtype=torch.float32, device=wide.device)
    step = wide.shape[0] if torch.compiler.is_compiling() else _CHUNK_BYTES // (4 * wide.shape[1])
    step = max(1, step)
    for start in range(0, wide.shape[0], step):
        rows = slice(start, start + step)
        out.addmm_(narrow[rows].float().t(), wide[rows].float(), alpha=scaling)
    return out


def dequantise_nf4(
    packed: Tensor,
    code: Tensor,
    absmax: Tensor,
    block: int,
    double: tuple[Tensor, Tensor, int, Tensor] | None,
    out: Tensor,
    plus: LowRank | None = None,
) -> Tensor:
    """Fills the contiguous `out` of n elements from 4-bit codes, as triton_ops.dequantise_nf4
    states, with scaling · B A added before the one rounding where `plus` is given; rows of blocks
    at a time, so that nothing fp32 of the size of the weight exists.
    """
    if double is not None:
        code2, absmax2, block2, offset = double
        coarse = absmax2.repeat_interleave(block2)[: absmax.numel()]
        absmax = code2[absmax.int()].mul_(coarse).add_(offset)
    # [256, 2]: both elements of every byte
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], 1)
    flat, chunk = out.view(-1), max(block, (1 << 20) // block * block)
    for start in range(0, flat.numel(), chunk):
        part = flat[start : start + chunk]
        end = start + part.numel()
        values = pairs[packed[start // 2 : (start + chunk) // 2].int()].view(-1)[: part.numel()]
        scales = absmax[start // block : -(-end // block)]
        whole = part.numel() // block * block  # the last block of a matrix may be short
        values[:whole].view(-1, block).mul_(scales[: whole // block, None])
        values[whole:].mul_(scales[-1])
        if plus is not None:
            values.add_(_elements(plus, start, part.numel()))
        part.copy_(values)
    return out


def _elements(low_rank: LowRank, start: int, count: int) -> Tensor:
    """fp32 elements start … start + count − 1 of scaling · B A, read row by row."""
    A, B, scaling = low_rank
    columns = A.shape[1]
    first, last = start // columns, -(-(start + count) // columns)
    rows = (B[first:last].float() @ A.float()).mul_(scaling)
    return rows.view(-1)[start - first * columns :][:count]
