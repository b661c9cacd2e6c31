"""The autograd rule for a mixture of experts: one frozen weight and one LoRA path an expert, rows
that lie expert by expert.

For the rows of expert e, with D_e the factor that meets x and U_e the one that makes y:

    S = x D_eᵀ            y  = x W_eᵀ + b_e + s · S U_eᵀ
    T = s · dy U_e        dx = dy W_e + T D_e
    dU_e = s · dyᵀ S      dD_e = Tᵀ x

Training U keeps S and never computes dD, training D keeps x and never computes dU; no expert's
product U_e D_e exists, nor does dW. An expert without rows has gradients of exactly 0.

Each expert's rows are one call of the primitives (a loop: one copy of the counts to the host), or
all experts are one `grouped_mm` of PyTorch where a GPU has it (bf16, sizes in eights); factors'
gradients come from an fp32 accumulator either way. With C clients on one base a factor is
`[C, E, …]`, and the rows of an expert lie client by client.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rolora_kernels import dispatch, gemm, primitives, torch_ops
from rolora_kernels.expert_rows import Rows
from rolora_kernels.once import once
from rolora_kernels.plan import Plan
from rolora_kernels.weights import no_autocast

LOOP, GROUPED = "loop", "grouped_mm"


def expert_lora_linear(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scaling: float,
    rows: Rows,
    bias: Tensor | None = None,
    *,
    library: str | None = None,
) -> Tensor:
    """`x_e W_eᵀ + b_e + scaling · (x_e D_eᵀ) U_eᵀ` for the rows of every expert, with gradients for
    x and for the factors that require them.

    Args:
        x: `[M, in]`, fp32, bf16 or fp16; rows expert by expert, as `Rows.of` orders them.
        weight: frozen `[E, out, in]` of any strides, in x's dtype unless autocast is on.
        down: `[E, r, in]`, or `[C, E, r, in]` with C clients; up: `[E, out, r]` or
            `[C, E, out, r]`; usually fp32 parameters.
        scaling: applied in the accumulator.
        rows: whose rows are whose.
        bias: frozen `[E, out]` or None.
        library: "loop" or "grouped_mm"; None takes what fits.

    Returns: `[M, out]` in x's dtype (autocast's under autocast). Gradients of the factors are fp32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a weight or bias that requires
            grad. Nothing has been computed then.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    _check(x, weight, down, up, rows, bias, autocast)
    if library is None:
        library = GROUPED if _grouped_fits(x, weight, down.shape[-2]) else LOOP
    clients = rows.clients if rows.clients > 1 else 0
    given = dispatch.Given((down.shape[-2],), clients, experts=True)
    plan, reason = dispatch.choose(x, (), given)
    if plan.ours():
        library = LOOP
    shape = f"M={len(x)} K={x.shape[1]} N={weight.shape[1]} r={down.shape[-2]} E={len(weight)}"
    if reason != dispatch.FORCED:
        reason = f"{reason}; {library}"
    dispatch.record("expert_lora_linear", plan, reason, shape, x, 1)
    return _ExpertLoRALinear.apply(x, weight, down, up, bias, scaling, rows, plan, library)


def _check(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    rows: Rows,
    bias: Tensor | None,
    autocast: bool,
) -> None:
    """Raises ValueError where the operands do not fit together."""
    experts, out, inner = weight.shape if weight.ndim == 3 else (0, 0, 0)
    lead = ((experts,), (rows.clients, experts))
    rank = down.shape[-2] if down.ndim >= 3 else 0
    fits = (
        x.ndim == 2
        and experts == rows.experts >= 1
        and x.shape[1] == inner
        and tuple(down.shape[:-2]) in lead
        and tuple(up.shape[:-2]) in lead
        and tuple(down.shape[-2:]) == (rank, inner)
        and tuple(up.shape[-2:]) == (out, rank)
        and (bias is None or tuple(bias.shape) == (experts, out))
    )
    if not fits:
        named = {"x": x, "weight": weight, "down": down, "up": up, "bias": bias}
        given = ", ".join(f"{name} {list(t.shape)}" for name, t in named.items() if t is not None)
        raise ValueError(
            f"shapes do not fit: {given} and rows of {rows.experts} experts, {rows.clients} "
            "clients; expected x [M, in], weight [E, out, in], down [E, r, in], up [E, out, r], "
            "bias [E, out]"
        )
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(
            "weight and bias are frozen here but one of them requires grad: call "
            "requires_grad_(False) on it"
        )
    if not autocast and weight.dtype != x.dtype:
        raise ValueError(
            f"x is {x.dtype} but weight is {weight.dtype}: cast one of them, or use torch.autocast"
        )


