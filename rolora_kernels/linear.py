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

import torch
from torch import Tensor

from rolora_kernels import dispatch, operands, primitives, reference
from rolora_kernels.dropout import Dropout
from rolora_kernels.merged import merged_linears
from rolora_kernels.once import once
from rolora_kernels.rows import AdapterRows
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
    return grouped_lora_linear(
        x,
        [weight],
        [lora_A],
        [lora_B],
        [scaling],
        [bias],
        trainable=trainable,
        dropout_p=dropout_p,
        dropout_key=dropout_key,
    )[0]


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
    lora_As, lora_Bs = operands.narrowed(lora_As, lora_Bs, trainable)
    operands.check(x, weights, lora_As, lora_Bs, biases, rows)
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    elif not autocast:
        operands.check_dtype(x, weights)
    dropout = operands.dropout_of(dropout_p, dropout_key, x.device)
    lead, flat = x.shape[:-1], x.reshape(-1, x.shape[-1])
    ragged = None
    if rows is not None:
        flat = rows.sort(flat)
        dropout = operands.by_row(dropout, rows, len(flat))
        if not rows.even() or any(isinstance(s, tuple) for s in scalings):
            ragged = Ragged.of(rows, len(flat))
    ranks = tuple(A.shape[-2] for A in lora_As)
    clients = operands.clients_of(lora_As, lora_Bs)
    given = dispatch.Given(ranks, clients, ragged is not None, dropout is not None)
    plan, reason = dispatch.choose(flat, weights, given)
    shape = _shape_text(flat, weights, lora_As)
    dispatch.record("lora_linear", plan, reason, shape, x, len(weights))
    outputs: Sequence[Tensor]
    if plan.merged:
        outputs = merged_linears(flat, weights, lora_As, lora_Bs, scalings, biases, plan)
    elif plan.reference:
        outputs = _by_autograd(flat, weights, lora_As, lora_Bs, scalings, biases, dropout)
    else:
        outputs = GroupedLoRALinear.apply(
            flat, tuple(scalings), dropout, plan, ragged, *weights, *lora_As, *lora_Bs, *biases
        )
    if rows is not None:
        outputs = [rows.restore(y) for y in outputs]
    return tuple(y.view(*lead, y.shape[-1]) for y in outputs)


def _by_autograd(x, weights, lora_As, lora_Bs, scalings, biases, dropout) -> list[Tensor]:
    """The reference for every linear of a group."""
    outputs = []
    with torch.autocast(x.device.type, enabled=False):
        for W, A, B, s, b in zip(weights, lora_As, lora_Bs, scalings, biases, strict=True):
            A, B = A.to(x.dtype), B.to(x.dtype)
            outputs.append(
                reference.lora_linear(x, dense(W, x.dtype), A, B, s, _cast(b, x), dropout)
            )
    return outputs


class GroupedLoRALinear(torch.autograd.Function):
    """The rule. `ragged`: the primitives of rows that are not shared out evenly, None for those of
    the plan; `group`: weights, A factors, B factors, biases, as many of each as scalings.
    """

    @staticmethod
    def forward(ctx, x, scalings, dropout, plan, ragged, *group):
        G, ops = len(scalings), ragged or primitives.of(plan)
        weights, lora_As, lora_Bs, biases = (group[i * G : (i + 1) * G] for i in range(4))
        outputs = []
        with no_autocast(x):
            # once for a whole cohort where A is common
            S = ops.shrink(x, operands.stacked(lora_As, x.dtype, ops), dropout)
            S_parts = operands.split(S, lora_As)
            for W, S_g, B, s, b in zip(weights, S_parts, lora_Bs, scalings, biases, strict=True):
                B = ops.factor(B, x.dtype)
                # no name for the dense weight: a quantised one is freed before the next is made
                outputs.append(ops.expand_base(x, dense(W, x.dtype), S_g, B, s, _cast(b, x)))
        ctx.need_x = ctx.needs_input_grad[0]
        ctx.need_A, ctx.need_B = (ctx.needs_input_grad[5 + i * G : 5 + (i + 1) * G] for i in (1, 2))
        ctx.scalings, ctx.plan, ctx.ragged = scalings, plan, ragged
        ctx.p = dropout.p if dropout else 0.0
        ctx.clients = operands.clients_of(lora_As, lora_Bs)
        tensors: list[Tensor | None] = [None] * G
        if ctx.need_x:
            tensors = [W if isinstance(W, Tensor) else None for W in weights]
        ctx.quantised = [None if isinstance(W, Tensor) else W for W in weights]
        ctx.save_for_backward(
            x if any(ctx.need_A) else None,
            S if any(ctx.need_B) else None,
            dropout.key if dropout else None,
            dropout.rows if dropout else None,
            *tensors,
            *lora_As,
            *lora_Bs,
        )
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once
    def backward(ctx, *dys):
        scalings, G = ctx.scalings, len(ctx.scalings)
        ops = ctx.ragged or primitives.of(ctx.plan)
        x, S, key, rows, *rest = ctx.saved_tensors
        tensors, lora_As, lora_Bs = rest[:G], rest[G : 2 * G], rest[2 * G :]
        weights = [q if W is None else W for W, q in zip(tensors, ctx.quantised, strict=True)]
        dropout = Dropout(ctx.p, key, rows) if key is not None else None
        used = [g for g in range(G) if dys[g] is not None]
        if not used:
            return (None,) * (5 + 4 * G)
        first = dys[used[0]]
        axis = {"clients": ctx.clients} if ctx.clients else {}
        dx: Tensor | None = None
        dAs: list[Tensor | None] = [None] * G
        dBs: list[Tensor | None] = [None] * G
        with no_autocast(first):
            need_T = ctx.need_x or any(ctx.need_A)
            T = ops.rank_buffer(first, sum(A.shape[-2] for A in lora_As)) if need_T else None
            T_parts: Sequence[Tensor | None] = [None] * G
            S_parts: Sequence[Tensor | None] = [None] * G
            if T is not None:
                T_parts = operands.split(T, lora_As)
            if S is not None:
                S_parts = operands.split(S, lora_As)
            for g in range(G):
                T_g = T_parts[g]
                if dys[g] is None:
                    if T_g is not None:
                        T_g.zero_()
                    continue
                B = ops.factor(lora_Bs[g], first.dtype) if need_T else None
                S_g = S_parts[g] if ctx.need_B[g] else None
                _, dBs[g] = ops.grads_of_dy(dys[g], B, S_g, scalings[g], T_g, **axis)
            if T is not None and ctx.need_x:
                dense_used = [dense(weights[g], first.dtype) for g in used]
                A = operands.stacked(lora_As, first.dtype, ops)
                dx = ops.base_dx([dys[g] for g in used], dense_used, T, A, dropout)
            if T is not None and any(ctx.need_A):
                dA = ops.grad_A(T, x, dropout, **axis)
                parts = dA.split([A.shape[-2] for A in lora_As], dim=-2)
                dAs = [part if need else None for part, need in zip(parts, ctx.need_A, strict=True)]
        return (dx, None, None, None, None, *[None] * G, *dAs, *dBs, *[None] * G)


def _cast(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def _shape_text(x: Tensor, weights, lora_As) -> str:
    if torch.compiler.is_compiling():
        return ""
    sizes = "+".join(str(W.shape[0]) for W in weights)
    ranks = "+".join(str(A.shape[-2]) for A in lora_As)
    return f"M={x.shape[0]} K={x.shape[1]} N={sizes} r={ranks}"
