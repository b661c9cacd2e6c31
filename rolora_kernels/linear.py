"""The autograd rule, once: G frozen linears that share an input, each with a LoRA path of which
some factors train.

    S = drop(X) [A_1; …; A_G]ᵀ            Y_g = X W_gᵀ + b_g + s_g · S_g B_gᵀ
    T_g = s_g · dY_g B_g                  dX  = Σ_g dY_g W_g + drop(T [A_1; …; A_G])
    dB_g = s_g · dY_gᵀ S_g                dA  = Tᵀ drop(X)

What is not needed is neither kept nor computed: training B keeps S (r numbers a token) and never
touches dA; training A keeps X and never touches dB; dW does not exist. The factors are
rounded to X's dtype for a call; their gradients come back in fp32 from the accumulator.

C clients on one base are the same rule: a factor `[C, …]` is one matrix a client, one without that
axis is common to all, and X's rows are grouped by client, as many for each. AdapterRows (rows)
lifts both: any rows, in any order, for any number of adapters outside a federation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rolora_kernels import dispatch, dropping, operands, reference
from rolora_kernels.dropout import Dropout
from rolora_kernels.merged import merged_linears
from rolora_kernels.once import once
from rolora_kernels.plain import PlainGroup, PlainLinear
from rolora_kernels.rows import AdapterRows
from rolora_kernels.settled import Kind, kind_of, settle
from rolora_kernels.torch_ragged import Ragged, Scaling
from rolora_kernels.weights import FrozenWeight, dense, no_autocast


def lora_linear(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    trainable: str | None = None,
    dropout_p: float = 0.0,
    dropout_key: Tensor | int | None = None,
) -> Tensor:
    """`x Wᵀ + bias + scaling · (drop(x) Aᵀ) Bᵀ` with gradients for x and for the factors that
    require them.

    Args:
        x: `[..., in]`, fp32, bf16 or fp16, any strides.
        weight: frozen `[out, in]`, a tensor of any strides or a FrozenWeight; x's dtype unless
            autocast is on.
        lora_A: `[r, in]` or `[C, r, in]`; lora_B: `[out, r]` or `[C, out, r]`; usually fp32
            parameters. `requires_grad` says which one trains; with C clients x has C times as many
            rows, client by client, and a factor that trains has the client axis.
        scaling: `alpha / r` (or `alpha / sqrt(r)`), applied in the accumulator.
        bias: frozen `[out]` or None.
        trainable: "A", "B" or "BOTH" narrows what `requires_grad` says for this call.
        dropout_p: probability of dropping an input element of the LoRA path; dropout_key: its
            64-bit key, needed at p > 0, or int64 `[2, rows]` with C clients: every row's key, and
            its place in its client's own batch.

    Returns: `[..., out]` in x's dtype (autocast's dtype under autocast). Gradients of the factors
    are fp32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a weight or bias that requires grad,
            `trainable` naming a factor that does not, dropout without a key. Nothing has been
            computed then.
    """
    if trainable is not None:
        (lora_A,), (lora_B,) = operands.narrowed((lora_A,), (lora_B,), trainable)
    group = (weight,), (lora_A,), (lora_B,)
    kind = kind_of(x, *group, (bias,), dropout_p != 0.0)
    if kind.plain:
        kind.choice = dispatch.count(kind.key, kind.choice)
        return PlainLinear.apply(x, weight, lora_A, lora_B, bias, scaling, kind)
    dropout = None
    if dropout_p != 0.0:
        dropout = operands.dropout_of(dropout_p, dropout_key, x.device)
    return _computed(kind, x, *group, (scaling,), (bias,), dropout)[0]


def grouped_lora_linear(
    x: Tensor,
    weights: Sequence[Tensor | FrozenWeight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[Scaling],
    biases: Sequence[Tensor | None],
    *,
    trainable: str | None = None,
    dropout_p: float = 0.0,
    dropout_key: Tensor | int | None = None,
    rows: AdapterRows | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` for G linears on one input (q, k, v; gate, up): one shrink, one dropout mask,
    one sum of dX.

    Lists of length G; shapes, errors and dtypes as in `lora_linear`, ranks and out features may
    differ. With `rows`, factors with an axis of adapters get the rows that it says, in x's own
    order, and a scaling may be a tuple of one an adapter (`multi_lora_linear` is the short form).
    Returns G tensors.
    """
    if trainable is not None:
        lora_As, lora_Bs = operands.narrowed(lora_As, lora_Bs, trainable)
    if rows is not None:
        given = (x, weights, lora_As, lora_Bs, scalings, biases)
        return _of_rows(*given, dropout_p, dropout_key, rows)
    kind = kind_of(x, weights, lora_As, lora_Bs, biases, dropout_p != 0.0)
    dropout = None
    if dropout_p != 0.0:
        dropout = operands.dropout_of(dropout_p, dropout_key, x.device)
    return _computed(kind, x, weights, lora_As, lora_Bs, scalings, biases, dropout)


