"""The plan that a device's measured table (tuned) names for a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from rolora_kernels import tuned
from rolora_kernels.plan import OF_A_LINEAR, RULE, TORCH, Plan

# Below so many rows for each input feature, making a merged weight costs more than it saves.
ROWS_WORTH_MERGING = 0.8


def plan_for(
    x: torch.Tensor, weights: Sequence, ranks: tuple[int, ...], dropout: bool
) -> tuple[Plan, str]:
    """(plan, reason): what the device's table names for each primitive at the shape nearest to x
    `[M, K]` and frozen weights `[N_g, K]` with a rank each; vendor libraries without a table.
    """
    if torch.compiler.is_compiling():
        return TORCH, "torch.compile: vendor libraries, unless forced"
    found = tuned.of(x.device)
    if found is None:
        device = "GPU" if x.is_cuda else "device"
        return TORCH, f"default: no measured table for this {device}"
    (M, K), N = x.shape, max(W.shape[0] for W in weights)
    aligned = all(W.shape[0] % 8 == 0 for W in weights)
    plan = _from_table(x.device, x.dtype, M, N, K, ranks, dropout, aligned)
    if not dropout and _merging_is_worth(plan, x, weights):
        plan = _merged_from_table(plan, x.device, x.dtype, M, N, K, max(ranks))
    return plan, f"measured on {found['gpu']} at {found['commit']}, nearest shape"


@tuned.cached
def _from_table(
    device: torch.device,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    ranks: tuple[int, ...],
    dropout: bool,
    aligned: bool,
) -> Plan:
    """The winners at M, N, K: for a group's summed rank where a primitive serves the whole group,
    else for the linears' own. Rows that TMA cannot address (`aligned`) go by pointers.
    """
    from rolora_kernels.triton_ops import descriptors
    from rolora_kernels.triton_ops.spec import all_specs

    specs, letters, chosen = all_specs(), {"M": M, "N": N, "K": K}, {}
    by_tma = aligned and descriptors.why_not(device, dtype, N, K) is None
    for name in RULE:
        sizes = tuple(letters[letter] for letter in specs[name].sizes)
        rank = max(ranks) if name in OF_A_LINEAR else sum(ranks)
        row = tuned.nearest(device, name, dtype, specs[name].rank_block(rank), sizes, dropout)
        winner = row["winner"] if row else "torch"
        chosen[name] = "triton" if winner == "tma" and not by_tma else winner
    return Plan.of(chosen)


def _merging_is_worth(plan: Plan, x: torch.Tensor, weights: Sequence) -> bool:
    """Whether a merged weight may take the place of a plan: enough rows to make it for, and no more
    lost of the low-rank part (merged says when): the base is rounded to x's dtype anyway, or that
    is fp32, or the plan rounds Y twice, as vendor libraries do.
    """
    M, K = x.shape
    on_the_grid = any(W.dtype == x.dtype for W in weights)
    as_exact = x.dtype.itemsize > 2 or not on_the_grid or plan.expand_base == "torch"
    return as_exact and M >= ROWS_WORTH_MERGING * K


@tuned.cached
def _merged_from_table(
    plan: Plan, device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, rank: int
) -> Plan:
    """The plan, with a merged weight where the table says that one wins over the whole rule."""
    from rolora_kernels.triton_ops.spec import all_specs

    rank_block = all_specs()["expand_base"].rank_block(rank)
    row = tuned.nearest(device, "merged", dtype, rank_block, (M, N, K))
    if row is None or row["winner"] == "none":
        return plan
    return replace(plan, expand_base="torch", base_dx="torch", merge=row["winner"], merged=True)
