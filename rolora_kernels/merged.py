"""The autograd rule over a merged weight: G frozen linears that share an input, each multiplied
once a pass with what its base and its factors amount to.

    W′_g = round(W_g + s_g · B_g A_g)     Y_g = X W′_gᵀ + b_g         dX = Σ_g dY_g W′_g
    S = X Aᵀ, dB_g = s_g · dY_gᵀ S_g      where B trains
    T_g = s_g · dY_g B_g, dA = Tᵀ X       where A trains

What no factor needs is not computed: training B makes no T, training A makes no S, and nobody reads
Y or dX a second time. W′ is made in forward, made again in backward, and freed after its product:
itemsize · N K bytes for one linear at a time, nothing of it kept between the passes. Making it
costs N K r multiply-adds and 2 · itemsize · N K bytes a pass, which M rows have to outweigh.

Where the low-rank part is lost. W′ is rounded to X's dtype, so Y carries the base's own rounding
once more: 1.41 × the error of a fused product while |s B A| is .01 to .1 of |W|, and the same error
as Y = X Wᵀ followed by Y += s S Bᵀ, which rounds Y twice (torch_ops, PEFT). Below 1.25 eps of |W|
(.01 in bf16, .0012 in fp16) what an element of W would change by falls under half its last place:
in bf16 7 % of the change is gone at .003 of |W| and 45 % at .001. Two products lose as much, a
fused one does not. A quantised base, or an fp32 one under autocast, is rounded to X's dtype anyway,
and W + s B A in its place: nothing more is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rolora_kernels import gemm, operands, primitives, weights
from rolora_kernels.once import once
from rolora_kernels.plan import Plan
from rolora_kernels.torch_ragged import Scaling
from rolora_kernels.weights import FrozenWeight, no_autocast


def merged_linears(
    x: Tensor,
    given: Sequence[Tensor | FrozenWeight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[Scaling],
    biases: Sequence[Tensor | None],
    plan: Plan,
) -> tuple[Tensor, ...]:
    """y_g `[M, N_g]` of `x [M, K]`, as linear.grouped_lora_linear states: without dropout and
    clients, which dispatch refuses.
    """
    return _MergedLoRALinear.apply(x, tuple(scalings), plan, *given, *lora_As, *lora_Bs, *biases)


def _maker(plan: Plan) -> Callable[..., Tensor]:
    """Who makes W′."""
    if plan.merge == "torch":
        return weights.merged
    from rolora_kernels.triton_ops.merge import merge

    return merge


class _MergedLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scalings, plan, *group):
        G, ops, merge = len(scalings), primitives.of(plan), _maker(plan)
        given, lora_As, lora_Bs, biases = (group[i * G : (i + 1) * G] for i in range(4))
        ctx.need_x = ctx.needs_input_grad[0]
        ctx.need_A, ctx.need_B = (ctx.needs_input_grad[3 + i * G : 3 + (i + 1) * G] for i in (1, 2))
        outputs, S = [], None
        with no_autocast(x):
            if any(ctx.need_B):
                S = ops.shrink(x, operands.stacked(lora_As, x.dtype, ops), None)
            for W, A, B, s, b in zip(given, lora_As, lora_Bs, scalings, biases, strict=True):
                # no name for W′: it is freed before the next one is made
                bias = None if b is None else b.to(x.dtype)
                outputs.append(gemm.abt(x, merge(W, A, B, s, x.dtype), bias))
        ctx.scalings, ctx.plan = scalings, plan
        tensors: list[Tensor | None] = [None] * G
        if ctx.need_x:
            tensors = [W if isinstance(W, Tensor) else None for W in given]
        ctx.quantised = [None if isinstance(W, Tensor) else W for W in given]
        ctx.save_for_backward(x if any(ctx.need_A) else None, S, *tensors, *lora_As, *lora_Bs)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once
    def backward(ctx, *dys):
        scalings, G = ctx.scalings, len(ctx.scalings)
        ops, merge = primitives.of(ctx.plan), _maker(ctx.plan)
        x, S, *rest = ctx.saved_tensors
        tensors, lora_As, lora_Bs = rest[:G], rest[G : 2 * G], rest[2 * G :]
        given = [q if W is None else W for W, q in zip(tensors, ctx.quantised, strict=True)]
        used = [g for g in range(G) if dys[g] is not None]
        if not used:
            return (None,) * (3 + 4 * G)
        first = dys[used[0]]
        dx: Tensor | None = None
        dAs: list[Tensor | None] = [None] * G
        dBs: list[Tensor | None] = [None] * G
        with no_autocast(first):
            T = None
            if any(ctx.need_A):
                T = ops.rank_buffer(first, sum(A.shape[-2] for A in lora_As))
            parts: list[Any] = [None] * G
            T_parts = parts if T is None else operands.split(T, lora_As)
            S_parts = parts if S is None else operands.split(S, lora_As)
            for g in range(G):
                T_g, s = T_parts[g], scalings[g]
                if dys[g] is None:
                    if T_g is not None:
                        T_g.zero_()
                    continue
                B = None if T_g is None else ops.factor(lora_Bs[g], first.dtype)
                S_g = S_parts[g] if ctx.need_B[g] else None
                if B is not None or S_g is not None:
                    _, dBs[g] = ops.grads_of_dy(dys[g], B, S_g, s, T_g)
                if ctx.need_x:
                    factors = lora_As[g], lora_Bs[g]
                    dx = gemm.abt(dys[g], merge(given[g], *factors, s, first.dtype).t(), plus=dx)
            if T is not None:
                dA = ops.grad_A(T, x, None)
                rows = dA.split([A.shape[-2] for A in lora_As])
                dAs = [part if need else None for part, need in zip(rows, ctx.need_A, strict=True)]
        return (dx, None, None, *[None] * G, *dAs, *dBs, *[None] * G)
