"""Which modules can be a layer's base, and what of them stays with the layer."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from rolora.adapter.base import Base, DenseBase, Held, QuantisedBase
from rolora.adapter.frozen import FrozenLinear
from rolora.adapter.quantised import kind_of, take

_ROUNDINGS = 4  # of the weight's dtype, by which two ways to compute one linear may differ
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


def base_of(linear: nn.Module) -> tuple[Base, Held]:
    """(how the weight of `linear` is stored, its tensors), nothing copied.

    Raises TypeError for what is no linear, and for one whose own forward an adapter would undo.
    """
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
    kind = kind_of(linear)
    if kind is not None:
        return QuantisedBase(kind, linear), Held(*take(linear, kind))
    if is_conv1d(linear):
        return DenseBase(transposed=True), Held(cast(nn.Parameter, linear.weight))
    if isinstance(linear, nn.Linear) and _computes_only_that(linear):
        return DenseBase(), Held(linear.weight)
    raise TypeError(
        f"cannot adapt a {type(linear).__module__}.{type(linear).__qualname__}: give an "
        "nn.Linear, a transformers Conv1D, or bitsandbytes' Linear4bit or Linear8bitLt"
    )


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is Hugging Face's Conv1D (told by name, so that the layer needs no
    transformers).
    """
    return any(
        c.__name__ == "Conv1D" and c.__module__.startswith("transformers.")
        for c in type(module).__mro__
    )


def carry_hooks(source: nn.Module, target: nn.Module) -> None:
    """Gives `target` the hooks of `source`, in the same dictionaries: a handle still removes."""
    for name in _HOOKS:
        setattr(target, name, getattr(source, name))


def _computes_only_that(linear: nn.Linear) -> bool:
    """No forward of its own, or one that gives what `nn.Linear`'s gives (Falcon's), on random
    inputs, to the rounding of a matmul and a sum. On the meta device there is nothing to ask.
    """
    if type(linear).forward in (nn.Linear.forward, FrozenLinear.forward):
        return True
    weight, bias = linear.weight, linear.bias
    if weight.is_meta:
        return True
    draw = torch.Generator().manual_seed(0)
    for shape in ((3, linear.in_features), (2, 3, linear.in_features)):
        x = torch.randn(shape, generator=draw).to(weight)
        wanted = nn.functional.linear(x, weight, bias)
        for training in (True, False):
            with torch.no_grad():
                found = _in_mode(linear, training, x)
            if not isinstance(found, Tensor) or found.shape != wanted.shape:
                return False
            rounding = _ROUNDINGS * torch.finfo(weight.dtype).eps * wanted.abs().max()
            if not (found - wanted).abs().max() <= rounding:
                return False
    return True


def _in_mode(linear: nn.Linear, training: bool, x: Tensor) -> Any:
    """What the module's own forward gives, without hooks; its mode stays as it was."""
    before = linear.training
    linear.training = training
    try:
        return linear.forward(x)
    finally:
        linear.training = before


def _forward_replaced(linear: nn.Module) -> bool:
    """Whether the instance has a forward that an adapter would undo. That of accelerate's
    device_map only moves inputs to where they are already, unless weights are offloaded.
    """
    hook: Any = getattr(linear, "_hf_hook", None)
    harmless = type(hook).__name__ == "AlignDevicesHook" and not hook.offload
    return "forward" in vars(linear) and not harmless
