"""RoLoRALinear: a frozen linear with a LoRA path of which one factor, both or none trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.nn import functional as F

from rolora.adapter.frozen import FrozenLinear
from rolora.adapter.group import SharedInputGroup
from rolora.adapter.quantised import kind_of, requantised, stored, take, view
from rolora_kernels import lora_linear
from rolora_kernels.weights import FrozenWeight, dense, frozen_linear

PHASES = ("A", "B", "BOTH")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
INITS = ("kaiming", "gaussian", "orthogonal", "pissa")


class MixesExamples(ValueError):
    """A model hands an adapted layer something else than the examples of a cohort, one after
    another.
    """


@dataclass(frozen=True)
class ClientFactors:
    """What C clients that are trained together do not have in common: A fp32 `[C, r, in]`, B fp32
    `[C, out, r]`, or None where the layer's own factor is everybody's. Inputs are `[batch, …]`, the
    same number of examples for each client, client by client.
    """

    A: Tensor | None
    B: Tensor | None
    batch: int


class RoLoRALinear(nn.Module):
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
        term: None, or (U `[out, R]`, V `[R, in]`): a frozen low-rank addition to the path, `scaling
            · U V` in the product, which some federated methods grow (FLoRA, FedEx). No dropout acts
            on it.
        clients: None, or the `ClientFactors` of a cohort that is trained together; they stand in
            for the layer's own.

    `requires_grad` of the factors is the only record of the phase. `set_phase` sets it.

        layer = RoLoRALinear.from_linear(nn.Linear(512, 512), rank=8, alpha=16)
        layer.set_phase("B")
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        fan_in_fan_out: bool = False,
        init: str = "kaiming",
        generator: torch.Generator | None = None,
        quantised: str | None = None,
        scale: Tensor | None = None,
    ):
        super().__init__()
        self.quantised, self._original = quantised, ()
        if scale is not None:
            self.register_buffer("SCB", scale)  # int8: bitsandbytes' name for the rows' scales
        if quantised is not None:
            self.out_features, self.in_features = view(weight, scale).shape
        else:
            self.in_features, self.out_features = (
                weight.shape if fan_in_fan_out else reversed(weight.shape)
            )
        smaller = min(self.in_features, self.out_features)
        if rank < 1 or (init == "pissa" and rank > smaller):
            most = f"1 to {smaller}" if init == "pissa" else "1 or more"
            raise ValueError(
                f"rank {rank} does not fit a {self.out_features}x{self.in_features} linear: give "
                f"{most}"
            )
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must lie in [0, 1], got {dropout}")
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
        self.rank, self.alpha, self.rslora, self.dropout = rank, alpha, rslora, dropout
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.fan_in_fan_out = fan_in_fan_out
        self.enabled = True
        self.weight, self.bias = (
            weight.requires_grad_(False),
            bias if bias is None else bias.requires_grad_(False),
        )
        options = {"dtype": torch.float32, "device": weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, **options))
        self.dropout_key: Tensor | None = None
        self.clients: ClientFactors | None = None
        self.term: tuple[Tensor, Tensor] | None = None
        self.reset_factors(init, generator)
        self._group: SharedInputGroup | None = None
        self._base_weight: Tensor | None = None  # what unmerge restores
        self._merged = False

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
        quantised, weight, scale = kind_of(linear), getattr(linear, "weight", None), None
        if _forward_replaced(linear):
            raise TypeError(
                "its forward was replaced on the instance (by accelerate's offloading, or by "
                "hand), which an adapter would undo: put its own forward back first, or leave it "
                "out with exclude_modules"
            )
        if type(linear).__name__ == "NonDynamicallyQuantizableLinear":
            raise TypeError(
                "nn.MultiheadAttention reads the weight of its out_proj (a "
                "NonDynamicallyQuantizableLinear) and never calls it, so an adapter there would do "
                "nothing: leave it out with exclude_modules=['out_proj']"
            )
        if quantised is not None:
            transposed, (weight, scale) = False, take(linear, quantised)
        elif is_conv1d(linear):
            transposed = True
        elif isinstance(linear, nn.Linear) and _computes_only_that(linear):
            transposed = False
        else:
            raise TypeError(
                f"cannot adapt a {type(linear).__module__}.{type(linear).__qualname__}: give an "
                "nn.Linear, a "
                "transformers Conv1D, or bitsandbytes' Linear4bit or Linear8bitLt"
            )
        layer = cls(
            weight,
            linear.bias,
            rank,
            alpha,
            dropout=dropout,
            rslora=rslora,
            fan_in_fan_out=transposed,
            init=init,
            generator=generator,
            quantised=quantised,
            scale=scale,
        )
        layer._original = (linear,) if quantised is not None else ()  # in a tuple: not a submodule
        carry_hooks(linear, layer)
        return layer.train(linear.training)

    @torch.no_grad()
    def reset_factors(
        self, init: str = "kaiming", generator: torch.Generator | None = None
    ) -> None:
        """B = 0 and a fresh A, drawn in fp32 on the CPU so that every machine draws the same.

        "pissa" (Meng et al., NeurIPS 2024): the largest singular vectors of W, each factor with the
        root of the values, by a full SVD; what they make of x is taken off again by the term, so
        that W itself stays as it is and step 0 equals the base. Saved adapters have twice the rank,
        as PEFT's converted ones do.
        """
        self.lora_B.zero_()
        if self.lora_A.is_meta:
            return
        if init == "pissa":
            weight = self.oriented_weight()
            U, values, Vt = torch.linalg.svd(
                dense(weight, torch.float32).detach(), full_matrices=False
            )
            root = (values[: self.rank] / self.scaling).sqrt()
            (
                self.lora_A.copy_(root[:, None] * Vt[: self.rank]),
                self.lora_B.copy_(U[:, : self.rank] * root),
            )
            self.term = -self.lora_B.detach().clone(), self.lora_A.detach().clone()
            return
        A = torch.empty(self.rank, self.in_features)
        if init == "kaiming":  # a = sqrt(5), as in PEFT: uniform in ±1/sqrt(in)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        elif init == "gaussian":
            nn.init.normal_(A, std=1 / self.rank, generator=generator)
        else:
            nn.init.orthogonal_(A, generator=generator)
        self.lora_A.copy_(A)

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

    @property
    def merged(self) -> bool:
        return self._merged

    @property
    def scale(self) -> Tensor | None:
        """The rows' scales of an int8 base."""
        return getattr(self, "SCB", None)

    def oriented_weight(self) -> Tensor | FrozenWeight:
        """The base weight as `[out, in]`; a view."""
        if self.quantised is not None and not self.weight.is_floating_point():
            return view(self.weight, self.scale)
        return self.weight.t() if self.fan_in_fan_out else self.weight

    @torch.no_grad()
    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """scaling · (B A + U V), `[out, in]`, computed in `dtype`."""
        product = self.lora_B.to(dtype) @ self.lora_A.to(dtype)
        if self.term is not None:
            product += self.term[0].to(dtype) @ self.term[1].to(dtype)
        return product.mul_(self.scaling)

    @torch.no_grad()
    def check_merge(self) -> None:
        """Raises ValueError where merge would put values into the weight that are not finite."""
        if not self._merged:
            self._merge_parts()

    def _merge_parts(self) -> tuple[Tensor, Tensor]:
        """(delta, weight + delta), both `[out, in]`, in fp64 for an fp64 base and fp32 for others,
        checked to be finite in the dtype that is stored.
        """
        dense_base = self.quantised is None
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        delta, base = self.delta(wide), self.oriented_weight()
        exact = (base.to(wide) if dense_base else base.dequantise(wide)) + delta
        if not torch.isfinite(delta).all():
            raise ValueError(
                "the LoRA factors hold NaN or infinity, or their product does: nothing was "
                "merged; load finite factors first"
            )
        if dense_base and not torch.isfinite(exact.to(self.weight.dtype)).all():
            raise ValueError(
                f"the merged weight is not finite in {self.weight.dtype}: nothing was merged; "
                "check the base and the factors, or load the base in a wider dtype"
            )
        return delta, exact

    @torch.no_grad()
    def merge(self, keep_base: bool = True, requantise: bool = False) -> float:
        """Adds the LoRA path to the weight, rounding once, and gives what that rounding lost:
        ‖stored − (W + Δ)‖ / ‖Δ‖ (0 for Δ = 0).

        The base weight is kept beside it, so that unmerge is exact, unless `keep_base` is False. A
        quantised base becomes dense, in the dtype that it was quantised from (fp32 for int8), or is
        quantised again with `requantise`, which loses more. Δ = 0 leaves every bit of a dense base.

        Raises ValueError where the result would not be finite; nothing has changed then.
        """
        if self._merged:
            return 0.0
        delta, exact = self._merge_parts()
        size = torch.linalg.matrix_norm(delta)
        before = self.weight
        if self.quantised is None:
            base = before.detach().clone() if keep_base else None
            if delta.any():
                before.copy_(exact.t() if self.fan_in_fan_out else exact)
        else:
            base = (before, self.scale) if keep_base else None
            if requantise:
                self._hold(*requantised(exact, before, self.quantised))
            else:
                dtype = before.quant_state.dtype if self.quantised == "nf4" else torch.float32
                self._hold(nn.Parameter(exact.to(dtype), requires_grad=False), None)
        kept = self.oriented_weight()
        if not isinstance(kept, Tensor):
            kept = kept.dequantise(torch.float32)
        self._base_weight, self._merged = base, True
        lost = torch.linalg.matrix_norm(kept.to(exact.dtype) - exact)
        return (lost / size).item() if size > 0 else 0.0

    def _hold(self, weight: nn.Parameter, scale: Tensor | None) -> None:
        """Puts another storage in the base's place."""
        self.weight = weight
        if "SCB" in self._buffers:
            self.SCB = scale

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the base weight bit for bit."""
        if not self._merged:
            return
        if self._base_weight is None:
            raise RuntimeError(
                "this layer was merged with keep_base=False: its base weight is gone"
            )
        if self.quantised is None:
            self.weight.copy_(self._base_weight)
        else:
            self._hold(*self._base_weight)
        self._base_weight, self._merged = None, False

    def forward(self, x: Tensor) -> Tensor:
        if self.clients is not None and x.shape[0] != self.clients.batch:
            raise MixesExamples(
                f"a cohort of {self.clients.batch} examples is trained together, but an adapted "
                "layer was called with "
                f"{list(x.shape)}: this model reorders or mixes examples"
            )
        if not torch.compiler.is_compiling() and _functorch.peek_interpreter_stack() is not None:
            return self._forward_transformed(x)
        if self._merged and not self.enabled:
            return frozen_linear(x, self._kept_base(), self.bias)
        if self._merged or not self.enabled:
            if (
                self.quantised is not None and self.weight.is_floating_point()
            ):  # merged: dense in the dtype it was quantised from
                return F.linear(
                    x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
                )
            return frozen_linear(x, self.oriented_weight(), self.bias)
        y = self.forward_alone(x) if self._group is None else self._group.forward(self, x)
        if self.term is None:
            return y
        U, V = (factor.to(x.dtype) for factor in self.term)
        return y + self.scaling * F.linear(F.linear(x, V), U)

    def _forward_transformed(self, x: Tensor) -> Tensor:
        """The same numbers in PyTorch's own operations, which vmap, jvp and per-example gradients
        of torch.func can transform; the kernels' autograd rule is for plain backward alone.
        """
        if self.clients is not None or self.active_dropout > 0.0:
            raise RuntimeError(
                "torch.func was called on an adapted layer with dropout, or in a cohort trained "
                "together: call model.eval() or set dropout=0 first, outside a cohort"
            )
        base = self._kept_base() if self._merged and not self.enabled else self.oriented_weight()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, dense(base, x.dtype), bias)
        if self._merged or not self.enabled:
            return y
        paths = [(self.lora_B, self.lora_A)] + ([] if self.term is None else [self.term])
        for up, down in paths:
            y = y + self.scaling * F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
        return y

    def require_base(self) -> None:
        """Raises RuntimeError where the base alone can no longer be computed."""
        if self._merged and self._base_weight is None:
            raise RuntimeError(
                "this layer was merged with keep_base=False, so it cannot run without its adapter: "
                "merge with keep_base=True, or load the base again"
            )

    def _kept_base(self) -> Tensor | FrozenWeight:
        """The base `[out, in]` of a merged layer, as it was before."""
        self.require_base()
        if self.quantised is not None:
            return view(*self._base_weight)
        return self._base_weight.t() if self.fan_in_fan_out else self._base_weight

    def forward_alone(self, x: Tensor) -> Tensor:
        """The layer's own call, with no sibling taken along."""
        p = self.active_dropout
        key = self.draw_dropout_key(x.device) if p > 0.0 else None
        return lora_linear(
            x,
            self.oriented_weight(),
            *self.factors(),
            self.scaling,
            self.bias,
            dropout_p=p,
            dropout_key=key,
        )

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of a call: the layer's own, or a cohort's where it has one a client."""
        if self.clients is None:
            return self.lora_A, self.lora_B
        return (self.lora_A if self.clients.A is None else self.clients.A), (
            self.lora_B if self.clients.B is None else self.clients.B
        )

    @property
    def active_dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def draw_dropout_key(self, device: torch.device) -> Tensor:
        """The key that was set, or one from torch's generator, which checkpointing restores for its
        second forward.
        """
        if self.dropout_key is not None:
            return self.dropout_key.to(device)
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.quantised is not None and not self.weight.is_floating_point():
            for name, value in stored(self.weight, self.quantised).items():
                destination[prefix + name] = value if keep_vars else value.detach()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, "
            f"rank={self.rank}, alpha={self.alpha}, phase={self.phase}, merged={self._merged}"
        )

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.quantised is None and self._base_weight is not None:
            self._base_weight = fn(self._base_weight)
        if self.term is not None:
            self.term = fn(self.term[0]), fn(self.term[1])
        return self


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is Hugging Face's Conv1D (told by name, so that the layer needs no
    transformers).
    """
    return any(
        c.__name__ == "Conv1D" and c.__module__.startswith("transformers.")
        for c in type(module).__mro__
    )


def _computes_only_that(linear: nn.Linear) -> bool:
    """No forward of its own."""
    return type(linear).forward in (nn.Linear.forward, FrozenLinear.forward)


def _forward_replaced(linear: nn.Module) -> bool:
    """Whether the instance has a forward that an adapter would undo. That of accelerate's
    device_map only moves inputs to where they are already, unless weights are offloaded.
    """
    hook = getattr(linear, "_hf_hook", None)
    harmless = type(hook).__name__ == "AlignDevicesHook" and not hook.offload
    return "forward" in vars(linear) and not harmless


def carry_hooks(source: nn.Module, target: nn.Module) -> None:
    """Gives `target` the hooks of `source`, in the same dictionaries: a handle still removes."""
    for name in _HOOKS:
        setattr(target, name, getattr(source, name))
