"""RoLoRAParameter: a LoRA path over a parameter that no linear owns, such as the experts' weights,
which transformers keeps as one tensor `[experts, out, in]`.

As PEFT's `target_parameters` has it: its shapes, its scaling, its two ways round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from rolora.adapter import starts
from rolora.adapter.adapted import Adapted


class RoLoRAParameter(Adapted):
    """`W + scaling · B A` in the place of a parameter W, or of each W_e of a stack of experts.

    A part of the module that owns W, which computes with it (`rolora.adapter.experts`).

    Attributes:
        parameter_name: W's, in its owner; W stays there under its own name.
        experts: E of a stack `[E, …]`; None for a matrix.
        transposed: the owner says (`is_transposed`) that it stores `[in, out]`, as gpt-oss does.
            A stack stored so without saying it, as Llama-4's, has A on the side of the outputs:
            `x (W + scaling · B A)`. PEFT has it so, and files are PEFT's.
        lora_A: fp32 `[r, in]`, or `[E, r, in]`; lora_B: fp32 `[out, r]`, or `[E, out, r]`, zero.
    """

    def __init__(
        self,
        owner: nn.Module,
        parameter_name: str,
        rank: int,
        alpha: float,
        *,
        rslora: bool = False,
        init: str = "kaiming",
        generator: torch.Generator | None = None,
    ):
        weight = _checked(owner, parameter_name)
        transposed = weight.ndim == 3 and bool(getattr(owner, "is_transposed", False))
        out_features, in_features = weight.shape[-2:]
        if transposed:
            out_features, in_features = in_features, out_features
        starts.check(init, rank, alpha, 0.0, (out_features, in_features))
        if init in starts.OF_THE_WEIGHT:
            raise ValueError(
                f"init={init!r} is made of a linear's weight, and {parameter_name} is a "
                "parameter: use kaiming, gaussian or orthogonal, or leave target_parameters out"
            )
        super().__init__(rank, alpha, 0.0, rslora)
        self.parameter_name, self.transposed = parameter_name, transposed
        self.out_features, self.in_features = out_features, in_features
        self.experts = weight.shape[0] if weight.ndim == 3 else None
        self._owner = (owner,)  # in a tuple, or it would be a part of its own part
        self._kept: Tensor | None = None
        self._merged = False
        lead = () if self.experts is None else (self.experts,)
        self._make_factors(weight.device, lead)
        self.reset_factors(init, generator)
        self.train(owner.training)

    @torch.no_grad()
    def reset_factors(
        self, init: str = "kaiming", generator: torch.Generator | None = None
    ) -> None:
        """B = 0 and a fresh A, each expert's drawn after the one before."""
        self.lora_B.zero_()
        if self.lora_A.is_meta:
            return
        for A in [self.lora_A] if self.experts is None else self.lora_A:
            A.copy_(starts.drawn(init, self.rank, self.in_features, generator))

    def module_path(self, path: str) -> str:
        owner, _, last = path.rpartition(".")
        return f"{owner}.{part_name(last)}"

    @property
    def owner(self) -> nn.Module:
        return self._owner[0]

    @property
    def weight(self) -> nn.Parameter:
        """W itself, as its owner stores it."""
        return cast(nn.Parameter, self.owner._parameters[self.parameter_name])

    @property
    def merged(self) -> bool:
        return self._merged

    @property
    def computes(self) -> bool:
        """Whether the path is added in the forward."""
        return self.enabled and not self.merged

    def product(self, A: Tensor, B: Tensor) -> Tensor:
        """scaling · B A of one expert, or of all, as W is stored."""
        delta = self.scaling * (B @ A)
        return delta.transpose(-2, -1) if self.transposed else delta

    @torch.no_grad()
    def delta(self, expert: int | None = None) -> Tensor:
        """scaling · (B A + U V) as W is stored, of one expert or of the whole stack; fp64 for a
        base in fp64, fp32 for others.
        """
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        pairs: list[tuple[Tensor, Tensor]] = [(self.lora_A, self.lora_B)]
        if self.term is not None:
            U, V = self.term
            pairs.append((V, U))
        if expert is not None:
            pairs = [(A[expert], B[expert]) for A, B in pairs]
        first, *more = [self.product(A.to(dtype), B.to(dtype)) for A, B in pairs]
        return first.add_(more[0]) if more else first

    def changed(self) -> Tensor:
        """W + scaling · (B A + U V) in W's dtype, with gradients for the factors that train: what
        PEFT computes with, as large as W.
        """
        dtype = self.weight.dtype
        with torch.autocast(self.weight.device.type, enabled=False):
            A, B = self.lora_A.to(dtype), self.lora_B.to(dtype)
            weight = self.weight.detach() + self.product(A, B)
            if self.term is not None:
                U, V = self.term
                weight = weight + self.product(V.to(dtype), U.to(dtype))
        return weight

    def _each(self) -> list[tuple[int | None, Tensor]]:
        """(expert, its part of W): a merge holds one expert's in fp32 at a time."""
        if self.experts is None:
            return [(None, self.weight)]
        return list(enumerate(self.weight))

    @torch.no_grad()
    def check_merge(self) -> None:
        if self.merged:
            return
        for expert, part in self._each():
            delta = self.delta(expert)
            where = "" if expert is None else f" of expert {expert}"
            if not torch.isfinite(delta).all():
                raise ValueError(
                    f"the LoRA factors{where} hold NaN or infinity, or their product does: nothing "
                    "was merged; load finite factors first"
                )
            if not torch.isfinite((part.to(delta.dtype) + delta).to(part.dtype)).all():
                raise ValueError(
                    f"the merged weight{where} is not finite in {part.dtype}: nothing was merged; "
                    "check the base and the factors, or load the base in a wider dtype"
                )

    @torch.no_grad()
    def merge(self, keep_base: bool = True, requantise: bool = False) -> float:
        if self.merged:
            return 0.0
        self.check_merge()
        self._kept = self.weight.detach().clone() if keep_base else None
        size = lost = 0.0
        for expert, part in self._each():
            delta = self.delta(expert)
            if not delta.any():
                continue  # every bit stays, the sign of a zero too
            exact = part.to(delta.dtype) + delta
            part.copy_(exact)
            size += delta.square().sum().item()
            lost += (part.to(delta.dtype) - exact).square().sum().item()
        self._merged = True
        return (lost / size) ** 0.5 if size > 0 else 0.0

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.merged:
            self.weight.copy_(self.base_weight())
            self._kept, self._merged = None, False

    def base_weight(self) -> Tensor:
        """W before a merge. Raises RuntimeError where that is gone."""
        if not self.merged:
            return self.weight
        if self._kept is None:
            raise RuntimeError(
                "this parameter was merged with keep_base=False, so its base is gone: merge with "
                "keep_base=True, or load the base again"
            )
        return self._kept

    @property
    def general(self) -> str | None:
        """Why the owner makes W + Δ; None where it routes tokens by expert."""
        return getattr(self.owner, "general", "it is in no model")

    @property
    def routed(self) -> bool:
        return self.general is None

    def explained(self) -> str:
        """How the owner computes with it, in words."""
        why = self.general
        return "routed by expert" if why is None else f"W + Δ made in every forward: {why}"

    def require_base(self) -> None:
        self.base_weight()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoLoRAParameter:
        super()._apply(fn, recurse)
        if self._kept is not None:
            self._kept = fn(self._kept)
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.parameter_name}: in_features={self.in_features}, "
            f"out_features={self.out_features}, experts={self.experts}, rank={self.rank}, "
            f"alpha={self.alpha}, phase={self.phase}, merged={self.merged}"
        )


def part_name(parameter: str) -> str:
    """What the part of an owner is called that adapts its `parameter`."""
    return f"lora_{parameter}"


def _checked(owner: nn.Module, name: str) -> nn.Parameter:
    """The parameter; raises ValueError for one that no factors fit on."""
    weight = owner._parameters[name]
    assert weight is not None
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):
        raise ValueError(
            f"it is quantised ({str(weight.dtype).removeprefix('torch.')}), and factors need a "
            "dense one: load the base dense, or adapt its linears alone"
        )
    if weight.ndim not in (2, 3):
        raise ValueError(
            f"it has {weight.ndim} dimensions ({list(weight.shape)}): expected a matrix, or a "
            "stack of them [experts, out, in]"
        )
    if getattr(owner, "_is_expert_parallel", False):
        raise ValueError("its experts are spread over processes (expert parallelism)")
    return weight