def _of_rows(
    x, weights, lora_As, lora_Bs, scalings, biases, dropout_p, dropout_key, rows: AdapterRows
) -> tuple[Tensor, ...]:
    """A call whose rows are sorted by adapter first, and put back."""
    operands.check(x, weights, lora_As, lora_Bs, biases, rows)
    dropout = operands.dropout_of(dropout_p, dropout_key, x.device)
    lead, flat = x.shape[:-1], rows.sort(x.reshape(-1, x.shape[-1]))
    dropout, ragged = operands.by_row(dropout, rows, len(flat)), None
    if not rows.even() or any(isinstance(s, tuple) for s in scalings):
        ragged = Ragged.of(rows, len(flat))
    given = (weights, lora_As, lora_Bs, biases)
    kind = settle(flat, *given, dropout is not None, rows, ragged)
    group = (weights, lora_As, lora_Bs, scalings, biases)
    outputs = [rows.restore(y) for y in _computed(kind, flat, *group, dropout)]
    return tuple(y.view(*lead, y.shape[-1]) for y in outputs)


def _computed(
    kind: Kind, x, weights, lora_As, lora_Bs, scalings, biases, dropout
) -> tuple[Tensor, ...]:
    """The outputs of a call that has been checked."""
    plan = kind.plan
    kind.choice = dispatch.count(kind.key, kind.choice)
    if x.dtype != kind.dtype:
        x = x.to(kind.dtype)
    if kind.plain:
        group = (*weights, *lora_As, *lora_Bs, *biases)
        return PlainGroup.apply(x, kind, tuple(scalings), *group)
    if not plan.merged and not plan.reference:
        group = (*weights, *lora_As, *lora_Bs, *biases)
        return GroupedLoRALinear.apply(x, kind, tuple(scalings), dropout, *group)
    lead, flat = x.shape[:-1], x.reshape(-1, x.shape[-1])
    outputs: Sequence[Tensor]
    if plan.merged:
        outputs = merged_linears(flat, weights, lora_As, lora_Bs, scalings, biases, plan)
    else:
        outputs = _by_autograd(flat, weights, lora_As, lora_Bs, scalings, biases, dropout)
    return tuple(y.view(*lead, y.shape[-1]) for y in outputs)


def _by_autograd(x, weights, lora_As, lora_Bs, scalings, biases, dropout) -> list[Tensor]:
    """The reference for every linear of a group."""
    outputs = []
    with torch.autocast(x.device.type, enabled=False):
        for W, A, B, s, b in zip(weights, lora_As, lora_Bs, scalings, biases, strict=True):
            A, B = A.to(x.dtype), B.to(x.dtype)
            outputs.append(
                reference.lora_linear(x, dense(W, x.dtype), A, B, s, _cast(b, x.dtype), dropout)
            )
    return outputs


# Another shape that is no view, which autograd would not let a caller change in place.
_shaped = torch.ops.aten._unsafe_view.default


