"""Factors of parameters as PEFT's files have them.

A file names the module that owns a parameter, never the parameter: PEFT wraps the owner once for
each, so that of several the last one's key is `<owner>.lora_A.weight`, the one before it has
`.base_layer` in between, and so on. Which is which, the order in the module tells. All experts are
one matrix: A `[E · r, in]` expert by expert, B `[out, r · E]` rank by rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rolora.adapter.adapted import Adapted
from rolora.adapter.parameter import RoLoRAParameter
from rolora.adapter.parameter_selection import matches

PREFIX = "base_model.model."
_ENDS = (".lora_A.weight", ".lora_B.weight")


def file_names(owners: Mapping[str, nn.Module]) -> dict[str, str]:
    """parameter path → the module path that its keys have in a file; `owners`: whose it is."""
    adapted: dict[str, list[str]] = {}
    for path in owners:
        owner, _, last = path.rpartition(".")
        adapted.setdefault(owner, []).append(last)
    names = {}
    for owner, own in adapted.items():
        module = owners[f"{owner}.{own[0]}"]
        order = [name for name in module._parameters if name in own]
        for depth, name in enumerate(reversed(order)):
            names[f"{owner}.{name}"] = owner + ".base_layer" * depth
    return names


def to_file(layer: Adapted, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B as two matrices."""
    if A.ndim == 2:
        return A, B
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def _from_file(key: str, value: Tensor, experts: int) -> Tensor:
    """The stack `[E, …]` that a file's matrix holds; raises ValueError where it cannot be one."""
    whole = value.shape[0] if key.endswith(_ENDS[0]) else value.shape[-1]
    if value.ndim != 2 or whole % experts:
        raise ValueError(
            f"{key} is {list(value.shape)}, which {experts} experts cannot share: the adapter was "
            "made for another base model"
        )
    if key.endswith(_ENDS[0]):
        return value.unflatten(0, (experts, -1))
    return value.unflatten(1, (-1, experts)).permute(2, 0, 1)


def named_parameters(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """What a file holds, with each parameter's factors under the parameter's own path, experts as
    stacks.

    Raises ValueError where the model has no parameter for them, or a target is without factors.
    """
    targets = config.get("target_parameters") or ()
    if not targets:
        return dict(tensors)
    paths = [path for path, _ in model.named_parameters(remove_duplicate=False)]
    chosen = [path for path in paths if matches(path, targets)]
    missing = [target for target in targets if not any(matches(p, [target]) for p in chosen)]
    if missing:
        raise ValueError(
            f"{source}: target_parameters names {missing[0]!r}, which this model lacks: the "
            "adapter was made for another base model"
        )
    owners = {path: model.get_submodule(path.rpartition(".")[0]) for path in chosen}
    return renamed(owners, tensors, source)


def renamed(
    owners: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """`named_parameters` of these paths; `owners`: whose parameter each is."""
    own = {name: path for path, name in file_names(owners).items()}
    made = {}
    for key, value in tensors.items():
        name, end = key.removeprefix(PREFIX), next((e for e in _ENDS if key.endswith(e)), "")
        path = own.get(name.removesuffix(end)) if end else None
        if path is None:
            made[key] = value
            continue
        parameter = owners[path]._parameters[path.rpartition(".")[2]]
        if parameter is not None and parameter.ndim == 3:
            try:
                value = _from_file(key, value, len(parameter))
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None
        made[f"{PREFIX}{path}{end}"] = value
    for path in owners:
        if f"{PREFIX}{path}{_ENDS[0]}" not in made:
            raise ValueError(f"{source}: holds no factors for the parameter {path}")
    return made


def owners_of(layers: Mapping[str, Adapted]) -> dict[str, nn.Module]:
    """path → whose parameter it is, of those layers that adapt one."""
    found = {}
    for path, layer in layers.items():
        if isinstance(layer, RoLoRAParameter):
            found[path] = layer.owner
    return found


def targets_for(model: nn.Module, adapted: Sequence[str]) -> list[str]:
    """PEFT's `target_parameters` that select these paths of `model`, and no others: the last two
    components where that does, or whole paths.
    """
    paths = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    ends = sorted({".".join(path.split(".")[-2:]) for path in adapted})
    if sum(matches(path, ends) for path in paths) == len(adapted):
        return ends
    return sorted(adapted)
