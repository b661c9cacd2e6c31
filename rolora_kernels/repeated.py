"""`lora_linear` and `grouped_lora_linear` for layers, which are called again and again with the
same tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rolora_kernels import dispatch, plain, settled
from rolora_kernels.linear import grouped_lora_linear
from rolora_kernels.settled import Kind
from rolora_kernels.weights import FrozenWeight


class RepeatedCall:
    """The calls of one layer, or of one group, without dropout. The kind of the last one holds for
    the next unless something has changed that it follows from; looking for that takes a third of
    what looking the kind up takes (settled.kind_of). `forget` when a layer gets another tensor: the
    sizes of W, A and B are not looked at, nor whether a transform of torch.func is active, which
    the caller knows.
    """

    __slots__ = ("_kind", "_trains")

    def __init__(self) -> None:
        self._kind: Kind | None = None
        self._trains: list[tuple[bool, bool]] = []

    def one(
        self,
        x: Tensor,
        W: Tensor | FrozenWeight,
        A: Tensor,
        B: Tensor,
        scaling: float,
        bias: Tensor | None,
    ) -> Tensor:
        """As linear.lora_linear."""
        kind = self._known(x, (W,), (A,), (B,), (bias,))
        if kind is None:
            return grouped_lora_linear(x, (W,), (A,), (B,), (scaling,), (bias,))[0]
        return plain.apply(x, W, A, B, bias, scaling, kind)

    def group(
        self,
        x: Tensor,
        weights: Sequence[Tensor | FrozenWeight],
        lora_As: Sequence[Tensor],
        lora_Bs: Sequence[Tensor],
        scalings: tuple[float, ...],
        biases: Sequence[Tensor | None],
    ) -> tuple[Tensor, ...]:
        """As linear.grouped_lora_linear."""
        kind = self._known(x, weights, lora_As, lora_Bs, biases)
        if kind is None:
            return grouped_lora_linear(x, weights, lora_As, lora_Bs, scalings, biases)
        return plain.apply_group(x, kind, scalings, *weights, *lora_As, *lora_Bs, *biases)

    def forget(self) -> None:
        self._kind = None

    def _known(self, x: Tensor, weights, lora_As, lora_Bs, biases) -> Kind | None:
        """The kind of a call, which has been counted; None for one that is not plain."""
        kind = self._kind
        if kind is None or not self._holds(kind, x, weights, lora_As, lora_Bs, biases):
            self._kind, kind = None, settled.kind_of(x, weights, lora_As, lora_Bs, biases, False)
            if not kind.plain:
                return None
            pairs = zip(lora_As, lora_Bs, strict=True)
            self._kind, self._trains = kind, [(A.requires_grad, B.requires_grad) for A, B in pairs]
        kind.choice = dispatch.count(kind.key, kind.choice)
        return kind

    def _holds(self, kind: Kind, x: Tensor, weights, lora_As, lora_Bs, biases) -> bool:
        dtype = kind.dtype
        if x.dtype is not dtype or x.shape != kind.x_shape or x.device != kind.device:
            return False
        if settled.state(kind.device.type) != kind.state or torch.compiler.is_compiling():
            return False
        each = zip(weights, lora_As, lora_Bs, biases, self._trains, strict=True)
        for W, A, B, bias, trains in each:
            if A.ndim != 2 or B.ndim != 2:  # factors of clients, in the place of the layer's own
                return False
            if (A.requires_grad, B.requires_grad) != trains:
                return False
            if not isinstance(W, Tensor) or W.dtype is not dtype or W.requires_grad:
                return False
            if bias is not None and bias.requires_grad:
                return False
        return True

    def __reduce__(self):
        return RepeatedCall, ()  # a copy of a layer begins anew
