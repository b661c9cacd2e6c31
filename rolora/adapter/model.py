"""An adapted model as a whole: its layers and heads, its phase, merging, and what computes how."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from rolora.adapter.adapted import Adapted
from rolora.adapter.experts import Owner
from rolora.adapter.layer import RoLoRALinear
from rolora.adapter.parameter import RoLoRAParameter


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """(path, layer) of every adapted module and parameter, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, RoLoRALinear):
            yield name, module
        elif isinstance(module, Owner):
            for parameter, part in module.parts().items():
                yield f"{name}.{parameter}", part


def adapted_linears(model: nn.Module) -> Iterator[tuple[str, RoLoRALinear]]:
    """(path, layer) of every RoLoRALinear, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, RoLoRALinear):
            yield name, module


def attached_heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of what `attach` was told to save whole (`modules_to_save`)."""
    for name, module in model.named_modules():
        if getattr(module, "saved_with_adapter", False):
            yield name, module


def require_unmerged(layers: Iterable[tuple[str, Adapted]], otherwise: str = "") -> None:
    """Raises ValueError for a merged layer, whose weight already holds an adapter."""
    for name, layer in layers:
        if layer.merged:
            raise ValueError(
                f"the model is merged (module {name}): unmerge(model) first, which takes the "
                "adapter out of the weights" + (f"; {otherwise}" if otherwise else "")
            )


def require_layers(model: nn.Module) -> list[tuple[str, Adapted]]:
    """(path, layer) of everything adapted; raises ValueError where there is none."""
    layers = list(adapted_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA factors: attach them first")
    return layers


def set_phase(model: nn.Module, phase: str | None) -> None:
    """Says which factor trains in every adapted layer: "A", "B", "BOTH" or None.

    Heads are left as they are.
    """
    for _, layer in require_layers(model):
        layer.set_phase(phase)


def merge(model: nn.Module, keep_base: bool = True, requantise: bool = False) -> dict[str, float]:
    """Adds every LoRA path to its weight; path → what rounding lost, relative to the path (see
    RoLoRALinear.merge).

    Raises ValueError, with the layer's path, where a merged weight would not be finite (PEFT's
    safe_merge); no layer has changed then.
    """
    layers = require_layers(model)
    check_merge(layers)
    return {name: layer.merge(keep_base, requantise) for name, layer in layers}


def check_merge(layers: Sequence[tuple[str, Adapted]]) -> None:
    """Raises ValueError, with the layer's path, where a merged weight would not be finite."""
    for name, layer in layers:
        try:
            layer.check_merge()
        except ValueError as error:
            raise ValueError(f"module {name}: {error}") from None


def unmerge(model: nn.Module) -> None:
    """Takes every LoRA path out again, bit for bit."""
    for _, layer in require_layers(model):
        layer.unmerge()


def explain(model: nn.Module) -> list[str]:
    """A line for every adapted layer: its phase, and whether it computes in a group, alone or not
    at all, and why.
    """
    names = {id(layer): name for name, layer in adapted_layers(model)}
    lines = []
    for name, layer in adapted_layers(model):
        group = layer.group
        if layer.merged or not layer.enabled:
            how = "base only: " + ("merged" if layer.merged else "disabled")
        elif isinstance(layer, RoLoRAParameter):
            how = layer.explained()
        elif group is None:
            how = "alone: no sibling shares its input"
        elif group.disbanded:
            how = f"alone: {group.disbanded}"
        elif not group.can_compute_together():
            how = "alone: siblings differ in dropout, hooks or state"
        else:
            how = "grouped with " + ", ".join(
                names[id(m)].split(".")[-1] for m in group.members if m is not layer
            )
        lines.append(f"{name}: phase {layer.phase}, {how}")
    return lines
