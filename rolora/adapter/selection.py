"""Which modules a configuration selects, by their names and places in the model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from rolora.adapter.configuration import LoRAConfig
from rolora.adapter.linears import is_conv1d

# What "auto" looks for, in this order: the attention's query and value projections under the names
# in use.
_AUTO_TARGETS = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("c_attn",),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("q", "v"),
    ("query_proj", "value_proj"),
    ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
)
# Models for which PEFT's defaults name more, by transformers' model_type.
_MODEL_TARGETS = {"phi": ("q_proj", "v_proj", "fc1", "fc2"), "deberta": ("in_proj",)}
_HEADS = ("lm_head", "score", "classifier", "embed_out", "qa_outputs", "cls", "pre_classifier")


def match(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The module paths that `config` selects, in the model's order; raises ValueError as `attach`
    does.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    linears = []
    for name, module in modules.items():
        if isinstance(module, nn.Linear) or is_conv1d(module):
            linears.append(name)
    targets = config.target_modules
    if targets == "auto":
        targets = _auto_targets(model, linears)
        chosen = [name for name in _of_language(model, linears) if _ends_with(name, targets)]
    elif targets == "all-linear":
        heads = find_heads(model, config.modules_to_save)
        chosen = _all_linear(model, modules, _of_language(model, linears), heads)
    elif isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"target_modules {targets!r} is not a regular expression: {error}"
            ) from None
        chosen = [name for name in modules if pattern.fullmatch(name)]
    else:
        chosen = [name for name in modules if _ends_with(name, targets)]
        for target in targets:
            if not any(_ends_with(name, [target]) for name in chosen):
                raise ValueError(_nothing_matches(target, linears))
    if not chosen:
        if not targets and config.target_parameters:
            return []
        raise ValueError(_nothing_matches(str(targets), linears))
    if config.layers is not None:
        chosen = in_layers(chosen, config.layers)
    chosen = without(chosen, config.exclude_modules)
    for name in chosen:
        if name not in linears:
            raise ValueError(
                f"module {name} is a {type(modules[name]).__name__}: only linear layers can be "
                "adapted"
            )
    return chosen


def _of_language(model: nn.Module, linears: Sequence[str]) -> list[str]:
    """Of a model that sees or hears as well, the linears of its language model: text reaches no
    others.
    """
    whole: Any = model
    config: Any = getattr(whole, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return list(linears)
    decoder = whole.get_decoder()
    paths = [name for name, module in model.named_modules() if module is decoder and name]
    return [name for name in linears if not paths or name.startswith(f"{paths[0]}.")]


def _auto_targets(model: nn.Module, linears: Sequence[str]) -> Sequence[str]:
    """Last names of the query and value projections."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    known = (_MODEL_TARGETS[kind],) if kind in _MODEL_TARGETS else _AUTO_TARGETS
    for targets in known:
        found = [t for t in targets if any(_ends_with(name, [t]) for name in linears)]
        if found:
            return found
    raise ValueError(
        f"no query and value projections found: give target_modules, such as "
        f"{', '.join(_last_names(linears)[:6]) or 'none: the model has no linear layer'}"
    )


def _all_linear(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    linears: Sequence[str],
    heads: Sequence[str],
) -> list[str]:
    """Every linear but output layers, what chooses experts, and what trains whole."""
    outputs, chosen = _output_layers(model), []
    for name in linears:
        parts = name.split(".")
        head = parts[0] in _HEADS or parts[-1] in _HEADS or name in outputs
        head = head or any(f"{name}.".startswith(f"{path}.") for path in heads)
        if not head and not _routes(modules, parts):
            chosen.append(name)
    return chosen


def in_layers(names: Sequence[str], wanted: Sequence[int]) -> list[str]:
    """The names that lie in the wanted blocks; raises ValueError for a block that has none."""
    indices = {name: layer_index(name) for name in names}
    present = sorted({i for i in indices.values() if i is not None})
    if not present:
        raise ValueError("layers given, but no matched module lies in a numbered block")
    missing = sorted(set(wanted) - set(present))
    if missing or not len(wanted):
        raise ValueError(
            f"layers {_ranges(wanted)} given, but the matched modules lie in layers "
            f"{_ranges(present)}"
        )
    return [name for name in names if indices[name] in set(wanted)]


def without(names: Sequence[str], excluded: Sequence[str] | str) -> list[str]:
    """The names that are not excluded; raises ValueError where none is left."""
    if not excluded:
        return list(names)
    if isinstance(excluded, str):
        rest = [name for name in names if not re.fullmatch(excluded, name)]
    else:
        rest = [name for name in names if not _ends_with(name, excluded)]
    if not rest:
        raise ValueError(f"exclude_modules {excluded!r} leaves no module to adapt")
    return rest


def _output_layers(model: nn.Module) -> set[str]:
    """Paths of the layers that turn hidden states into vocabulary: what the model says they are,
    and whatever shares an embedding's weight.
    """
    try:
        said = cast(Any, model).get_output_embeddings()
    except (AttributeError, NotImplementedError):
        said = None
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (module is said or id(module.weight) in tables):
            found.add(name)
    return found


def _routes(modules: Mapping[str, nn.Module], parts: Sequence[str]) -> bool:
    """Whether a linear chooses experts: a gate or router that stands beside `experts`."""
    for depth in range(1, len(parts)):
        beside = hasattr(modules[".".join(parts[:depth])], "experts")
        if beside and re.fullmatch(r"(.*_)?(gate|router)", parts[depth]):
            return True
    return False


def layer_index(name: str) -> int | None:
    """The block a module path lies in: its first numeric component."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def find_heads(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """The paths of the modules that `wanted` names; raises ValueError for one that is missing."""
    heads = []
    for target in wanted:
        found = [name for name, _ in model.named_modules() if name and _ends_with(name, [target])]
        if not found:
            names = sorted({name.split(".")[-1] for name, _ in model.named_modules() if name})
            raise ValueError(
                f"modules_to_save names {target!r}, which the model lacks; nearest: "
                f"{_nearest(target, names)}"
            )
        heads += found
    return heads


def _ends_with(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


def _last_names(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.split(".")[-1] for name in names))


def _nothing_matches(target: str, linears: Sequence[str]) -> str:
    near = _nearest(target, _last_names(linears))
    return f"target_modules {target!r} matches no module; nearest linear layers: {near}"


def _nearest(word: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, names, n=4, cutoff=0.3)
    return ", ".join(close or list(names)[:8]) or "none"


def _ranges(indices: Sequence[int]) -> str:
    """0,1,2,5 as "0-2, 5"."""
    parts: list[list[int]] = []
    for i in sorted(indices):
        if parts and i == parts[-1][1] + 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) or "none"