def _grouped_fits(x: Tensor, weight: Tensor, rank: int) -> bool:
    """Whether PyTorch's grouped matmul takes these: it addresses rows in steps of 16 bytes."""
    if (
        not x.is_cuda
        or x.dtype != torch.bfloat16
        or torch.cuda.get_device_capability(x.device)
        < (
            8,
            0,
        )
    ):
        return False
    return not any(size % 8 for size in (*weight.shape[1:], rank))


class _ExpertLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, down, up, bias, scaling, rows, plan, library):
        ctx.need_x, _, ctx.need_down, ctx.need_up = ctx.needs_input_grad[:4]
        W = weight.to(x.dtype)
        b = None if bias is None else bias.to(x.dtype)
        with no_autocast(x):
            if library == GROUPED:
                y, S = _grouped_forward(x, W, down, up, b, scaling, rows)
            else:
                y, S = _looped_forward(x, W, down, up, b, scaling, rows, plan)
        ctx.scaling, ctx.rows, ctx.plan, ctx.library = scaling, rows, plan, library
        ctx.save_for_backward(
            x if ctx.need_down else None, weight if ctx.need_x else None, down, up,
            *(S if ctx.need_up else ()),
        )  # fmt: skip
        return y

    @staticmethod
    @once
    def backward(ctx: Any, dy):
        x, weight, down, up, *S = ctx.saved_tensors
        W: Any = None if weight is None else weight.to(dy.dtype)
        with no_autocast(dy):
            run = _grouped_backward if ctx.library == GROUPED else _looped_backward
            dx, ddown, dup = run(ctx, dy, x, W, down, up, S)
        return dx, None, ddown, dup, None, None, None, None, None


def _of(factor: Tensor, expert: int, client: int, dtype: torch.dtype) -> Tensor:
    """One expert's matrix of a factor, a client's own or the common one, in the compute dtype."""
    own = factor[client, expert] if factor.ndim == 4 else factor[expert]
    return own.to(dtype)


