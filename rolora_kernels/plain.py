"""The autograd rule on vendor libraries, with nothing between the products.

It is linear's rule bit for bit: the same products, by the same library, on operands that lie the
same way. Most calls of most models are plain, and where the products are done in microseconds it is
the host that takes the time: PlainLinear is the rule for one linear, PlainGroup for some that share
an input. Not plain are factors of clients, a weight that is dequantised, dropout, autocast, our
kernels, and products that gemm gives to oneDNN by its name.

Shapes: x [..., K], W_g [N_g, K], A_g [r_g, K], B_g [N_g, r_g], b_g [N_g] or None; S and T are kept
the other way round, [r, M].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rolora_kernels import torch_ops
from rolora_kernels.once import once
from rolora_kernels.torch_ops import factor
from rolora_kernels.weights import no_autocast

# a bᵀ + bias in one call: the transposed view is made in C++
_abt = torch._C._nn.linear
# Another shape that is no view, which autograd would not let a caller change in place.
_shaped = torch.ops.aten._unsafe_view.default
# What addmm is given where beta is 0.
_UNREAD = {
    dtype: torch.zeros((), dtype=dtype)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
# Scalings that lose no bit, wherever in a product they are applied.
_EXACT = frozenset(2.0**power for power in range(-16, 17))


class PlainLinear(torch.autograd.Function):
    """x, W, A, B, bias, the scaling, and the Kind of the call (settled)."""

    @staticmethod
    def forward(ctx, x, W, A, B, bias, scaling, kind):
        dtype, need = kind.dtype, ctx.needs_input_grad
        need_x, need_A = need[0], need[2]
        flat = _rows(x)
        S = _turned(flat, factor(A, dtype), 1.0)
        y = _expanded(flat, W, S, B, scaling, bias)
        ctx.save_for_backward(
            _where(need_A, flat),
            _where(need[3], S),
            _where(need_x, W),
            _where(need_x, A),
            _where(need_x or need_A, B),
        )
        ctx.kind, ctx.scaling = kind, scaling
        return _as(y, x)

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled() or torch.is_autocast_enabled(dy.device.type):
            return _guarded(_gradients, ctx, dy)
        return _gradients(ctx, dy)


class PlainGroup(torch.autograd.Function):
    """x, the Kind, G scalings, and of each linear the weight; A; B; the bias."""

    @staticmethod
    def forward(ctx, x, kind, scalings, *group):
        G, dtype, need = len(scalings), kind.dtype, ctx.needs_input_grad
        weights, As, Bs, biases = (group[g : g + G] for g in range(0, 4 * G, G))
        need_x, need_A = need[0], any(need[3 + G : 3 + 2 * G])
        flat = _rows(x)
        A = torch.cat(As)
        S = _turned(flat, factor(A, dtype), 1.0)
        outputs = []
        for W, S_g, B, s, b in zip(weights, S.split(kind.ranks), Bs, scalings, biases, strict=True):
            outputs.append(_as(_expanded(flat, W, S_g, B, s, b), x))
        ctx.save_for_backward(
            _where(need_A, flat),
            _where(any(need[3 + 2 * G : 3 + 3 * G]), S),
            *[_where(need_x, W) for W in weights],
            *[_where(need_x, A) for A in As],
            *[_where(need_x or need_A, B) for B in Bs],
        )
        ctx.kind, ctx.scalings = kind, scalings
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *dys):
        kind = ctx.kind
        if torch.is_grad_enabled() or torch.is_autocast_enabled(kind.device.type):
            return _guarded(_gradients_of_group, ctx, *dys)
        return _gradients_of_group(ctx, *dys)


def _guarded(gradients: Any, ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
    """The gradients, where a gradient of them is asked for or autocast is on."""

    @once
    def backward(ctx, *dys):
        with no_autocast(next(dy for dy in dys if dy is not None)):
            return gradients(ctx, *dys)

    return backward(ctx, *dys)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """What the arguments of `PlainLinear` have for gradients, None where nobody asked."""
    kind, scaling = ctx.kind, ctx.scaling
    dtype = kind.dtype
    x, S, W, A, B = ctx.saved_tensors
    dx = dA = dB = None
    T: Any = None  # made where anything needs it
    dy = _rows(dy)
    if B is not None:
        T = _turned(dy, factor(B, dtype).t(), scaling)
    if S is not None:
        dB = _sum(S, dy, scaling, kind.wide).t().contiguous()
    if W is not None:
        dx = torch.mm(dy, W)
        dx.addmm_(T.t(), factor(A, dtype))
        if not kind.flat:
            dx = _shaped(dx, kind.x_shape)
    if x is not None:
        dA = _sum(T, x, 1.0, kind.wide)
    return dx, None, dA, dB, None, None, None


def _gradients_of_group(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
    """What the arguments of `PlainGroup` have for gradients."""
    kind, scalings, need = ctx.kind, ctx.scalings, ctx.needs_input_grad
    G, dtype = len(scalings), kind.dtype
    x, S, *rest = ctx.saved_tensors
    weights, As, Bs = rest[:G], rest[G : 2 * G], rest[2 * G :]
    first = next((dy for dy in dys if dy is not None), None)
    if first is None:
        return (None,) * (3 + 4 * G)
    dx: Tensor | None = None
    T: Any = None  # made where anything needs it
    dAs: list[Tensor | None] = [None] * G
    dBs: list[Tensor | None] = [None] * G
    T_parts: Sequence[Any] = ()
    S_parts: Sequence[Any] = () if S is None else S.split(kind.ranks)
    if Bs[0] is not None:
        T = torch_ops.rank_buffer(_rows(first), sum(kind.ranks)).t()
        T_parts = T.split(kind.ranks)
    for g, dy in enumerate(dys):
        if dy is None:
            if T is not None:
                T_parts[g].zero_()
            continue
        dy = _rows(dy)
        B, W = Bs[g], weights[g]
        if B is not None:
            _fill(T_parts[g], dy, factor(B, dtype).t(), scalings[g])
        if need[3 + 2 * G + g]:
            dBs[g] = _sum(S_parts[g], dy, scalings[g], kind.wide).t().contiguous()
        if W is not None:
            dx = torch.mm(dy, W) if dx is None else dx.addmm_(dy, W)
    if dx is not None:
        A = torch.cat(As)
        dx.addmm_(T.t(), factor(A, dtype))
        if not kind.flat:
            dx = _shaped(dx, kind.x_shape)
    if x is not None:
        found = _sum(T, x, 1.0, kind.wide).split(kind.ranks)
        dAs = [_where(need[3 + G + g], part) for g, part in enumerate(found)]
    return (dx, None, None, *[None] * G, *dAs, *dBs, *[None] * G)


def _where(wanted: bool, tensor: Tensor) -> Tensor | None:
    return tensor if wanted else None


def _rows(x: Tensor) -> Tensor:
    """x `[..., n]` as `[M, n]`."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _as(y: Tensor, x: Tensor) -> Tensor:
    """y `[M, n]` with the leading axes of x, `[..., n]`."""
    return y if x.ndim == 2 else _shaped(y, (*x.shape[:-1], y.shape[1]))


