"""The kernels as `torch.library` operators with fake implementations, so that torch.compile traces
through them.

Compiled code calls these; eager code calls the launchers directly, which saves the dispatcher's
cost on every call. Dropout travels as (p, key), what is not wanted as None, and what is not
computed comes back empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rolora_kernels.dropout import Dropout
from rolora_kernels.triton_ops import base_dx as _base_dx
from rolora_kernels.triton_ops import expand_base as _expand_base
from rolora_kernels.triton_ops import factor, rank_buffer
from rolora_kernels.triton_ops import grad_A as _grad_A
from rolora_kernels.triton_ops import grads_of_dy as _grads_of_dy
from rolora_kernels.triton_ops import shrink as _shrink

__all__ = ["base_dx", "expand_base", "factor", "grad_A", "grads_of_dy", "rank_buffer", "shrink"]


def _dropout(p: float, key: Tensor | None) -> Dropout | None:
    return None if key is None else Dropout(p, key)


def _parts(dropout: Dropout | None) -> tuple[float, Tensor | None]:
    return (0.0, None) if dropout is None else (dropout.p, dropout.key)


@torch.library.custom_op("rolora::shrink", mutates_args=())
def shrink_op(x: Tensor, A: Tensor, p: float, key: Tensor | None) -> Tensor:
    return _shrink(x, A, _dropout(p, key))


@shrink_op.register_fake
def _(x, A, p, key):
    return x.new_empty(x.shape[0], A.shape[0])


@torch.library.custom_op("rolora::expand_base", mutates_args=())
def expand_base_op(
    x: Tensor, W: Tensor, S: Tensor, B: Tensor, scaling: float, bias: Tensor | None, tma: bool
) -> Tensor:
    return _expand_base(x, W, S, B, scaling, bias, tma)


@expand_base_op.register_fake
def _(x, W, S, B, scaling, bias, tma):
    return x.new_empty(x.shape[0], W.shape[0])


@torch.library.custom_op("rolora::grads_of_dy", mutates_args=())
def grads_of_dy_op(
    dy: Tensor, B: Tensor | None, S: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    T, dB = _grads_of_dy(dy, B, S, scaling)
    if T is None:
        T = dy.new_empty(0)
    if dB is None:
        dB = dy.new_empty(0, dtype=torch.float32)
    return T, dB


@grads_of_dy_op.register_fake
def _(dy, B, S, scaling):
    T_shape = (0,) if B is None else (dy.shape[0], B.shape[1])
    dB_shape = (0,) if S is None else (dy.shape[1], S.shape[1])
    return dy.new_empty(T_shape), dy.new_empty(dB_shape, dtype=torch.float32)


@torch.library.custom_op("rolora::base_dx", mutates_args=())
def base_dx_op(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    T: Tensor,
    A: Tensor,
    p: float,
    key: Tensor | None,
    tma: bool,
) -> Tensor:
    return _base_dx(list(dys), list(weights), T, A, _dropout(p, key), tma)


@base_dx_op.register_fake
def _(dys, weights, T, A, p, key, tma):
    return dys[0].new_empty(dys[0].shape[0], A.shape[1])


@torch.library.custom_op("rolora::grad_a", mutates_args=())
def grad_a_op(T: Tensor, x: Tensor, p: float, key: Tensor | None) -> Tensor:
    return _grad_A(T, x, _dropout(p, key))


@grad_a_op.register_fake
def _(T, x, p, key):
    return x.new_empty(T.shape[1], x.shape[1], dtype=torch.float32)


def shrink(x: Tensor, A: Tensor, dropout: Dropout | None = None) -> Tensor:
    return shrink_op(x, A, *_parts(dropout))


def expand_base(
    x: Tensor,
    W: Tensor,
    S: Tensor,
    B: Tensor,
    scaling: float,
    bias: Tensor | None,
    tma: bool = False,
) -> Tensor:
    return expand_base_op(x, W, S, B, scaling, bias, tma)


def grads_of_dy(
    dy: Tensor, B: Tensor | None, S: Tensor | None, scaling: float, T: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    made, dB = grads_of_dy_op(dy, B, S, scaling)
    if B is not None and T is not None:
        made = T.copy_(made)
    return made if B is not None else None, dB if S is not None else None


def base_dx(
    dys: list[Tensor],
    weights: list[Tensor],
    T: Tensor,
    A: Tensor,
    dropout: Dropout | None = None,
    tma: bool = False,
) -> Tensor:
    return base_dx_op(dys, weights, T, A, *_parts(dropout), tma)


def grad_A(T: Tensor, x: Tensor, dropout: Dropout | None = None) -> Tensor:
    return grad_a_op(T, x, *_parts(dropout))
