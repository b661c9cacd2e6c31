"""Puts LoRA factors on a model, switches phases, merges, and takes them off again."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field

import torch
from torch import nn

from rolora.adapter.group import SIBLINGS, SharedInputGroup
from rolora.adapter.layer import RoLoRALinear, carry_hooks, is_conv1d
from rolora.adapter.quantised import keep_differentiable, mark_trainable, numel, restored

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


_NAMES = re.compile(r"\s*[\w.]+\s*(,\s*[\w.]+\s*)+")  # two names or more, with commas between


class _Unsaid(float):
    """A default value, told from the same value given."""


@dataclass(frozen=True)
class LoRAConfig:
    """Where the factors go and how they start.

    Attributes:
        rank: r. alpha: the numerator of the scaling. rslora: divide alpha by sqrt(r), not by r.
        dropout: on the input of the LoRA path.
        target_modules: last name components, full paths, one regular expression (a string, matched
            against whole paths), "all-linear" (every linear but the output head), or "auto" (query
            and value projections).
        layers: block indices to adapt, such as `range(18, 24)`; None for all.
        modules_to_save: modules trained and saved whole, such as a new classification head
            ("score", "classifier").
        init: "kaiming" (PEFT's default), "gaussian" or "orthogonal" rows for A, with B zero;
            "pissa": see RoLoRALinear.
        rank_pattern, alpha_pattern: ranks and alphas of some modules, by a regular expression on
            the end of their paths, as PEFT has them.
        exclude_modules: never adapted, although they match (names, or one regular expression).
        r, lora_alpha, lora_dropout, use_rslora: PEFT's names for rank, alpha, dropout and rslora,
            read into those.

    A string of names with commas between them, "q_proj,v_proj", is a list of names.
    """

    rank: int = _Unsaid(8)
    alpha: float = _Unsaid(16.0)
    target_modules: Sequence[str] | str = "auto"
    layers: Sequence[int] | None = None
    dropout: float = _Unsaid(0.0)
    rslora: bool = _Unsaid(False)
    modules_to_save: Sequence[str] = ()
    init: str = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: Sequence[str] | str = ()
    r: InitVar[int | None] = None
    lora_alpha: InitVar[float | None] = None
    lora_dropout: InitVar[float | None] = None
    use_rslora: InitVar[bool | None] = None

    def __post_init__(self, r, lora_alpha, lora_dropout, use_rslora):
        for name, alias, given, kind in (
            ("rank", "r", r, int),
            ("alpha", "lora_alpha", lora_alpha, float),
            ("dropout", "lora_dropout", lora_dropout, float),
            ("rslora", "use_rslora", use_rslora, bool),
        ):
            value = getattr(self, name)
            unsaid = isinstance(value, _Unsaid)
            if given is not None and not unsaid and given != value:
                raise ValueError(
                    f"{name}={value!r} and {alias}={given!r} are two names of one thing: give one"
                )
            if given is not None:
                object.__setattr__(self, name, given)
            elif unsaid:
                object.__setattr__(self, name, kind(value))
        targets = self.target_modules
        if isinstance(targets, str) and _NAMES.fullmatch(targets):
            names = [name.strip() for name in targets.split(",")]
            object.__setattr__(self, "target_modules", names)

    def of(self, name: str) -> tuple[int, float]:
        """(rank, alpha) of a module path."""
        return _by_pattern(self.rank_pattern, name, self.rank), _by_pattern(
            self.alpha_pattern, name, self.alpha
        )


def _by_pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    return next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default
    )


@dataclass
class AttachReport:
    """What `attach` did: replaced module paths, groups of siblings, heads, and counts of
    parameters.
    """

    replaced: list[str]
    groups: list[list[str]]
    heads: list[str]
    factor_parameters: int
    head_parameters: int
    frozen_parameters: int
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
    heads = _find_heads(model, config.modules_to_save)
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
    for name, layer in layers.items():
        _replace(model, name, layer)
    for name in heads:
        head = model.get_submodule(name)
        head.requires_grad_(True)
        head.saved_with_adapter = True
    groups = _group_siblings(layers)
    set_phase(model, "BOTH")
    factors = sum(p.numel() for layer in layers.values() for p in (layer.lora_A, layer.lora_B))
    head_parameters = sum(
        p.numel() for name in heads for p in model.get_submodule(name).parameters()
    )
    total = sum(numel(p) for p in model.parameters())
    return AttachReport(
        names, groups, heads, factors, head_parameters, total - factors - head_parameters, layers
    )


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


def match(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The module paths that `config` selects, in the model's order; raises ValueError as `attach`
    does.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    linears = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear) or is_conv1d(module)
    ]
    targets = config.target_modules
    if targets == "auto":
        kind = getattr(getattr(model, "config", None), "model_type", None)
        known = (_MODEL_TARGETS[kind],) if kind in _MODEL_TARGETS else _AUTO_TARGETS
        targets = next((t for t in known if any(_ends_with(n, t) for n in linears)), None)
        if targets is not None:
            targets = [t for t in targets if any(_ends_with(n, [t]) for n in linears)]
        if targets is None:
            raise ValueError(
                f"no query and value projections found: give target_modules, such as "
                f"{', '.join(_last_names(linears)[:6]) or 'none: the model has no linear layer'}"
            )
    if targets == "all-linear":
        outputs = _output_layers(model)
        chosen = []
        for name in linears:
            parts = name.split(".")
            head = parts[0] in _HEADS or parts[-1] in _HEADS or name in outputs
            if not head and not _routes(modules, parts):
                chosen.append(name)
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
        raise ValueError(_nothing_matches(str(targets), linears))
    if config.layers is not None:
        indices = {name: layer_index(name) for name in chosen}
        present = sorted({i for i in indices.values() if i is not None})
        if not present:
            raise ValueError("layers given, but no matched module lies in a numbered block")
        missing = sorted(set(config.layers) - set(present))
        if missing or not len(config.layers):
            raise ValueError(
                f"layers {_ranges(config.layers)} given, but the matched modules lie in layers "
                f"{_ranges(present)}"
            )
        chosen = [name for name in chosen if indices[name] in set(config.layers)]
    excluded = config.exclude_modules
    if excluded:
        chosen = [
            name
            for name in chosen
            if not (
                re.fullmatch(excluded, name)
                if isinstance(excluded, str)
                else _ends_with(name, excluded)
            )
        ]
        if not chosen:
            raise ValueError(f"exclude_modules {excluded!r} leaves no module to adapt")
    for name in chosen:
        if name not in linears:
            raise ValueError(
                f"module {name} is a {type(modules[name]).__name__}: only linear layers can be "
                "adapted"
            )
    return chosen


def _output_layers(model: nn.Module) -> set[str]:
    """Paths of the layers that turn hidden states into vocabulary: what the model says they are,
    and whatever shares an embedding's weight.
    """
    try:
        said = model.get_output_embeddings()
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


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, RoLoRALinear]]:
    """(path, layer) of every RoLoRALinear, in the model's order."""
    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, RoLoRALinear)
    )


