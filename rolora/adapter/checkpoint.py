"""Adapters in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.

Keys are `base_model.model.<path>.lora_A.weight [r, in]` and `.lora_B.weight [out, r]`, heads
`base_model.model.<head>.<parameter>` under `modules_to_save`: what PEFT's `save_pretrained` writes
and transformers and vLLM read. Only safetensors is read or written.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from rolora import atomic
from rolora.adapter.attach import (
    LoRAConfig,
    adapted_layers,
    attach,
    attached_heads,
    detach,
    require_unmerged,
)
from rolora.adapter.layer import RoLoRALinear

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
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
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
_INSERTED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def save_adapter(
    model: nn.Module,
    folder: Path | str,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    heads: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes the model's factors, and the modules named in `heads`, in PEFT's format. A model
    wrapped by torch.compile or DistributedDataParallel is saved as the one inside.

    Args:
        base_model: recorded as `base_model_name_or_path`; None takes what the model's config names.
        task_type: PEFT's, such as "CAUSAL_LM" or "SEQ_CLS".
        heads: None for the `modules_to_save` of `attach`.
        dtype: of the stored factors; heads keep their own.

    Raises ValueError when nothing is attached or a factor is not finite; nothing is written then.
    """
    model = unwrapped(model)
    if heads is None:
        heads = [plain_path(name) for name, _ in attached_heads(model)]
    tensors = _finite(get_adapter_state_dict(model, heads=heads, dtype=dtype))
    layers = _layers_by_path(model)
    if base_model is None:
        base_model = _base_name(model)
    write_adapter(folder, _peft_config(model, layers, base_model, task_type, heads), tensors)