class GroupedLoRALinear(torch.autograd.Function):
    """The rule. `kind`: who computes, and what is settled of the call; `group`: weights, A factors,
    B factors, biases, as many of each as scalings.
    """

    @staticmethod
    def forward(ctx, x, kind, scalings, dropout, *group):
        G, ops, dtype = len(scalings), kind.ops, kind.dtype
        weights, As, Bs, biases = (group[i : i + G] for i in range(0, 4 * G, G))
        need = ctx.needs_input_grad
        need_x, need_A, need_B = need[0], any(need[4 + G : 4 + 2 * G]), any(need[4 + 2 * G :])
        wide = x.ndim != 2
        flat = x.reshape(-1, x.shape[-1]) if wide else x
        outputs = []
        if dropout is not None and (need_x or need_A):
            dropout = dropping.remembering(dropout, x)
        with no_autocast(x):
            # once for a whole cohort where A is common
            S = ops.shrink(flat, operands.stacked(As, dtype, ops), dropout)
            parts = [S] if G == 1 else S.split(kind.ranks, dim=1)
            for W, S_g, B, s, b in zip(weights, parts, Bs, scalings, biases, strict=True):
                B = ops.factor(B, dtype)
                # no name for the dense weight: a quantised one is freed before the next is made
                y = ops.expand_base(flat, dense(W, dtype), S_g, B, s, _cast(b, dtype))
                outputs.append(_shaped(y, (*x.shape[:-1], y.shape[1])) if wide else y)
        ctx.quantised = [None if isinstance(W, Tensor) else W for W in weights]
        tensors: list[Tensor | None] = [None] * G
        if need_x:
            tensors = [W if isinstance(W, Tensor) else None for W in weights]
        ctx.kind, ctx.scalings, ctx.p = kind, scalings, 0.0
        kept = (flat if need_A else None, S if need_B else None)
        key = rows = None
        masks: dict[tuple[int, int, int], Tensor] = {}
        if dropout is not None:
            ctx.p, key, rows = dropout.p, dropout.key, dropout.rows
            masks = dropout.made or masks
        ctx.places = tuple(masks)
        ctx.save_for_backward(*kept, key, rows, *tensors, *As, *Bs, *masks.values())
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once
    def backward(ctx, *dys):
        kind, scalings, need = ctx.kind, ctx.scalings, ctx.needs_input_grad
        G, ops, dtype = len(scalings), kind.ops, kind.dtype
        need_x, need_A = need[0], need[4 + G : 4 + 2 * G]
        x, S, key, rows, *rest = ctx.saved_tensors
        tensors, As, Bs, masks = rest[:G], rest[G : 2 * G], rest[2 * G : 3 * G], rest[3 * G :]
        dropout = None
        if key is not None:
            twice = need_x and any(need_A)  # dX and dA have one mask
            made = dict(zip(ctx.places, masks, strict=True))
            dropout = Dropout(ctx.p, key, rows, made if twice or made else None)
        used = [g for g in range(G) if dys[g] is not None]
        if not used:
            return (None,) * (4 + 4 * G)
        flat = [d if d is None or d.ndim == 2 else d.reshape(-1, d.shape[-1]) for d in dys]
        first = flat[used[0]]
        axis = {"clients": kind.clients} if kind.clients else {}
        dx, T, dAs, dBs = None, None, [None] * G, [None] * G
        T_parts: Sequence[Any] = [None] * G
        S_parts: Sequence[Any] = [None] * G
        need_T = need_x or any(need_A)
        with no_autocast(first):
            alone = G == 1 and not kind.clients and not kind.apart
            if need_T and not alone:
                T = ops.rank_buffer(first, sum(kind.ranks))
                T_parts = [T] if G == 1 else T.split(kind.ranks, dim=1)
            if S is not None:
                S_parts = [S] if G == 1 else S.split(kind.ranks, dim=1)
            for g in range(G):
                if flat[g] is None:
                    if T is not None:
                        T_parts[g].zero_()
                    continue
                B = ops.factor(Bs[g], dtype) if need_T else None
                S_g = S_parts[g] if need[4 + 2 * G + g] else None
                T_g, dBs[g] = ops.grads_of_dy(flat[g], B, S_g, scalings[g], T_parts[g], **axis)
                T = T_g if alone else T
            if need_x:
                quantised = ctx.quantised
                weights = [quantised[g] if tensors[g] is None else tensors[g] for g in used]
                dense_used = [dense(W, dtype) for W in weights]
                A = operands.stacked(As, dtype, ops)
                dx = ops.base_dx([flat[g] for g in used], dense_used, T, A, dropout)
                if len(kind.x_shape) != 2:
                    dx = _shaped(dx, kind.x_shape)
            if any(need_A):
                dA = ops.grad_A(T, x, dropout, **axis)
                dAs = [dA] if G == 1 else list(dA.split(kind.ranks, dim=-2))
                dAs = [part if wanted else None for part, wanted in zip(dAs, need_A, strict=True)]
        return (dx, None, None, None, *[None] * G, *dAs, *dBs, *[None] * G)


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return bias if bias is None or bias.dtype == dtype else bias.to(dtype)