def _gradient(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros for a factor's gradient: those of experts without rows stay."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.zeros(factor.shape, dtype=wide, device=factor.device)


def _put(gradient: Tensor, expert: int, client: int, value: Tensor) -> None:
    own = gradient[client, expert] if gradient.ndim == 4 else gradient[expert]
    own.add_(value)  # a common factor has a gradient where one client is all there is


def _looped_forward(
    x: Tensor, W: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, scaling: float,
    rows: Rows, plan: Plan,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    ops, shrunk = primitives.of(plan), []
    y = x.new_empty(len(x), W.shape[1])
    for e, whole, parts in rows.spans():
        b = None if bias is None else bias[e]
        if rows.clients == 1:
            S = ops.shrink(x[whole], ops.factor(_of(down, e, 0, x.dtype), x.dtype), None)
            B = ops.factor(_of(up, e, 0, x.dtype), x.dtype)
            y[whole] = ops.expand_base(x[whole], W[e], S, B, scaling, b)
            shrunk.append(S)
            continue
        y[whole] = gemm.abt(x[whole], W[e], b)
        for c, part in parts:
            S = torch_ops.shrink(x[part], _of(down, e, c, x.dtype))
            y[part].addmm_(S, _of(up, e, c, x.dtype).t(), alpha=scaling)
            shrunk.append(S)
    return y, shrunk


def _looped_backward(
    ctx: Any, dy: Tensor, x: Tensor, W: Tensor, down: Tensor, up: Tensor, S: list[Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows, ops = ctx.rows, primitives.of(ctx.plan)
    ddown = _gradient(down, dy.dtype) if ctx.need_down else None
    dup = _gradient(up, dy.dtype) if ctx.need_up else None
    dx = dy.new_empty(len(dy), down.shape[-1]) if ctx.need_x else None
    shrunk = iter(S)
    for e, whole, parts in rows.spans():
        if dx is not None and rows.clients > 1:
            dx[whole] = gemm.abt(dy[whole], W[e].t())
        for c, part in parts:
            own = None if dup is None else next(shrunk)
            if dx is None and ddown is None:
                _, dB = ops.grads_of_dy(dy[part], None, own, ctx.scaling, None)
            else:
                B = ops.factor(_of(up, e, c, dy.dtype), dy.dtype)
                T = ops.rank_buffer(dy[part], down.shape[-2])
                _, dB = ops.grads_of_dy(dy[part], B, own, ctx.scaling, T)
                A = ops.factor(_of(down, e, c, dy.dtype), dy.dtype)
                if ddown is not None:
                    _put(ddown, e, c, ops.grad_A(T, x[part], None))
                if dx is not None and rows.clients == 1:
                    dx[whole] = ops.base_dx([dy[whole]], [W[e]], T, A, None)
                elif dx is not None:
                    dx[part].addmm_(T, A)
            if dup is not None and dB is not None:
                _put(dup, e, c, dB)
    return dx, ddown, dup


def _flat(factor: Tensor, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(the matrices of a factor as `grouped_mm` takes them, where the rows of each end)."""
    if factor.ndim == 4:
        factor = factor.transpose(0, 1).flatten(0, 1)
    return factor.to(dtype), rows.ends(len(factor) != rows.experts)


def _grouped_mm(a: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """a_g M_g for the rows of every group g: a `[M, n]`, matrices `[G, n, m]` → `[M, m]`."""
    return torch.nn.functional.grouped_mm(a, matrices, offs=ends)


def _grouped_forward(
    x: Tensor, W: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, scaling: float, rows: Rows
) -> tuple[Tensor, list[Tensor]]:
    D, d_ends = _flat(down, rows, x.dtype)
    U, u_ends = _flat(up, rows, x.dtype)
    S = _grouped_mm(x, D.transpose(1, 2), d_ends)
    y = _grouped_mm(x, W.transpose(1, 2), rows.ends(False))
    y = y.add_(_grouped_mm(S, U.transpose(1, 2), u_ends), alpha=scaling)
    if bias is not None:
        y += bias.repeat_interleave(rows.counts.sum(1), dim=0, output_size=len(x))
    return y, [S]


def _grouped_backward(
    ctx: Any, dy: Tensor, x: Tensor, W: Tensor, down: Tensor, up: Tensor, S: list[Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows, dx, ddown, dup = ctx.rows, None, None, None
    dy = dy.contiguous()
    if ctx.need_x or ctx.need_down:
        T = _grouped_mm(dy, *_flat(up, rows, dy.dtype)).mul_(ctx.scaling)
        if ctx.need_x:
            dx = _grouped_mm(dy, W, rows.ends(False))
            dx = dx.add_(_grouped_mm(T, *_flat(down, rows, dy.dtype)))
        if ctx.need_down:
            ddown = _summed(_gradient(down, dy.dtype), T, x, rows)
    if ctx.need_up:
        dup = _summed(_gradient(up, dy.dtype), dy, S[0], rows).mul_(ctx.scaling)
    return dx, ddown, dup


def _summed(made: Tensor, narrow: Tensor, wide: Tensor, rows: Rows) -> Tensor:
    """`made` with narrow_eᵀ wide_e of every expert in it, from an fp32 accumulator."""
    for e, _, parts in rows.spans():
        for c, part in parts:
            _put(made, e, c, torch_ops.grad_A(narrow[part], wide[part]))
    return made
