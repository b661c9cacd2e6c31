"""How much of a model's weight matrices an adapter reaches."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.conv import _ConvNd

from rolora.adapter.quantised import numel


def weight_matrices(model: nn.Module) -> dict[str, int]:
    """path → elements of every parameter that activations are multiplied with: linears', routers'
    and output layers', stacks of experts. Tables of embeddings are looked up, not multiplied, and
    an output layer that shares one counts as that table.
    """
    found = {}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd):
            continue
        for last, parameter in module.named_parameters(name, recurse=False):
            if parameter.ndim in (2, 3) and id(parameter) not in tables:
                tables.add(id(parameter))  # counted once
                found[last] = numel(parameter)
    return found


def stacks(model: nn.Module) -> list[str]:
    """The paths of the parameters `[experts, …, …]`, which no linear owns; factors are none."""
    found = dict(model.named_parameters())
    matrices = [path for path in weight_matrices(model) if found[path].ndim == 3]
    return [path for path in matrices if not path.endswith((".lora_A", ".lora_B"))]


def unadapted_share(
    matrices: dict[str, int], adapted: Iterable[str], heads: Iterable[str]
) -> float:
    """The share of `weight_matrices` that neither factors nor a trained head reach; 0 without any.

    adapted: paths of modules and parameters; heads: of modules.
    """
    reached, within = set(adapted), tuple(f"{head}." for head in heads)
    whole = sum(matrices.values())
    left = 0
    for path, size in matrices.items():
        module = path.removesuffix(".weight")
        if path not in reached and module not in reached and not path.startswith(within):
            left += size
    return left / whole if whole else 0.0
