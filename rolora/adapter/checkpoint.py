"""Adapters in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.

Keys are `base_model.model.<path>.lora_A.weight [r, in]` and `.lora_B.weight [out, r]`, heads
`base_model.model.<head>.<parameter>` under `modules_to_save`: what PEFT's `save_pretrained` writes
and transformers and vLLM read. Only safetensors is read or written.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from rolora import atomic
from rolora.adapter.attach import LoRAConfig, adapted_layers, attach, layer_index, require_unmerged
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


def save_adapter(
    model: nn.Module,
    folder: Path | str,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    heads: tuple[str, ...] | list[str] = (),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes the model's factors, and the modules named in `heads`, in PEFT's format.

    Args:
        base_model: recorded as `base_model_name_or_path`; task_type: PEFT's, such as "CAUSAL_LM" or
            "SEQ_CLS".
        dtype: of the stored factors; heads keep their own.

    Raises ValueError when nothing is attached or a factor is not finite; nothing is written then.
    """
    layers = dict(adapted_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA factors: nothing to save")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        A, B = _whole_path(layer)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A.to("cpu", dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.to("cpu", dtype)
    for head in heads:
        for key, value in model.get_submodule(head).state_dict().items():
            tensors[f"{PREFIX}{head}.{key}"] = value.detach().cpu()
    bad = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
    if bad:
        raise ValueError(f"{bad[0]} is not finite ({len(bad)} tensors in all): not saved")
    write_adapter(folder, _peft_config(model, layers, base_model, task_type, heads), tensors)


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
    layers = dict(adapted_layers(model))
    require_unmerged(layers.items())
    wanted = adapted_names(tensors)
    if not layers:
        attach(model, lora_config(config, tensors))
        layers = dict(adapted_layers(model))
    heads = {
        f"{PREFIX}{name}": parameter for name, parameter in model.state_dict(keep_vars=True).items()
    }
    targets: list[tuple[Tensor, Tensor]] = []
    for key, value in tensors.items():
        name, _, rest = key.removeprefix(PREFIX).rpartition(".lora_")
        if rest in ("A.weight", "B.weight"):
            if name not in layers:
                raise ValueError(
                    f"{folder}: {name} is in the adapter, but not adapted in this model"
                )
            target = getattr(layers[name], f"lora_{rest[0]}")
        elif key in heads:
            target = heads[key]
        else:
            raise ValueError(f"{folder}: {key} is in the adapter, but not in this model")
        if target.shape != value.shape:
            raise ValueError(
                f"{folder}: {key} is {list(value.shape)}, this model's is {list(target.shape)}: "
                "the adapter was made for another base model or rank"
            )
        targets.append((target, value))
    missing = sorted(set(layers) - set(wanted))
    if missing:
        raise ValueError(
            f"{folder}: holds no factors for {missing[0]} ({len(missing)} in all), which this "
            "model adapts"
        )
    said, rslora = lora_config(config, tensors), bool(config.get("use_rslora"))
    for name, layer in layers.items():
        alpha = said.of(name)[1]
        expected = alpha / (layer.rank**0.5 if rslora else layer.rank)
        if abs(layer.scaling - expected) > 1e-6 * abs(expected):
            raise ValueError(
                f"{folder}: its scaling is {expected:g}, this model's is {layer.scaling:g} at "
                f"{name}"
            )
    with torch.no_grad():
        for target, value in targets:
            target.copy_(value)
    return list(layers)


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
    try:
        tensors = load_safetensors((folder / WEIGHTS_FILE).read_bytes())
    except SafetensorError as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} is not a valid safetensors file: {error}"
        ) from None
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"{folder}: key {key!r} does not start with {PREFIX!r}")
        if not torch.isfinite(value).all():
            raise ValueError(f"{folder}: {key} holds values that are not finite")
    for name in adapted_names(tensors):
        for factor in "AB":
            if f"{PREFIX}{name}.lora_{factor}.weight" not in tensors:
                raise ValueError(f"{folder}: {name} has no lora_{factor}")
    if not adapted_names(tensors):
        raise ValueError(f"{folder}: {WEIGHTS_FILE} holds no LoRA factors")
    return config, tensors


def adapted_names(tensors: dict[str, Tensor]) -> list[str]:
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
    paths = {part for key in tensors for part in key.removeprefix(PREFIX).split(".")}
    return LoRAConfig(
        rank=config["r"],
        alpha=config.get("lora_alpha", 8),
        target_modules=adapted_names(tensors),
        dropout=config.get("lora_dropout", 0.0),
        rslora=bool(config.get("use_rslora")),
        modules_to_save=tuple(
            name for name in config.get("modules_to_save") or () if name in paths
        ),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
    )


def _peft_config(model, layers: dict[str, RoLoRALinear], base_model, task_type, heads) -> dict:
    first = next(iter(layers.values()))
    suffixes = sorted({name.split(".")[-1] for name in layers})
    indices = sorted({layer_index(name) for name in layers} - {None})
    reachable = [
        n for n, m in model.named_modules() if n.split(".")[-1] in suffixes and hasattr(m, "weight")
    ]
    targets, transform = suffixes, None
    if set(reachable) != set(layers):
        selected = {n for n in reachable if layer_index(n) in indices}
        # Last names plus a layer list say the same as full paths and are what people read; else the
        # full paths.
        targets, transform = (
            (suffixes, indices) if selected == set(layers) else (sorted(layers), None)
        )
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
        "layers_to_transform": transform,
        "layers_pattern": None,
        "bias": "none",
        "fan_in_fan_out": first.fan_in_fan_out,
        "modules_to_save": [head.split(".")[-1] for head in heads] or None,
        "inference_mode": True,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "init_lora_weights": True,
        "use_dora": False,
        "revision": None,
    }
