"""PEFT's `adapter_config.json`, read and written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rolora.adapter.adapted import Adapted
from rolora.adapter.configuration import LoRAConfig
from rolora.adapter.layer import RoLoRALinear
from rolora.adapter.parameter_files import PREFIX, owners_of, targets_for
from rolora.adapter.parameter_selection import matches
from rolora.adapter.starts import OF_THE_WEIGHT
from rolora.adapter.tensors import adapted_names, whole_rank
from rolora.adapter.wrapped import plain_path

# Fields of a PEFT LoraConfig that change what the adapter computes and are out of scope here, with
# their neutral values.
_NEUTRAL = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "eva_config": (None,),
}


# Starts of PEFT that take the factors' first product off the base's weights.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_config(config: Any, source: str, from_start: bool = False) -> None:
    """Raises ValueError for what is no configuration of LoRA, asks for what is out of scope, or
    holds numbers that no adapter has. `from_start`: starts that the base alone tells are allowed.
    """
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{source}: peft_type is {kind!r}; only 'LORA' can be loaded")
    for field, neutral in _NEUTRAL.items():
        if field in config and config[field] not in neutral:
            raise ValueError(
                f"{source}: {field}={config[field]!r} is not supported; expected {neutral[0]!r}"
            )
    _check_values(config, source)
    start = config.get("init_lora_weights")
    told = from_start and start in OF_THE_WEIGHT
    if isinstance(start, str) and start.startswith(_CHANGE_THE_BASE) and not told:
        raise ValueError(
            f"{source}: init_lora_weights={start!r} trained against a changed base, which the "
            "files do not hold; convert it in PEFT: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )


def start_of(config: dict) -> str | None:
    """How the factors started, where that was made of the base's weights and taken off them."""
    start = config.get("init_lora_weights")
    return start if start in OF_THE_WEIGHT else None


def _check_values(config: dict, source: str) -> None:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    heads, base = config.get("modules_to_save") or [], config.get("base_model_name_or_path")
    for field, value, fits, wanted in (
        ("r", config.get("r", 8), _is_rank, "a whole number of 1 or more"),
        ("lora_alpha", config.get("lora_alpha", 8), _is_finite, "a finite number"),
        ("lora_dropout", config.get("lora_dropout", 0.0), _is_share, "a number from 0 to 1"),
        ("rank_pattern", ranks, _patterns(_is_rank), "patterns with ranks of 1 or more"),
        ("alpha_pattern", alphas, _patterns(_is_finite), "patterns with finite numbers"),
        ("base_model_name_or_path", base or "", _is_name, "a name"),
        ("modules_to_save", heads, _is_names, "a list of names"),
        ("target_parameters", config.get("target_parameters") or [], _is_names, "a list of names"),
    ):
        if not fits(value):
            raise ValueError(f"{source}: {field}={value!r} in its configuration; expected {wanted}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_rank(value: Any) -> bool:
    return _is_finite(value) and isinstance(value, int) and value >= 1


def _is_share(value: Any) -> bool:
    return _is_finite(value) and 0 <= value <= 1


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_name, value))


def _patterns(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def all_fit(value: Any) -> bool:
        return isinstance(value, dict) and all(map(fits, value.values())) and _compile(value)

    return all_fit


def _compile(patterns: Iterable[str]) -> bool:
    try:
        return all(re.compile(pattern) for pattern in patterns)
    except re.error:
        return False


def check_ranks(config: dict, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError where a factor has another rank than the configuration says. `tensors` of
    parameters under their own paths (`parameter_files.named_parameters`).
    """
    said = lora_config(config, tensors)
    for name in adapted_names(tensors):
        rank, A = said.of(name)[0], tensors[f"{PREFIX}{name}.lora_A.weight"]
        if A.shape[-2] != rank:
            raise ValueError(
                f"{source}: its configuration says rank {rank} for {name}, and lora_A has "
                f"{A.shape[-2]} rows: the two files belong to different adapters"
            )


def lora_config(config: dict, tensors: Mapping[str, Tensor]) -> LoRAConfig:
    """Our configuration for a PEFT one, adapting exactly what `tensors` hold (PEFT lists heads that
    a model may lack).
    """
    keys = [f".{key.removeprefix(PREFIX)}" for key in tensors]
    names, targets = adapted_names(tensors), config.get("target_parameters") or ()
    parameters = [name for name in names if matches(name, targets)]
    return LoRAConfig(
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        target_modules=[name for name in names if name not in parameters],
        target_parameters=parameters,
        dropout=config.get("lora_dropout", 0.0),
        rslora=bool(config.get("use_rslora")),
        modules_to_save=tuple(
            name
            for name in config.get("modules_to_save") or ()
            if any(f".{name}." in key for key in keys)
        ),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
    )


def to_peft(
    model: nn.Module,
    layers: dict[str, Adapted],
    base_model: str | None,
    task_type: str | None,
    heads: Sequence[str],
) -> dict[str, Any]:
    """PEFT's configuration of a model that has these layers and saves these heads."""
    first = next(iter(layers.values()))
    transposed = any(layer.fan_in_fan_out for layer in layers.values())
    paths_of_all = [plain_path(name) for name, _ in model.named_modules()]
    paths = [
        plain_path(name) for name, module in model.named_modules() if hasattr(module, "weight")
    ]
    linears = [name for name, layer in layers.items() if isinstance(layer, RoLoRALinear)]
    suffixes = sorted({name.split(".")[-1] for name in linears})
    targets: list[str] | str = suffixes
    if any(name.split(".")[-1] in suffixes and name not in linears for name in paths):
        # PEFT's layers_to_transform misses the blocks of a bare base model: full paths never do.
        targets = sorted(linears)
        if any(
            name not in linears and name.endswith(tuple("." + n for n in linears)) for name in paths
        ):
            targets = "|".join(re.escape(name) for name in targets)  # matched against whole paths
    # Ranks that a term adds are scaled as the others: alpha grows with them.
    rslora = first.rslora and all(layer.term is None for layer in layers.values())
    ranks = {name: whole_rank(layer) for name, layer in layers.items()}
    alphas = {name: layer.alpha for name, layer in layers.items()}
    for name, layer in layers.items():
        if layer.term is not None:
            alphas[name] = layer.scaling * (ranks[name] ** 0.5 if rslora else ranks[name])
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "use_rslora": rslora,
        "target_modules": targets,
        "target_parameters": targets_for(model, list(owners_of(layers))) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "modules_to_save": _head_names(paths_of_all, heads) or None,
        "inference_mode": True,
        "rank_pattern": _exceptions(ranks, rank),
        "alpha_pattern": _exceptions(alphas, alpha),
        "init_lora_weights": True,
        "use_dora": False,
        "revision": None,
    }


def _exceptions(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """Path → value where it is not the usual one; anchored where another path ends like it."""
    found = {}
    for name, value in values.items():
        if value != usual:
            mixed = any(other.endswith("." + name) for other in values)
            found["^" + re.escape(name) if mixed else name] = value
    return found


def _head_names(paths: Sequence[str], heads: Sequence[str]) -> list[str]:
    """Heads as PEFT looks for them: their last names, or full paths where those name others too."""
    names = []
    for head in heads:
        last = head.split(".")[-1]
        alone = all(path in heads for path in paths if path.split(".")[-1] == last)
        names.append(last if alone else head)
    return names
