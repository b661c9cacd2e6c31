"""The autograd rule, once: G frozen linears that share an input, each with a LoRA path of which
some factors train.

    S = drop(X) [A_1; …; A_G]ᵀ            Y_g = X W_gᵀ + b_g + s_g · S_g B_gᵀ
    T_g = s_g · dY_g B_g                  dX  = Σ_g dY_g W_g + drop(T [A_1; …; A_G])
    dB_g = s_g · dY_gᵀ S_g                dA  = Tᵀ drop(X)

What is not needed is neither kept nor computed: training B keeps S (r numbers a token) and never
touches dA; training A keeps X and never touches dB; dW does not exist. The factors are
rounded to X's dtype for a call; their gradients come back in fp32 from the accumulator.

C clients on one base are the same rule: a factor `[C, …]` is one matrix a client, one without that
axis is common to all, and X's rows are grouped by client, as many for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rolora_kernels import primitives, reference, tuning
from rolora_kernels.dropout import Dropout
from rolora_kernels.weights import FrozenWeight, dense, no_autocast

PHASES = ("A", "B", "BOTH")


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
    scalings: Sequence[float],
    biases: Sequence[Tensor | None],
    *,
    trainable: str | None = None,
    dropout_p: float = 0.0,
    dropout_key: Tensor | int | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` for G linears on one input (q, k, v; gate, up): one shrink, one dropout mask,
    one sum of dX.

    Lists of length G; shapes, errors and dtypes as in `lora_linear`, ranks and out features may
    differ. Returns G tensors.
    """
    lora_As, lora_Bs = _narrow(lora_As, lora_Bs, trainable)
    _check(x, weights, lora_As, lora_Bs, biases)
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    elif not autocast:
        _check_dtype(x, weights)
    dropout = _dropout_of(dropout_p, dropout_key, x.device)
    lead, flat = x.shape[:-1], x.reshape(-1, x.shape[-1])
    backend = tuning.choose(
        flat, weights, sum(A.shape[-2] for A in lora_As), _clients(lora_As, lora_Bs)
    )
    tuning.record("lora_linear", *backend, _shape_text(flat, weights, lora_As), x, len(weights))
    if backend[0] == "reference":
        with torch.autocast(device, enabled=False):
            outputs = [
                reference.lora_linear(
                    flat, dense(W, x.dtype), A.to(x.dtype), B.to(x.dtype), s, _cast(b, x), dropout
                )
                for W, A, B, s, b in zip(weights, lora_As, lora_Bs, scalings, biases, strict=True)
            ]
    else:
        outputs = _GroupedLoRALinear.apply(
            flat, tuple(scalings), dropout, backend[0], *weights, *lora_As, *lora_Bs, *biases
        )
    return tuple(y.view(*lead, y.shape[-1]) for y in outputs)


class _GroupedLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scalings, dropout, backend, *operands):
        G, ops = len(scalings), primitives.of(backend)
        weights, lora_As, lora_Bs, biases = (operands[i * G : (i + 1) * G] for i in range(4))
        with no_autocast(x):
            S = ops.shrink(
                x, _stack(lora_As, x.dtype, ops), dropout
            )  # once for a whole cohort where A is common
            outputs = tuple(
                ops.expand_base(x, dense(W, x.dtype), S_g, ops.factor(B, x.dtype), s, _cast(b, x))
                for W, S_g, B, s, b in zip(
                    weights, _split(S, lora_As), lora_Bs, scalings, biases, strict=True
                )
            )
        need_x = ctx.needs_input_grad[0]
        need_A, need_B = (ctx.needs_input_grad[4 + i * G : 4 + (i + 1) * G] for i in (1, 2))
        ctx.need_x, ctx.need_A, ctx.need_B, ctx.scalings, ctx.backend = (
            need_x,
            need_A,
            need_B,
            scalings,
            backend,
        )
        ctx.p = dropout.p if dropout else 0.0
        ctx.clients = _clients(lora_As, lora_Bs)
        tensors = [None] * G
        if need_x:
            tensors = [W if isinstance(W, Tensor) else None for W in weights]
        ctx.quantised = [None if isinstance(W, Tensor) else W for W in weights]
        ctx.save_for_backward(
            x if any(need_A) else None,
            S if any(need_B) else None,
            dropout.key if dropout else None,
            dropout.rows if dropout else None,
            *tensors,
            *lora_As,
            *lora_Bs,
        )
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        scalings, G, ops = ctx.scalings, len(ctx.scalings), primitives.of(ctx.backend)
        x, S, key, rows, *rest = ctx.saved_tensors
        tensors, lora_As, lora_Bs = rest[:G], rest[G : 2 * G], rest[2 * G :]
        weights = [q if W is None else W for W, q in zip(tensors, ctx.quantised, strict=True)]
        dropout = Dropout(ctx.p, key, rows) if key is not None else None
        used = [g for g in range(G) if dys[g] is not None]
        if not used:
            return (None,) * (4 + 4 * G)
        first = dys[used[0]]
        axis = {"clients": ctx.clients} if ctx.clients else {}
        dx, dAs, dBs = None, [None] * G, [None] * G
        with no_autocast(first):
            need_T = ctx.need_x or any(ctx.need_A)
            T = ops.rank_buffer(first, sum(A.shape[-2] for A in lora_As)) if need_T else None
            T_parts = _split(T, lora_As) if need_T else [None] * G
            S_parts = _split(S, lora_As) if S is not None else [None] * G
            for g in range(G):
                if dys[g] is None:
                    if need_T:
                        T_parts[g].zero_()
                    continue
                B = ops.factor(lora_Bs[g], first.dtype) if need_T else None
                S_g = S_parts[g] if ctx.need_B[g] else None
                _, dBs[g] = ops.grads_of_dy(dys[g], B, S_g, scalings[g], T_parts[g], **axis)
            if ctx.need_x:
                dense_used = [dense(weights[g], first.dtype) for g in used]
                dx = ops.base_dx(
                    [dys[g] for g in used],
                    dense_used,
                    T,
                    _stack(lora_As, first.dtype, ops),
                    dropout,
                )
            if any(ctx.need_A):
                parts = ops.grad_A(T, x, dropout, **axis).split(
                    [A.shape[-2] for A in lora_As], dim=-2
                )
                dAs = [part if need else None for part, need in zip(parts, ctx.need_A, strict=True)]
        return (dx, None, None, None, *[None] * G, *dAs, *dBs, *[None] * G)