def get_adapter_state_dict(
    model: nn.Module, *, heads: Sequence[str] | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """What `save_adapter` writes, as tensors of their own on the CPU, under PEFT's keys."""
    model = unwrapped(model)
    layers = _layers_by_path(model)
    if not layers:
        raise ValueError("the model has no LoRA factors: nothing to save")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        A, B = _whole_path(layer)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A.to("cpu", dtype, copy=True)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.to("cpu", dtype, copy=True)
    modules = {plain_path(name): module for name, module in model.named_modules()}
    if heads is None:
        heads = [plain_path(name) for name, _ in attached_heads(model)]
    for head in heads:
        if head not in modules:
            raise ValueError(f"heads names {head!r}, which the model lacks: give a module path")
        for key, value in modules[head].state_dict().items():
            tensors[f"{PREFIX}{head}.{plain_path(key)}"] = value.detach().to("cpu", copy=True)
    return tensors


def _finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    bad = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
    if bad:
        raise ValueError(f"{bad[0]} is not finite ({len(bad)} tensors in all): not saved")
    return tensors


def set_adapter_state_dict(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies what `get_adapter_state_dict` gave, or PEFT's `get_peft_model_state_dict`, into a
    model that has the same factors attached.

    Raises ValueError, and leaves the model as it is, where names, shapes or values do not fit.
    """
    model = unwrapped(model)
    if not _layers_by_path(model):
        raise ValueError("the model has no LoRA factors: attach them first")
    require_unmerged(adapted_layers(model))
    _check_tensors(tensors, "the given tensors")
    targets = _targets(model, tensors, "the given tensors")
    _copy(targets)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DistributedDataParallel's and FSDP's wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif type(model).__name__ in _WRAPPERS:
            model = model.module
        else:
            return model


def plain_path(name: str) -> str:
    """A module path without the components that compiling or checkpointing a part inserts."""
    return ".".join(part for part in name.split(".") if part not in _INSERTED)


def _layers_by_path(model: nn.Module) -> dict[str, RoLoRALinear]:
    return {plain_path(name): layer for name, layer in adapted_layers(model)}


def _base_name(model: nn.Module) -> str | None:
    names = (
        getattr(holder, key, None)
        for holder in (getattr(model, "config", None), model)
        for key in ("name_or_path", "_name_or_path")
    )
    return next((name for name in names if isinstance(name, str) and name), None)


def write_adapter(
    folder: Path | str, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Writes PEFT's two files; `dtype` casts the factors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: (value.to(dtype) if dtype is not None and ".lora_" in key else value).contiguous()
        for key, value in tensors.items()
    }
    atomic.write_bytes(folder / WEIGHTS_FILE, save_safetensors(tensors, metadata={"format": "pt"}))
    atomic.write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _whole_path(layer: RoLoRALinear) -> tuple[Tensor, Tensor]:
    """A `[r + R, in]` and B `[out, r + R]` of the path with its term, of R ranks or none."""
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    if layer.term is None:
        return A, B
    U, V = layer.term
    return torch.cat([A, V.to(A)]), torch.cat([B, U.to(B)], 1)


def load_adapter(model: nn.Module, folder: Path | str) -> list[str]:
    """Loads PEFT's files into `model`, attaching factors first where it has none; returns the
    adapted module paths.

    Raises ValueError when a file is missing or unreadable, the configuration asks for what is out
    of scope, or shapes, names or values do not fit. Values are copied only after everything has
    been checked.
    """
    config, tensors = read_adapter(folder)
    model = unwrapped(model)
    require_unmerged(adapted_layers(model))
    source = str(folder)
    if _layers_by_path(model):
        _load(model, config, tensors, source)
        return list(_layers_by_path(model))
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    exact = "|".join(re.escape(name) for name in adapted_names(tensors))
    attach(model, replace(lora_config(config, tensors), target_modules=exact))
    try:
        _load(model, config, tensors, source)
    except ValueError:
        detach(model)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise
    return list(_layers_by_path(model))


def _load(model: nn.Module, config: dict, tensors: dict[str, Tensor], source: str) -> None:
    """Copies after everything has been checked."""
    targets = _targets(model, tensors, source)
    said, rslora = lora_config(config, tensors), bool(config.get("use_rslora"))
    for name, layer in _layers_by_path(model).items():
        alpha = said.of(name)[1]
        expected = alpha / (layer.rank**0.5 if rslora else layer.rank)
        if abs(layer.scaling - expected) > 1e-6 * abs(expected):
            raise ValueError(
                f"{source}: its scaling is {expected:g}, this model's is {layer.scaling:g} at "
                f"{name}"
            )
    _copy(targets)


def _targets(
    model: nn.Module, tensors: Mapping[str, Tensor], source: str
) -> list[tuple[Tensor, Tensor]]:
    """(the model's tensor, the value that goes there) for each of `tensors`; raises ValueError
    unless they fit one another and every adapted layer has its factors.
    """
    layers = _layers_by_path(model)
    heads = {
        PREFIX + plain_path(name): parameter
        for name, parameter in model.state_dict(keep_vars=True).items()
    }
    targets: list[tuple[Tensor, Tensor]] = []
    for key, value in tensors.items():
        name, _, rest = key.removeprefix(PREFIX).rpartition(".lora_")
        if rest in ("A.weight", "B.weight"):
            if name not in layers:
                raise ValueError(
                    f"{source}: {name} is in the adapter, but not adapted in this model"
                )
            target = getattr(layers[name], f"lora_{rest[0]}")
        elif key in heads:
            target = heads[key]
        elif _is_own_weight(key, value, layers):
            continue
        else:
            raise ValueError(f"{source}: {key} is in the adapter, but not in this model")
        if target.shape != value.shape:
            raise ValueError(
                f"{source}: {key} is {list(value.shape)}, this model's is {list(target.shape)}: "
                "the adapter was made for another base model or rank"
            )
        targets.append((target, value))
    missing = sorted(set(layers) - set(adapted_names(tensors)))
    if missing:
        raise ValueError(
            f"{source}: holds no factors for {missing[0]} ({len(missing)} in all), which this "
            "model adapts"
        )
    return targets


def _is_own_weight(key: str, value: Tensor, layers: Mapping[str, RoLoRALinear]) -> bool:
    """Whether this is the frozen weight of an adapted layer, which PEFT saves too for an output
    layer, as it is here.
    """
    name, found, _ = key.removeprefix(PREFIX).rpartition(".base_layer.weight")
    if not found or name not in layers:
        return False
    own = layers[name].weight
    if own.shape != value.shape or not torch.equal(own, value.to(own)):
        raise ValueError(f"{key} is not this model's: the adapter was made for another base model")
    return True


@torch.no_grad()
def _copy(targets: Sequence[tuple[Tensor, Tensor]]) -> None:
    for target, value in targets:
        target.copy_(value)


def read_adapter(folder: Path | str) -> tuple[dict, dict[str, Tensor]]:
    """(configuration, tensors) of a PEFT LoRA folder, checked: readable, in scope, complete pairs,
    finite.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not an adapter folder: {name} is missing")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{folder}: peft_type is {kind!r}; only 'LORA' can be loaded")
    for field, neutral in _NEUTRAL.items():
        if field in config and config[field] not in neutral:
            raise ValueError(
                f"{folder}: {field}={config[field]!r} is not supported; expected {neutral[0]!r}"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGE_THE_BASE):
        raise ValueError(
            f"{folder}: init_lora_weights={start!r} trained against a changed base, which the "
            "files do not hold; convert it in PEFT: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    try:
        tensors = load_safetensors((folder / WEIGHTS_FILE).read_bytes())
    except SafetensorError as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} is not a valid safetensors file: {error}"
        ) from None
    _check_tensors(tensors, str(folder))
    return config, tensors


def _check_tensors(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError unless these are finite, in complete pairs, under PEFT's keys."""
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"{source}: key {key!r} does not start with {PREFIX!r}")
        if not torch.isfinite(value).all():
            raise ValueError(f"{source}: {key} holds values that are not finite")
    names = adapted_names(tensors)
    for name in names:
        for factor in "AB":
            if f"{PREFIX}{name}.lora_{factor}.weight" not in tensors:
                raise ValueError(f"{source}: {name} has no lora_{factor}")
    if not names:
        raise ValueError(f"{source} holds no LoRA factors")


def adapted_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """The module paths that the tensors hold factors for."""
    return list(
        dict.fromkeys(
            key.removeprefix(PREFIX).rpartition(".lora_")[0]
            for key in tensors
            if key.endswith((".lora_A.weight", ".lora_B.weight"))
        )
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


def _peft_config(model, layers: dict[str, RoLoRALinear], base_model, task_type, heads) -> dict:
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
    ranks = {name: len(_whole_path(layer)[0]) for name, layer in layers.items()}
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
