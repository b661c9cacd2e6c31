"""PEFT's `adapter_config.json`, read and written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rolora.adapter.configuration import LoRAConfig
from rolora.adapter.layer import RoLoRALinear
from rolora.adapter.tensors import PREFIX, adapted_names, whole_rank
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
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "eva_config": (None,),
}


# Starts of PEFT that take the factors' first product off the base's weights.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_config(config: Any, source: str) -> None:
    """Raises ValueError for what is no configuration of LoRA, or asks for what is out of scope."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{source}: peft_type is {kind!r}; only 'LORA' can be loaded")
    for field, neutral in _NEUTRAL.items():
        if field in config and config[field] not in neutral:
            raise ValueError(
                f"{source}: {field}={config[field]!r} is not supported; expected {neutral[0]!r}"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGE_THE_BASE):
        raise ValueError(
            f"{source}: init_lora_weights={start!r} trained against a changed base, which the "
            "files do not hold; convert it in PEFT: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )


def lora_config(config: dict, tensors: dict[str, Tensor]) -> LoRAConfig:
    """Our configuration for a PEFT one, adapting exactly what `tensors` hold (PEFT lists heads that
    a model may lack).
    """
    keys = [f".{key.removeprefix(PREFIX)}" for key in tensors]
    return LoRAConfig(
        rank=config["r"],
        alpha=config.get("lora_alpha", 8),
        target_modules=adapted_names(tensors),
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
    layers: dict[str, RoLoRALinear],
    base_model: str | None,
    task_type: str | None,
    heads: Sequence[str],
) -> dict[str, Any]:
    """PEFT's configuration of a model that has these layers and saves these heads."""
    first = next(iter(layers.values()))
    paths_of_all = [plain_path(name) for name, _ in model.named_modules()]
    paths = [
        plain_path(name) for name, module in model.named_modules() if hasattr(module, "weight")
    ]
    suffixes = sorted({name.split(".")[-1] for name in layers})
    targets: list[str] | str = suffixes
    if any(name.split(".")[-1] in suffixes and name not in layers for name in paths):
        # PEFT's layers_to_transform misses the blocks of a bare base model: full paths never do.
        targets = sorted(layers)
        if any(
            name not in layers and name.endswith(tuple("." + n for n in layers)) for name in paths
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
        "layers_to_transform": None,
        "layers_pattern": None,
        "bias": "none",
        "fan_in_fan_out": first.fan_in_fan_out,
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
