"""Which parameters a configuration selects, by the ends of their paths, as PEFT matches them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from rolora.adapter.configuration import LoRAConfig
from rolora.adapter.selection import in_layers, without


def matches(path: str, targets: Sequence[str]) -> bool:
    """Whether a parameter's path is one of the targets, or ends with one."""
    return any(path == target or path.endswith(f".{target}") for target in targets)


def match_parameters(model: nn.Module, config: LoRAConfig, modules: Sequence[str]) -> list[str]:
    """The paths of the parameters that `config.target_parameters` selects, in the model's order;
    `modules`: what is adapted as a module.

    Raises ValueError for a target that matches nothing, with the nearest names, and for a parameter
    that the model owns itself or whose module is adapted too.
    """
    if not config.target_parameters:
        return []
    paths = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for target in config.target_parameters:
        if not any(matches(path, [target]) for path in paths):
            raise ValueError(
                f"target_parameters {target!r} matches no parameter; nearest: "
                f"{_nearest(model, target)}"
            )
    chosen = [path for path in paths if matches(path, config.target_parameters)]
    if config.layers is not None:
        chosen = in_layers(chosen, config.layers)
    kept = set(without([_owner(path) for path in chosen], config.exclude_modules))
    chosen = without([path for path in chosen if _owner(path) in kept], config.exclude_modules)
    for path in chosen:
        owner = _owner(path)
        if not owner:
            raise ValueError(
                f"parameter {path} belongs to the model itself, which PEFT's files have no name "
                "for: wrap the model in another module"
            )
        if owner in modules:
            raise ValueError(
                f"parameter {path} is adapted with its module too: leave {owner} out of "
                "target_modules, or the parameter out of target_parameters"
            )
    return chosen


def _owner(path: str) -> str:
    """The module that a parameter belongs to."""
    return path.rpartition(".")[0]


def _nearest(model: nn.Module, target: str) -> str:
    """The ends of paths that are most like `target`; stacks of experts where none is."""
    ends: dict[str, None] = {}
    stacks: dict[str, None] = {}
    for path, parameter in model.named_parameters():
        if parameter.ndim in (2, 3):
            end = ".".join(path.split(".")[-2:])
            ends[end] = None
            if parameter.ndim == 3:
                stacks[end] = None
    close = difflib.get_close_matches(target, list(ends), n=4, cutoff=0.5)
    return ", ".join(close or list(stacks)[:6] or list(ends)[:6] or ["none"])
