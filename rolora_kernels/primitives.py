"""The five operations that the autograd rule is made of, and who computes them for a plan.

x [M, K], W [N, K] in one dtype; A [R, K], B [N, r] as `factor(A, dtype)` gives them;
R is the sum of the ranks of a group, r the rank of one linear
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Protocol

import torch
from torch import Tensor

from rolora_kernels import torch_ops
from rolora_kernels.dropout import Dropout
from rolora_kernels.plan import RULE, TORCH, Plan


class Backend(Protocol):
    """The primitives by one implementation each, and how they like their operands.

    torch_ops and triton_ops are modules with these functions; `of` mixes them. Those of eager code
    also take `clients`, the number of clients where factors have a client axis.
    """

    def shrink(self, x: Tensor, A: Tensor, dropout: Dropout | None) -> Tensor:
        """S [M, R] = drop(x) Aᵀ"""

    def expand_base(
        self, x: Tensor, W: Tensor, S: Tensor, B: Tensor, scaling: float, bias: Tensor | None
    ) -> Tensor:
        """y [M, N] = x Wᵀ + bias + scaling · S Bᵀ"""

    def grads_of_dy(
        self, dy: Tensor, B: Tensor | None, S: Tensor | None, scaling: float, T: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """T [M, r] = scaling · dy B, into `T` where given; dB fp32 [N, r] = scaling · dyᵀ S.

        Without B no T is made, without S no dB.
        """

    def base_dx(
        self,
        dys: list[Tensor],
        weights: list[Tensor],
        T: Tensor,
        A: Tensor,
        dropout: Dropout | None,
    ) -> Tensor:
        """dx [M, K] = Σ_g dy_g W_g + drop(T A)"""

    def grad_A(self, T: Tensor, x: Tensor, dropout: Dropout | None) -> Tensor:
        """dA fp32 [R, K] = Tᵀ drop(x)"""

    def rank_buffer(self, like: Tensor, rank: int) -> Tensor:
        """An empty [M, rank] for T, in the memory order that the backend likes."""

    def factor(self, A: Tensor, dtype: torch.dtype) -> Tensor:
        """A factor as these primitives take it for operands of `dtype`."""


_built: dict[tuple[Plan, bool], SimpleNamespace] = {}


def of(plan: Plan) -> Backend:
    """What computes for a plan. Triton is imported only where it is used, and compiled code gets
    our kernels as `torch.library` operators.
    """
    if plan == TORCH:
        return torch_ops
    key = plan, torch.compiler.is_compiling()
    if key not in _built:
        _built[key] = _build(*key)
    return _built[key]


def prepare(plan: Plan) -> None:
    """Builds what `of` needs, so that a trace finds it made."""
    for compiling in (False, True):
        if (plan, compiling) not in _built:
            _built[plan, compiling] = _build(plan, compiling)


def _build(plan: Plan, compiling: bool) -> SimpleNamespace:
    ours = import_module("rolora_kernels.triton_ops" + (".library" if compiling else ""))
    by = {"torch": torch_ops, "triton": ours, "tma": ours}
    chosen = {name: getattr(by[getattr(plan, name)], name) for name in RULE}
    for name in RULE:
        if getattr(plan, name) == "tma":
            chosen[name] = partial(chosen[name], tma=True)
    # A mixture rounds factors beforehand, because vendor libraries take operands of one dtype only.
    mixed = any(getattr(plan, name) == "torch" for name in RULE)
    return SimpleNamespace(
        **chosen,
        rank_buffer=by[plan.grads_of_dy].rank_buffer,
        factor=(torch_ops if mixed else ours).factor,
    )
