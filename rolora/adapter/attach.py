"""Puts LoRA factors on a model, and takes them off again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from rolora.adapter import experts, pretrained
from rolora.adapter.adapted import Adapted
from rolora.adapter.configuration import LoRAConfig
from rolora.adapter.coverage import stacks, unadapted_share, weight_matrices
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
from rolora.adapter.parameter import RoLoRAParameter
from rolora.adapter.parameter_selection import match_parameters
from rolora.adapter.quantised import keep_differentiable, mark_trainable, numel
from rolora.adapter.selection import find_heads, match


@dataclass
class AttachReport:
    """What `attach` did.

    Paths of replaced modules and of adapted parameters, groups of siblings, heads, and counts of
    parameters. `unadapted_share`: of the linear parameters (linears, routers, output layers and
    experts; not embeddings), the share that neither factors nor heads reach. `expert_parameters`:
    how many of those are experts' that are one tensor `[experts, out, in]`, at the paths `experts`;
    `linear_parameters`: all there are. `layers`: path → layer, of both kinds.
    """

    replaced: list[str]
    parameters: list[str]
    groups: list[list[str]]
    heads: list[str]
    factor_parameters: int
    head_parameters: int
    frozen_parameters: int
    linear_parameters: int
    unadapted_share: float
    expert_parameters: int
    experts: list[str]
    layers: dict[str, Adapted] = field(repr=False, default_factory=dict)


def attach(model: nn.Module, config: LoRAConfig, seed: int | None = None) -> AttachReport:
    """Replaces the matching linears of `model` by RoLoRALinear in place, puts a RoLoRAParameter
    beside each parameter that `target_parameters` names, and freezes everything else but the heads.

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
    parameters = match_parameters(model, config, names)
    _refuse_shared(model, [*(f"{name}.weight" for name in names), *parameters])
    heads = find_heads(model, config.modules_to_save)
    matrices = weight_matrices(model)
    unreached = [path for path in stacks(model) if path not in parameters]
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    layers: dict[str, RoLoRALinear] = {}
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
    parts = _parts(model, parameters, config, generator)
    model.requires_grad_(False)
    keep_differentiable(model)
    mark_trainable(model, True)
    pretrained.take_over(model)
    for name, layer in layers.items():
        _replace(model, name, layer)
    for owner, own in parts.items():
        experts.adopt(model.get_submodule(owner), own)
    for name in heads:
        head = model.get_submodule(name)
        head.requires_grad_(True)
        head.saved_with_adapter = True  # type: ignore[assignment]
    groups = _group_siblings(layers)
    set_phase(model, "BOTH")
    adapted = dict(adapted_layers(model))
    factors = sum(p.numel() for layer in adapted.values() for p in (layer.lora_A, layer.lora_B))
    head_parameters = sum(
        p.numel() for name in heads for p in model.get_submodule(name).parameters()
    )
    total = sum(numel(p) for p in model.parameters())
    return AttachReport(
        replaced=names,
        parameters=parameters,
        groups=groups,
        heads=heads,
        factor_parameters=factors,
        head_parameters=head_parameters,
        frozen_parameters=total - factors - head_parameters,
        linear_parameters=sum(matrices.values()),
        unadapted_share=unadapted_share(matrices, [*names, *parameters], heads),
        expert_parameters=sum(matrices[path] for path in unreached),
        experts=unreached,
        layers=adapted,
    )


def _parts(
    model: nn.Module,
    parameters: Sequence[str],
    config: LoRAConfig,
    generator: torch.Generator | None,
) -> dict[str, list[RoLoRAParameter]]:
    """owner's path → the new factors over its parameters; nothing is put in place."""
    parts: dict[str, list[RoLoRAParameter]] = {}
    for path in parameters:
        owner, _, last = path.rpartition(".")
        rank, alpha = config.of(path)
        try:
            made = RoLoRAParameter(
                model.get_submodule(owner),
                last,
                rank,
                alpha,
                rslora=config.rslora,
                init=config.init,
                generator=generator,
            )
        except ValueError as error:
            raise ValueError(f"parameter {path}: {error}") from None
        parts.setdefault(owner, []).append(made)
    return parts


def _refuse_shared(model: nn.Module, paths: Sequence[str]) -> None:
    """Raises ValueError where a weight has a second user: a merge would change that one too."""
    users: dict[int, list[str]] = {}
    by_path = dict(model.named_parameters(remove_duplicate=False))
    for path, parameter in by_path.items():
        users.setdefault(id(parameter), []).append(path)
    for path in paths:
        others = [other for other in users.get(id(by_path.get(path)), ()) if other != path]
        if others:
            name, other = (where.removesuffix(".weight") for where in (path, others[0]))
            raise ValueError(
                f"module {name} shares its weight with {other}, which a merge would change "
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
        if isinstance(layer, RoLoRALinear):
            plain = layer.base.plain(layer.held, layer.bias)
            carry_hooks(layer, plain)
            _replace(model, name, plain.train(layer.training))
    for module in list(model.modules()):
        if isinstance(module, experts.Owner):
            experts.release(module)
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
