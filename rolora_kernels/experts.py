"""A mixture of experts: one frozen weight and one LoRA path an expert, rows sorted by expert.

    S = x A_eᵀ            y  = x W_eᵀ + b_e + s · S B_eᵀ      for the rows of expert e
    T = s · dy B_e        dx = dy W_e + T A_e
    dB_e = s · dyᵀ S      dA_e = Tᵀ x

The rule is the linears' own (linear): training B keeps S and never computes dA, training A keeps x
and never computes dB; no expert's product B_e A_e exists, nor does dW. Who computes is in
torch_experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolora_kernels import dispatch, operands, primitives
from rolora_kernels.expert_rows import ExpertRows
from rolora_kernels.linear import GroupedLoRALinear
from rolora_kernels.settled import Kind
from rolora_kernels.torch_experts import Experts, GroupedExperts, LoopedExperts
from rolora_kernels.uncompiled import uncompiled

LOOP, GROUPED = "loop", "grouped_mm"


@uncompiled
def expert_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    rows: ExpertRows,
    library: str | None = None,
) -> Tensor:
    """`x W_eᵀ + b_e + scaling · (x A_eᵀ) B_eᵀ` for the rows of every expert, with gradients for x
    and for the factors that require them.

    Args:
        x: `[M, in]`, fp32, bf16 or fp16, sorted as `rows` says.
        weight: frozen `[E, out, in]` of any strides, in x's dtype unless autocast is on.
        lora_A: `[E, r, in]`, or `[C, E, r, in]` with C clients; lora_B: `[E, out, r]` or
            `[C, E, out, r]`; usually fp32 parameters. One that trains has the axis of clients.
        scaling: applied in the accumulator.
        bias: frozen `[E, out]` or None.
        rows: whose rows are whose, made once for all weights of a mixture.
        library: "loop" or "grouped_mm"; None takes what fits.

    Returns: `[M, out]` in x's dtype (autocast's under autocast). Gradients of the factors are fp32,
    exact zeros for an expert without rows.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a weight or bias that requires
            grad. Nothing has been computed then.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    elif not autocast:
        operands.check_dtype(x, [weight])
    lora_A, lora_B = _of_one(lora_A, rows), _of_one(lora_B, rows)
    _check(x, weight, lora_A, lora_B, bias, rows)
    rank, clients = lora_A.shape[-2], rows.clients if rows.clients > 1 else 0
    plan, reason = dispatch.choose(x, (), dispatch.Given((rank,), clients, experts=True))
    if library is None:
        library = GROUPED if GroupedExperts.takes(x, weight, rank) else LOOP
    by: Experts | LoopedExperts = GroupedExperts(rows) if library == GROUPED else Experts(rows)
    if plan.ours():
        by = LoopedExperts(rows, primitives.of(plan))
    elif reason != dispatch.FORCED:
        reason = f"{reason}; {library}"
    shape = f"M={len(x)} K={x.shape[1]} N={weight.shape[1]} r={rank} E={rows.experts}"
    key = ("expert_lora_linear", plan, reason, shape, x.dtype, x.device, 1)
    dispatch.count(key)
    kind = Kind(plan, by, x.dtype, x.shape, 0, (rank,), key, apart=True)
    group = (weight, lora_A, lora_B, bias)
    return GroupedLoRALinear.apply(x, kind, (float(scaling),), None, *group)[0]


def _of_one(factor: Tensor, rows: ExpertRows) -> Tensor:
    """A factor without the axis of clients where there is one client alone."""
    return factor[0] if rows.clients == 1 and factor.ndim == 4 and len(factor) == 1 else factor


def _check(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, rows: ExpertRows
) -> None:
    """Raises ValueError where the operands do not fit together."""
    experts, out, inner = weight.shape if weight.ndim == 3 else (0, 0, 0)
    lead = (rows.experts,), rows.lead
    fits = (
        x.ndim == 2
        and len(x) == rows.pairs.units
        and x.shape[1] == inner
        and experts == rows.experts >= 1
        and min(A.ndim, B.ndim) >= 3
        and A.shape[-2] == B.shape[-1] >= 1
        and (tuple(A.shape[:-2]) in lead and A.shape[-1] == inner)
        and (tuple(B.shape[:-2]) in lead and B.shape[-2] == out)
        and (bias is None or tuple(bias.shape) == (experts, out))
    )
    named = {"x": x, "weight": weight, "lora_A": A, "lora_B": B, "bias": bias}
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    if not fits:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in given.items())
        raise ValueError(
            f"shapes do not fit: {shapes} and {rows.pairs.units} rows of {rows.experts} experts, "
            f"{rows.clients} clients; expected x [rows, in], weight [E, out, in], lora_A "
            "[E, r, in], lora_B [E, out, r], bias [E, out]"
        )
    for name, factor in (("lora_A", A), ("lora_B", B)):
        if factor.requires_grad and tuple(factor.shape[:-2]) != rows.lead:
            raise ValueError(
                f"{name} {list(factor.shape)} trains, so {rows.clients} clients need one each: "
                f"[{rows.clients}, {rows.experts}, …]"
            )
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(
            "weight and bias are frozen here but one of them requires grad: call "
            "requires_grad_(False) on it"
        )
    devices = {tensor.device for tensor in given.values()}
    if len(devices) > 1:
        raise ValueError(f"tensors are on different devices: {sorted(map(str, devices))}")
