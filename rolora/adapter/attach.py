"""Puts LoRA factors on a model, and takes them off again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from rolora.adapter import pretrained
from rolora.adapter.configuration import LoRAConfig
from rolora.adapter.group import SIBLINGS, SharedInputGroup
from rolora.adapter.layer import RoLoRALinear
from rolora.adapter.linears import carry_hooks
from rolora.adapter.model import (
    adapted_layers,
    attached_heads,
    check_merge,
    require_layers,
    require_unmerged,
    set_phase,
)
from rolora.adapter.quantised import keep_differentiable, mark_trainable, numel
from rolora.adapter.selection import find_heads, match


@dataclass
class AttachReport:
    """What `attach` did: replaced module paths, groups of siblings, heads, and counts of
    parameters. `expert_parameters`: of the frozen ones, those of experts that are one tensor
    `[experts, out, in]`, which no adapter reaches.
    """

    replaced: list[str]
    groups: list[list[str]]
    heads: list[str]
    factor_parameters: int
    head_parameters: int
    frozen_parameters: int
    expert_parameters: int
    layers: dict[str, RoLoRALinear] = field(repr=False, default_factory=dict)


def attach(model: nn.Module, config: LoRAConfig, seed: int | None = None) -> AttachReport:
    """Replaces the matching linears of `model` by RoLoRALinear in place and freezes everything else
    but the heads.

    Base state_dict keys stay as they were; `….lora_A` and `….lora_B` are added. The phase is "BOTH"
    afterwards. `seed` makes the initial A the same everywhere, whatever the global generator's
    state.

    Raises:
        ValueError: nothing matches (the nearest names are given), a match is no linear or shares
            its weight with another module, layers out of range, rank too large, a head that does
            not exist, or a model that already has factors. The model is unchanged then.
    """
    if not isinstance(config, LoRAConfig):
        raise TypeError(
            f"attach takes a rolora.LoRAConfig, got a {type(config).__module__}."
            f"{type(config).__qualname__}: write LoRAConfig(...), which knows PEFT's names r, "
            "lora_alpha, lora_dropout and use_rslora"
        )
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise ValueError(
                f"the model carries PEFT's adapters (a {type(module).__name__} at {name or 'top'}):"
                " give attach what model.merge_and_unload() or model.unload() returns"
            )
    if any(True for _ in adapted_layers(model)):
        raise ValueError("the model already has LoRA factors: detach them first")
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        return _attach(model, config, seed)
    except BaseException:
        for parameter, requires_grad in trained:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        raise


def _attach(model: nn.Module, config: LoRAConfig, seed: int | None) -> AttachReport:
    names = match(model, config)
    _refuse_shared(model, names)
    heads = find_heads(model, config.modules_to_save)
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    layers = {}
    for name in names:  # all are built before the first is put in place
        try:
            rank, alpha = config.of(name)
            layers[name] = RoLoRALinear.from_linear(
                model.get_submodule(name),
                rank=rank,
                alpha=alpha,
                dropout=config.dropout,
                rslora=config.rslora,
                init=config.init,
                generator=generator,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"module {name}: {error}") from None
    model.requires_grad_(False)
    keep_differentiable(model)
    mark_trainable(model, True)
    pretrained.take_over(model)
    for name, layer in layers.items():
        _replace(model, name, layer)
    for name in heads:
        head = model.get_submodule(name)
        head.requires_grad_(True)
        head.saved_with_adapter = True  # type: ignore[assignment]
    groups = _group_siblings(layers)
    set_phase(model, "BOTH")
    factors = sum(p.numel() for layer in layers.values() for p in (layer.lora_A, layer.lora_B))
    head_parameters = sum(
        p.numel() for name in heads for p in model.get_submodule(name).parameters()
    )
    total = sum(numel(p) for p in model.parameters())
    frozen = total - factors - head_parameters
    experts = sum(p.numel() for p in model.parameters() if p.ndim == 3 and not p.requires_grad)
    return AttachReport(names, groups, heads, factors, head_parameters, frozen, experts, layers)


def _refuse_shared(model: nn.Module, names: Sequence[str]) -> None:
    """Raises ValueError where a weight has a second user: a merge would change that one too."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    for name in names:
        others = [n for n in users[id(model.get_submodule(name).weight)] if n != name]
        if others:
            raise ValueError(
                f"module {name} shares its weight with {others[0]}, which a merge would change "
                "too: leave it out with exclude_modules, or give it a weight of its own (for an "
                "output layer: tie_word_embeddings=False)"
            )


def detach(model: nn.Module, merge: bool = False, requantise: bool = False) -> nn.Module:
    """Puts plain linears back, with the LoRA path added to their weights if `merge`, and returns
    the model. A quantised base that was merged is a dense nn.Linear afterwards, or bitsandbytes'
    own module again with `requantise`.

    Raises ValueError on a merged model without `merge`: which weights are wanted must be said.
    """
    layers = require_layers(model)
    if merge:
        check_merge(layers)
    else:
        require_unmerged(layers, "detach(model, merge=True) keeps the merged weights")
    for name, layer in layers:
        if merge:
            layer.merge(keep_base=False, requantise=requantise)
        plain = layer.base.plain(layer.held, layer.bias)
        carry_hooks(layer, plain)
        _replace(model, name, plain.train(layer.training))
    mark_trainable(model, False)
    pretrained.give_back(model)
    for _, head in list(attached_heads(model)):
        del head.saved_with_adapter
    return model


def _group_siblings(layers: dict[str, RoLoRALinear]) -> list[list[str]]:
    groups = []
    parents: dict[str, list[str]] = {}
    for name in layers:
        parents.setdefault(name.rpartition(".")[0], []).append(name)
    for names in parents.values():
        for family in SIBLINGS:
            members = [n for n in names if n.rpartition(".")[2] in family]
            if len(members) > 1 and len({layers[n].in_features for n in members}) == 1:
                group = SharedInputGroup([layers[n] for n in members])
                for n in members:
                    layers[n].join(group)
                groups.append(members)
    return groups


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
