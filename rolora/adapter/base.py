"""The frozen half of a layer: how its weight is stored, computed with, merged into and saved.

The tensors lie in the layer, under the names that they had before, and are handed in as `held`;
what a merge replaced lies here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rolora.adapter.quantised import dense_dtype, requantised, restored, stored, view
from rolora_kernels.weights import FrozenWeight, dense, frozen_linear


class Held(NamedTuple):
    """What a layer holds of its base: the weight, and its rows' scales where they are int8."""

    weight: Tensor
    scale: Tensor | None = None


def at_rest(tensor: Tensor) -> Tensor:
    """A frozen parameter as FSDP hands it to a forward, without the grad that its view only has
    because others train in the same flat parameter.
    """
    if tensor.requires_grad and getattr(tensor._base, "_is_flat_param", False):
        return tensor.detach()
    return tensor


class Base:
    """A frozen weight in some storage; `DenseBase` and `QuantisedBase` say which.

    Attributes:
        kind: None, or "nf4" or "int8".
        transposed: whether the weight is stored as `[in, out]`.
        as_stored: whether what is stored is the weight itself, `[out, in]`.
        merged: whether an adapter has been added to it.
    """

    kind: str | None = None
    transposed = False
    as_stored = False

    def __init__(self) -> None:
        self.merged = False
        self._kept: Held | None = None

    def weight(self, held: Held) -> Tensor | FrozenWeight:
        """The weight as `[out, in]`; a view."""
        raise NotImplementedError

    def linear(self, held: Held, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x Wᵀ + bias`."""
        return frozen_linear(x, self.weight(held), bias)

    def sum(self, held: Held, delta: Tensor) -> Tensor:
        """W + delta `[out, in]` in delta's dtype. Raises ValueError where it is not finite, there
        or in the dtype that is stored.
        """
        if not torch.isfinite(delta).all():
            raise ValueError(
                "the LoRA factors hold NaN or infinity, or their product does: nothing was "
                "merged; load finite factors first"
            )
        return dense(self.weight(held), delta.dtype) + delta

    def add(self, held: Held, delta: Tensor, keep: bool, requantise: bool) -> tuple[Held, float]:
        """(what the layer holds from now on, what rounding lost: ‖stored − (W + Δ)‖ / ‖Δ‖).

        What it held is kept for `restore` if `keep`. Raises as `sum` does; nothing has changed
        then.
        """
        exact = self.sum(held, delta)
        kept = self._copy(held) if keep else None
        new = self._put(held, exact, delta, requantise)
        self._kept, self.merged = kept, True
        size = torch.linalg.matrix_norm(delta)
        lost = torch.linalg.matrix_norm(self._stored(new).to(exact.dtype) - exact)
        return new, (lost / size).item() if size > 0 else 0.0

    def _copy(self, held: Held) -> Held:
        """What is kept of `held`; itself where a merge puts something else in its place."""
        return held

    def _put(self, held: Held, exact: Tensor, delta: Tensor, requantise: bool) -> Held:
        """What holds `exact` from now on."""
        raise NotImplementedError

    def _stored(self, held: Held) -> Tensor:
        weight = self.weight(held)
        return weight if isinstance(weight, Tensor) else weight.dequantise(torch.float32)

    def kept(self) -> Held:
        """What a merged layer held before. Raises RuntimeError where that is gone."""
        if self._kept is None:
            raise RuntimeError(
                "this layer was merged with keep_base=False, so its base weight is gone: merge "
                "with keep_base=True, or load the base again"
            )
        return self._kept

    def restore(self, held: Held) -> Held:
        """What the layer holds from now on: what it held before the merge, bit for bit."""
        before = self._restored(held, self.kept())
        self._kept, self.merged = None, False
        return before

    def _restored(self, held: Held, kept: Held) -> Held:
        return kept

    def state(self, held: Held) -> dict[str, Tensor]:
        """What a state dict has beside the weight and the scales."""
        return {}

    def plain(self, held: Held, bias: Tensor | None) -> nn.Module:
        """A module without an adapter, on these very tensors."""
        out_features, in_features = self.weight(held).shape
        made = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
        return _hold(made, held.weight, bias)

    def move(self, convert: Callable[[Tensor], Tensor]) -> None:
        """What `nn.Module._apply` does to parameters, for what a merge replaced."""


class DenseBase(Base):
    """A plain parameter `[out, in]`, or `[in, out]` of GPT-2's Conv1D."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.transposed, self.as_stored = transposed, not transposed

    def weight(self, held: Held) -> Tensor:
        return held.weight.t() if self.transposed else held.weight

    def sum(self, held: Held, delta: Tensor) -> Tensor:
        exact = super().sum(held, delta)
        if not torch.isfinite(exact.to(held.weight.dtype)).all():
            raise ValueError(
                f"the merged weight is not finite in {held.weight.dtype}: nothing was merged; "
                "check the base and the factors, or load the base in a wider dtype"
            )
        return exact

    def _copy(self, held: Held) -> Held:
        return Held(held.weight.detach().clone())

    def _put(self, held: Held, exact: Tensor, delta: Tensor, requantise: bool) -> Held:
        if delta.any():  # or every bit stays, the sign of a zero too
            held.weight.copy_(exact.t() if self.transposed else exact)
        return held

    def _restored(self, held: Held, kept: Held) -> Held:
        held.weight.copy_(kept.weight)
        return held

    def plain(self, held: Held, bias: Tensor | None) -> nn.Module:
        if not self.transposed:
            return super().plain(held, bias)
        from transformers.pytorch_utils import Conv1D

        in_features, out_features = held.weight.shape
        with torch.device("meta"):
            made = Conv1D(out_features, in_features)
        return _hold(made, held.weight, bias)

    def move(self, convert: Callable[[Tensor], Tensor]) -> None:
        if self._kept is not None:
            self._kept = Held(convert(self._kept.weight))


def _hold(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """`module` with these very parameters."""
    module.register_parameter("weight", cast(nn.Parameter, weight))
    module.register_parameter("bias", cast(nn.Parameter | None, bias))
    return module


class QuantisedBase(Base):
    """Storage of bitsandbytes, dequantised for each matmul and never kept dense. Once merged it is
    dense, in the dtype that it was quantised from (fp32 for int8), unless it is quantised again.
    """

    kind: str

    def __init__(self, kind: str, module: nn.Module) -> None:
        super().__init__()
        self.kind, self.module = kind, module  # the module that `plain` gives back

    def weight(self, held: Held) -> Tensor | FrozenWeight:
        return held.weight if held.weight.is_floating_point() else view(*held)

    def linear(self, held: Held, x: Tensor, bias: Tensor | None) -> Tensor:
        if not held.weight.is_floating_point():
            return super().linear(held, x, bias)
        return F.linear(x, held.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def _put(self, held: Held, exact: Tensor, delta: Tensor, requantise: bool) -> Held:
        if requantise:
            return Held(*requantised(exact, held.weight, self.kind))
        exact = exact.to(dense_dtype(held.weight, self.kind))
        return Held(nn.Parameter(exact, requires_grad=False))

    def state(self, held: Held) -> dict[str, Tensor]:
        return {} if held.weight.is_floating_point() else stored(held.weight, self.kind)

    def plain(self, held: Held, bias: Tensor | None) -> nn.Module:
        if held.weight.is_floating_point():
            return super().plain(held, bias)
        return restored(self.module, held.weight, held.scale)

    def move(self, convert: Callable[[Tensor], Tensor]) -> None:
        if self._kept is None:
            return
        weight, scale = self._kept
        weight.data = convert(weight)  # the parameter stays: bitsandbytes' state hangs on it
        self._kept = Held(weight, None if scale is None else convert(scale))
