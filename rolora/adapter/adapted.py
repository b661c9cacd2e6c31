"""What every adapted layer has, whatever it adapts: two factors of which one, both or none trains,
and a frozen weight that they can be merged into.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from rolora.adapter.call import CallState
from rolora.adapter.group import SharedInputGroup
from rolora_kernels.operands import PHASES


class Adapted(nn.Module):
    """A LoRA path over a frozen weight: `RoLoRALinear` and `RoLoRAParameter` say which.

    Attributes:
        lora_A: fp32 `[rank, in]`; lora_B: fp32 `[out, rank]`. Of a weight of E experts
            `[E, rank, in]` and `[E, out, rank]`.
        lora_span: None, or fp32 `[out, rank]`, which stays: B is `lora_span · lora_B` then, and
            lora_B `[rank, rank]` (`narrow`). `whole_B` is B either way.
        scaling: `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA (Kalajdzievski 2023).
        enabled: False runs the base alone, on a merged layer too where merge kept it.
        call: what a federation sets around a call, by `set_call`; group: the siblings that it is
            computed with, by `join`.

    `requires_grad` of the factors is the only record of the phase. `set_phase` sets it.
    """

    in_features: int
    out_features: int

    def __init__(self, rank: int, alpha: float, dropout: float, rslora: bool) -> None:
        super().__init__()
        self.rank, self.alpha, self.rslora, self.dropout = rank, alpha, rslora, dropout
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.enabled = True
        self.call = CallState()
        self.group: SharedInputGroup | None = None
        self.register_parameter("lora_span", None)

    def _make_factors(self, device: torch.device, lead: tuple[int, ...] = ()) -> None:
        """Empty ones, with the axes `lead` before their own two."""
        empty = partial(torch.empty, dtype=torch.float32, device=device)
        self.lora_A = nn.Parameter(empty(*lead, self.rank, self.in_features))
        self.lora_B = nn.Parameter(empty(*lead, self.out_features, self.rank))

    def narrow(self, A: Tensor, span: Tensor) -> None:
        """Leaves a `[rank, rank]` matrix, zero, in the place of B, between A `[rank, in]` and
        `span` `[out, rank]`: the path is `span · lora_B · A`.
        """
        with torch.no_grad():
            self.lora_A.copy_(A)
        self.lora_span = nn.Parameter(span.to(self.lora_B), requires_grad=False)
        core = self.lora_B.new_zeros(self.rank, self.rank)
        self.lora_B = nn.Parameter(core, requires_grad=self.lora_B.requires_grad)

    @property
    def whole_B(self) -> Tensor:
        """B `[out, rank]`, whatever trains of it."""
        return self._spanned(self.lora_B)

    def _spanned(self, B: Tensor) -> Tensor:
        return B if self.lora_span is None else self.lora_span @ B

    def set_phase(self, phase: str | None) -> None:
        """Says which factor trains: "A", "B", "BOTH", or None for neither; the frozen one loses its
        grad.
        """
        if phase is not None and phase not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)} or None, got {phase!r}")
        for name, factor in (("A", self.lora_A), ("B", self.lora_B)):
            factor.requires_grad_(phase in (name, "BOTH"))
            if not factor.requires_grad:
                factor.grad = None  # a zero gradient would let momentum or weight decay move it

    @property
    def phase(self) -> str | None:
        """The phase that `requires_grad` amounts to."""
        return {(1, 0): "A", (0, 1): "B", (1, 1): "BOTH"}.get(
            (self.lora_A.requires_grad, self.lora_B.requires_grad)
        )

    def set_call(self, call: CallState) -> None:
        """Sets what a federation wants of the calls to come: `replace(layer.call, masks=…)`."""
        self.call = call

    def join(self, group: SharedInputGroup | None) -> None:
        """Computes with siblings from now on; None computes alone."""
        self.group = group

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of a call: the layer's own, or a cohort's where it has one a client."""
        own = self.call.clients
        if own is None:
            return self.lora_A, self.whole_B
        A = self.lora_A if own.A is None else own.A
        return A, self._spanned(self.lora_B if own.B is None else own.B)

    @property
    def term(self) -> tuple[Tensor, Tensor] | None:
        """The frozen low-rank addition to the path; see CallState."""
        return self.call.term

    @property
    def active_dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def module_path(self, path: str) -> str:
        """Where the factors lie in a state dict, of a layer that adapts `path`."""
        return path

    @property
    def quantised(self) -> str | None:
        """None, or "nf4" or "int8": how bitsandbytes stores the weight."""
        return None

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the weight is GPT-2's, stored as `[in, out]`."""
        return False

    @property
    def merged(self) -> bool:
        raise NotImplementedError

    def check_merge(self) -> None:
        """Raises ValueError where merge would put values into the weight that are not finite."""
        raise NotImplementedError

    def merge(self, keep_base: bool = True, requantise: bool = False) -> float:
        """Adds the LoRA path to the weight, rounding once, and gives what that rounding lost:
        ‖stored − (W + Δ)‖ / ‖Δ‖ (0 for Δ = 0).
        """
        raise NotImplementedError

    def unmerge(self) -> None:
        """Restores the base weight bit for bit."""
        raise NotImplementedError

    def require_base(self) -> None:
        """Raises RuntimeError where the base alone can no longer be computed."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapted:
        super()._apply(fn, recurse)
        if self.term is not None:
            self.call = replace(self.call, term=(fn(self.term[0]), fn(self.term[1])))
        return self