def _clients(lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor]) -> int:
    """The clients of a call whose factors have the client axis; 0 without one."""
    return next((factor.shape[0] for factor in (*lora_As, *lora_Bs) if factor.ndim == 3), 0)


def _cast(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def _stack(factors: Sequence[Tensor], dtype: torch.dtype, ops) -> Tensor:
    """[A_1; …; A_G] as one [R, K] matrix, as the backend takes factors."""
    return ops.factor(factors[0] if len(factors) == 1 else torch.cat(list(factors), dim=-2), dtype)


def _split(columns: Tensor, lora_As: Sequence[Tensor]) -> Sequence[Tensor]:
    """The column blocks of an [M, R] tensor that belong to each linear; views."""
    return [columns] if len(lora_As) == 1 else columns.split([A.shape[-2] for A in lora_As], dim=1)


def _narrow(lora_As, lora_Bs, trainable):
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


def _check(x, weights, lora_As, lora_Bs, biases) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    clients = _clients(lora_As, lora_Bs)
    if clients:
        _check_clients(clients, x, lora_As, lora_Bs)
    for W, A, B, bias in zip(weights, lora_As, lora_Bs, biases, strict=True):
        fits = (
            x.ndim >= 1
            and len(W.shape) == 2 <= min(A.ndim, B.ndim)
            and max(A.ndim, B.ndim) <= 3
            and A.shape[-2] == B.shape[-1] >= 1
            and tuple(W.shape) == (B.shape[-2], A.shape[-1])
            and x.shape[-1] == A.shape[-1]
            and (bias is None or tuple(bias.shape) == (B.shape[-2],))
        )
        if not fits:
            given = ", ".join(
                f"{name} {list(t.shape)}"
                for name, t in (
                    ("x", x),
                    ("weight", W),
                    ("lora_A", A),
                    ("lora_B", B),
                    ("bias", bias),
                )
                if t is not None
            )
            raise ValueError(
                f"shapes do not fit: {given}; expected x [..., in], weight [out, in], lora_A [r, "
                "in], "
                "lora_B [out, r], bias [out]"
            )
        if (isinstance(W, Tensor) and W.requires_grad) or (bias is not None and bias.requires_grad):
            raise ValueError(
                "weight and bias are frozen here but one of them requires grad: call "
                "requires_grad_(False) on it"
            )
        devices = {t.device for t in (x, W, A, B, bias) if t is not None}
        if len(devices) > 1:
            raise ValueError(f"tensors are on different devices: {sorted(map(str, devices))}")


def _check_clients(clients: int, x, lora_As, lora_Bs) -> None:
    rows = x.numel() // x.shape[-1] if x.ndim else 0
    if rows % clients:
        raise ValueError(
            f"x {list(x.shape)} has {rows} rows, which {clients} clients cannot share evenly"
        )
    for name, factors in (("lora_A", lora_As), ("lora_B", lora_Bs)):
        kinds = {tuple(f.shape[:-2]) for f in factors}
        if not (kinds == {()} or kinds == {(clients,)}):
            raise ValueError(
                f"the {name} of a group must all be common to the clients or all have {clients} of "
                "them, got shapes "
                f"{[list(f.shape) for f in factors]}"
            )
        if kinds == {()} and any(f.requires_grad for f in factors):
            raise ValueError(
                f"{name} {list(factors[0].shape)} trains, so {clients} clients need one each: "
                f"[{clients}, …]"
            )


def _check_dtype(x, weights) -> None:
    for W in weights:
        if W.dtype is not None and W.dtype != x.dtype:
            raise ValueError(
                f"x is {x.dtype} but weight is {W.dtype}: cast one of them, or use torch.autocast"
            )


def _dropout_of(p: float, key: Tensor | int | None, device: torch.device) -> Dropout | None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], got {p}")
    if p == 0.0:
        return None
    if key is None:
        raise ValueError(
            "dropout_p > 0 needs dropout_key: the 64-bit key that backward makes the same mask from"
        )
    if not isinstance(key, Tensor):
        key = torch.tensor(key, dtype=torch.int64, device=device)
    return Dropout(p, key) if key.ndim == 0 else Dropout(p, *key)


def _shape_text(x: Tensor, weights, lora_As) -> str:
    if torch.compiler.is_compiling():
        return ""
    sizes = "+".join(str(W.shape[0]) for W in weights)
    ranks = "+".join(str(A.shape[-2]) for A in lora_As)
    return f"M={x.shape[0]} K={x.shape[1]} N={sizes} r={ranks}"