def attached_heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of what `attach` was told to save whole (`modules_to_save`)."""
    for name, module in model.named_modules():
        if getattr(module, "saved_with_adapter", False):
            yield name, module


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
    _check_merge(layers)
    return {name: layer.merge(keep_base, requantise) for name, layer in layers}


def _check_merge(layers: Sequence[tuple[str, RoLoRALinear]]) -> None:
    for name, layer in layers:
        try:
            layer.check_merge()
        except ValueError as error:
            raise ValueError(f"module {name}: {error}") from None


def unmerge(model: nn.Module) -> None:
    """Takes every LoRA path out again, bit for bit."""
    for _, layer in require_layers(model):
        layer.unmerge()


def detach(model: nn.Module, merge: bool = False, requantise: bool = False) -> nn.Module:
    """Puts plain linears back, with the LoRA path added to their weights if `merge`, and returns
    the model. A quantised base that was merged is a dense nn.Linear afterwards, or bitsandbytes'
    own module again with `requantise`.

    Raises ValueError on a merged model without `merge`: which weights are wanted must be said.
    """
    layers = require_layers(model)
    if merge:
        _check_merge(layers)
    else:
        require_unmerged(layers, "detach(model, merge=True) keeps the merged weights")
    for name, layer in layers:
        if merge:
            layer.merge(keep_base=False, requantise=requantise)
        _replace(model, name, _plain(layer))
    mark_trainable(model, False)
    for _, head in list(attached_heads(model)):
        del head.saved_with_adapter
    return model


def set_dropout_key(model: nn.Module, key: int | None) -> None:
    """Sets the 64-bit key of this step's dropout masks; None returns to torch's generator.

    Siblings share a mask.
    """
    for place, layer in _dropout_places(model):
        layer.dropout_key = (
            None
            if key is None
            else torch.tensor(_mixed(key, place), dtype=torch.int64, device=layer.lora_A.device)
        )


def set_client_dropout_keys(model: nn.Module, keys: Sequence[int], rows: torch.Tensor) -> None:
    """Sets a key for each client of a cohort that is trained together; rows: int64 `[clients · m]`,
    each row's place in its client's own batch, padded as it would be alone. Every client's mask is
    what it would draw alone.
    """
    for place, layer in _dropout_places(model):
        mixed = torch.tensor(
            [_mixed(key, place) for key in keys], dtype=torch.int64, device=rows.device
        )
        layer.dropout_key = torch.stack([mixed.repeat_interleave(len(rows) // len(keys)), rows])


def _dropout_places(model: nn.Module) -> Iterator[tuple[int, RoLoRALinear]]:
    """Every adapted layer with the place that its masks are drawn for; siblings share one."""
    seen: dict[int, int] = {}
    for index, (_, layer) in enumerate(adapted_layers(model)):
        yield index if layer._group is None else seen.setdefault(id(layer._group), index), layer


def _mixed(key: int, place: int) -> int:
    """The key of a place as a signed 64-bit number."""
    mixed = (key ^ (place + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    return mixed - 2**64 if mixed >= 2**63 else mixed


def explain(model: nn.Module) -> list[str]:
    """A line for every adapted layer: its phase, and whether it computes in a group, alone or not
    at all, and why.
    """
    names = {id(layer): name for name, layer in adapted_layers(model)}
    lines = []
    for name, layer in adapted_layers(model):
        group = layer._group
        if layer.merged or not layer.enabled:
            how = "base only: " + ("merged" if layer.merged else "disabled")
        elif group is None:
            how = "alone: no sibling shares its input"
        elif group.disbanded:
            how = f"alone: {group.disbanded}"
        elif not group._can_compute_together():
            how = "alone: siblings differ in dropout, hooks or state"
        else:
            how = "grouped with " + ", ".join(
                names[id(m)].split(".")[-1] for m in group.members if m is not layer
            )
        lines.append(f"{name}: phase {layer.phase}, {how}")
    return lines


def require_unmerged(layers: Iterable[tuple[str, RoLoRALinear]], otherwise: str = "") -> None:
    """Raises ValueError for a merged layer, whose weight already holds an adapter."""
    for name, layer in layers:
        if layer.merged:
            raise ValueError(
                f"the model is merged (module {name}): unmerge(model) first, which takes the "
                "adapter out of the weights" + (f"; {otherwise}" if otherwise else "")
            )


def require_layers(model: nn.Module) -> list[tuple[str, RoLoRALinear]]:
    """(path, layer) of every RoLoRALinear; raises ValueError where there is none."""
    layers = list(adapted_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA factors: attach them first")
    return layers


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
                    layers[n]._group = group
                groups.append(members)
    return groups


def _find_heads(model: nn.Module, wanted: Sequence[str]) -> list[str]:
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


def _plain(layer: RoLoRALinear) -> nn.Module:
    if layer.quantised is not None and not layer.weight.is_floating_point():
        return restored(layer._original[0], layer.weight, layer.scale).train(layer.training)
    if layer.fan_in_fan_out:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            plain = Conv1D(layer.out_features, layer.in_features)
    else:
        plain = nn.Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
        )
    plain.weight, plain.bias = layer.weight, layer.bias
    carry_hooks(layer, plain)
    return plain.train(layer.training)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


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