def _expanded(
    flat: Tensor, W: Tensor, S: Tensor, B: Tensor, scaling: float, bias: Tensor | None
) -> Tensor:
    """`torch_ops.expand_base`, from S [r, M]."""
    dtype = flat.dtype
    if bias is not None:
        bias = factor(bias, dtype)
    y = _abt(flat, W, bias)
    return y.addmm_(S.t(), factor(B, dtype).t(), alpha=scaling)


def _turned(wide: Tensor, ranks: Tensor, scaling: float) -> Tensor:
    """`torch_ops.skinny` the other way round, `[r, M]`: scaling · ranks wideᵀ."""
    if not wide.is_cpu:
        return torch_ops.skinny(wide, ranks, scaling).t()
    if scaling == 1.0:
        return _abt(ranks, wide)
    return torch.addmm(_UNREAD[wide.dtype], ranks, wide.t(), beta=0, alpha=scaling)


def _fill(turned: Tensor, wide: Tensor, ranks: Tensor, scaling: float) -> None:
    """The same into `turned`."""
    if wide.is_cpu:
        turned.addmm_(ranks, wide.t(), beta=0, alpha=scaling)
    else:
        turned.t().addmm_(wide, ranks.t(), beta=0, alpha=scaling)


def _sum(turned: Tensor, rows: Tensor, scaling: float, wide: bool) -> Tensor:
    """`torch_ops.accumulate`: scaling · turned rows, fp32 or wider."""
    if not wide:
        return torch_ops.accumulate(turned.t(), rows, scaling)
    if scaling == 1.0:
        return torch.mm(turned, rows)
    if scaling in _EXACT and rows.is_cpu:
        return torch.addmm(_UNREAD[rows.dtype], turned, rows, beta=0, alpha=scaling)
    return torch.mm(turned, rows).mul_(scaling)


# What `.apply` of the two ends in, where no transform of torch.func is active: before that it looks
# for tensors that one has left behind, at the price of two products.
apply = super(torch.autograd.Function, PlainLinear).apply
apply_group = super(torch.autograd.Function, PlainGroup).apply
