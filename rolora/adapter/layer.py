"""RoLoRALinear: a frozen linear with a LoRA path of which one factor, both or none trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.nn import functional as F

from rolora.adapter import starts, transformed
from rolora.adapter.adapted import Adapted
from rolora.adapter.base import Base, Held, at_rest
from rolora.adapter.linears import base_of, carry_hooks
from rolora_kernels import lora_linear
from rolora_kernels.repeated import RepeatedCall
from rolora_kernels.weights import FrozenWeight, dense, frozen_linear


class RoLoRALinear(Adapted):
    """`y = x Wᵀ + bias + scaling · (drop(x) Aᵀ) Bᵀ` with W and bias frozen.

    Attributes:
        weight: the base's own parameter, under its own name: `[out, in]`, or `[in, out]` where it
            came from GPT-2's Conv1D (`fan_in_fan_out` is True then).
        lora_A: fp32 `[rank, in]`; lora_B: fp32 `[out, rank]`, zero at the start so that step 0
            equals the base.
        scaling: `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA (Kalajdzievski 2023).
        quantised: None, or "nf4" or "int8": how bitsandbytes stores the weight. It is dequantised
            for each matmul, in backward again, and never kept dense.
        enabled: False runs the base alone, on a merged layer too where merge kept it.
        base: how the weight is stored; call: what a federation sets around a call, by `set_call`;
            group: the siblings that it is computed with, by `join`.

    `requires_grad` of the factors is the only record of the phase. `set_phase` sets it.

        layer = RoLoRALinear.from_linear(nn.Linear(512, 512), rank=8, alpha=16)
        layer.set_phase("B")
    """

    def __init__(
        self,
        base: Base,
        held: Held,
        bias: nn.Parameter | None,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str = "kaiming",
        generator: torch.Generator | None = None,
    ):
        out_features, in_features = base.weight(held).shape
        starts.check(init, rank, alpha, dropout, (out_features, in_features))
        super().__init__(rank, alpha, dropout, rslora)
        self.base, self.out_features, self.in_features = base, out_features, in_features
        self._call = RepeatedCall()
        if held.scale is not None:
            self.register_buffer("SCB", held.scale)  # bitsandbytes' name for the rows' scales
        self.weight = held.weight.requires_grad_(False)
        self.bias = None if bias is None else bias.requires_grad_(False)
        self._make_factors(held.weight.device)
        self.reset_factors(init, generator)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str = "kaiming",
        generator: torch.Generator | None = None,
    ) -> RoLoRALinear:
        """Wraps an `nn.Linear`, a Hugging Face `Conv1D` or bitsandbytes' `Linear4bit` and
        `Linear8bitLt`; its parameters are taken over, not copied.

        Raises TypeError for anything else, subclasses with a forward of their own included.
        """
        base, held = base_of(linear)
        layer = cls(
            base,
            held,
            cast(nn.Parameter | None, linear.bias),
            rank,
            alpha,
            dropout=dropout,
            rslora=rslora,
            init=init,
            generator=generator,
        )
        carry_hooks(linear, layer)
        return layer.train(linear.training)

    @torch.no_grad()
    def reset_factors(
        self, init: str = "kaiming", generator: torch.Generator | None = None
    ) -> None:
        """B = 0 and a fresh A.

        "pissa", "olora": factors of the weight itself; what they make of x is taken off again by
        the term, so that W itself stays as it is and step 0 equals the base. Saved adapters have
        twice the rank, as PEFT's converted ones do.
        """
        self.lora_B.zero_()
        if self.lora_A.is_meta:
            return
        if init not in starts.OF_THE_WEIGHT:
            self.lora_A.copy_(starts.drawn(init, self.rank, self.in_features, generator))
            return
        weight = dense(self.oriented_weight(), torch.float32).detach()
        A, B = starts.of_weight(init, weight, self.rank, self.scaling)
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        term = -self.lora_B.detach().clone(), self.lora_A.detach().clone()
        self.set_call(replace(self.call, term=term))

    @property
    def merged(self) -> bool:
        return self.base.merged

    @property
    def quantised(self) -> str | None:
        return self.base.kind

    @property
    def fan_in_fan_out(self) -> bool:
        return self.base.transposed

    @property
    def held(self) -> Held:
        """The base's tensors."""
        return Held(at_rest(self.weight), self._buffers.get("SCB"))

    @property
    def resting_bias(self) -> Tensor | None:
        bias = self.bias
        return None if bias is None else at_rest(bias)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if "_call" in self.__dict__:
            self._forget_calls()

    def _forget_calls(self) -> None:
        """What was settled for this layer's tensors says nothing of others."""
        self._call.forget()
        if self.group is not None:
            self.group.call.forget()

    def _hold(self, held: Held) -> None:
        self.weight = held.weight
        if "SCB" in self._buffers:
            self.SCB = held.scale

    def oriented_weight(self) -> Tensor | FrozenWeight:
        """The base weight as `[out, in]`; a view."""
        return self.base.weight(self.held)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """scaling · (B A + U V), `[out, in]`, in fp64 for a base in fp64 and in fp32 for others."""
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        product = self.whole_B.to(dtype) @ self.lora_A.to(dtype)
        if self.term is not None:
            product += self.term[0].to(dtype) @ self.term[1].to(dtype)
        return product.mul_(self.scaling)

    @torch.no_grad()
    def check_merge(self) -> None:
        """Raises ValueError where merge would put values into the weight that are not finite."""
        if not self.merged:
            self.base.sum(self.held, self.delta())

    @torch.no_grad()
    def merge(self, keep_base: bool = True, requantise: bool = False) -> float:
        """Adds the LoRA path to the weight, rounding once, and gives what that rounding lost:
        ‖stored − (W + Δ)‖ / ‖Δ‖ (0 for Δ = 0).

        The base weight is kept beside it, so that unmerge is exact, unless `keep_base` is False. A
        quantised base becomes dense, in the dtype that it was quantised from (fp32 for int8), or is
        quantised again with `requantise`, which loses more. Δ = 0 leaves every bit of a dense base.

        Raises ValueError where the result would not be finite; nothing has changed then.
        """
        if self.merged:
            return 0.0
        held, lost = self.base.add(self.held, self.delta(), keep_base, requantise)
        self._hold(held)
        return lost

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the base weight bit for bit."""
        if self.merged:
            self._hold(self.base.restore(self.held))

    def require_base(self) -> None:
        """Raises RuntimeError where the base alone can no longer be computed."""
        if self.merged:
            self.base.kept()

    def operands(self) -> tuple[Tensor | FrozenWeight, Tensor, Tensor, Tensor | None]:
        """(W `[out, in]`, A, B, bias) of a call. Read where nn.Module keeps them: its look-up by
        name takes as long as a small product.
        """
        own: dict[str, Any] = self._parameters
        try:
            weight, A, B, bias = own["weight"], own["lora_A"], own["lora_B"], own["bias"]
            span = own["lora_span"]
        except KeyError:  # a wrapper or a parametrisation has put something in their place
            return self.oriented_weight(), *self.factors(), self.resting_bias
        if span is not None or self.call.clients is not None:
            A, B = self.factors()
        if not self.base.as_stored or weight.requires_grad:
            weight = self.oriented_weight()
        if bias is not None and bias.requires_grad:
            bias = at_rest(bias)
        return weight, A, B, bias

    def call_state(self) -> tuple[bool, bool, int, float]:
        """What must not change between two calls for what the first one made to stay valid."""
        own: dict[str, Any] = self._parameters
        if self.call.clients is None and "lora_A" in own and "lora_B" in own:
            A, B = own["lora_A"], own["lora_B"]
        else:
            A, B = self.factors()
        return A.requires_grad, B.requires_grad, id(self.call.clients), self.active_dropout

    def forward(self, x: Tensor) -> Tensor:
        call = self.call
        if call.clients is not None:
            call.check(x)
        if not torch.compiler.is_compiling() and _functorch.peek_interpreter_stack() is not None:
            return transformed.forward(self, x)
        if self.base.merged or not self.enabled:
            return self._base_alone(x)
        y = self.forward_alone(x) if self.group is None else self.group.forward(self, x)
        if call.term is None:
            return y
        U, V = (factor.to(x.dtype) for factor in call.term)
        return y + self.scaling * F.linear(F.linear(x, V), U)

    def _base_alone(self, x: Tensor) -> Tensor:
        """What the frozen weight computes, or the one that the path is merged into."""
        if self.merged and not self.enabled:
            return frozen_linear(x, self.base.weight(self.base.kept()), self.resting_bias)
        return self.base.linear(self.held, x, self.resting_bias)

    def forward_alone(self, x: Tensor) -> Tensor:
        """The layer's own call, with no sibling taken along."""
        weight, A, B, bias = self.operands()
        p = self.dropout if self.training else 0.0
        if p == 0.0 and not torch.compiler.is_compiling():
            return self._call.one(x, weight, A, B, self.scaling, bias)
        key = self.draw_dropout_key(x.device) if p > 0.0 else None
        return lora_linear(x, weight, A, B, self.scaling, bias, dropout_p=p, dropout_key=key)

    def draw_dropout_key(self, device: torch.device) -> Tensor:
        """The key that was set, or one from torch's generator, which checkpointing restores for its
        second forward.
        """
        if self.call.masks is not None:
            return self.call.masks.on(device)
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self.base.state(self.held).items():
            destination[prefix + name] = value if keep_vars else value.detach()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, "
            f"rank={self.rank}, alpha={self.alpha}, phase={self.phase}, merged={self.merged}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoLoRALinear:
        super()._apply(fn, recurse)
        self.base.move(fn)
        self._forget_calls()
        return self
