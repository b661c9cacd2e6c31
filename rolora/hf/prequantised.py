"""Checkpoints that bitsandbytes has quantised, read without it: their linears become `SavedLinear`,
everything else is Hugging Face's.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from rolora.adapter.linears import is_conv1d
from rolora.adapter.quantised import STATE, SavedLinear, SavedState, SavedWeight, view

_OF_CONFIG = (
    "num_labels",
    "id2label",
    "label2id",
    "pad_token_id",
)  # from_pretrained sets these where it reads the configuration itself
_FOUR, _EIGHT = f".weight.{STATE}", ".SCB"


def load(
    cls, name: str, config, *, revision: str | None, dtype: torch.dtype, **options
) -> tuple[nn.Module, dict[str, Any]]:
    """(model on the CPU, transformers' loading info), as `cls.from_pretrained` gives them; weights
    bit for bit those of the checkpoint.

    The quantised linears are put in place of stand-ins without memory, by the names of their
    modules. Raises OSError or ValueError for files that are missing, a linear that the model does
    not have, or one of another shape.
    """
    tensors = _read(name, revision)
    stored = config.quantization_config
    settings = dict(stored if isinstance(stored, dict) else stored.to_dict())
    config = copy.deepcopy(config)
    del config.quantization_config
    for key in [key for key in options if key in _OF_CONFIG]:
        setattr(config, key, options.pop(key))
    with torch.device("meta"):
        sketch = cls.from_config(config, trust_remote_code=False)
    linears = {}
    for path in _quantised(tensors):
        weight, scale = _take(tensors, path)
        place = _place(sketch, path, view(weight, scale).shape)
        if place is not None:
            linears[place] = weight, scale
            tensors[path + ".weight"] = torch.zeros((), dtype=dtype).expand(
                sketch.get_submodule(place).weight.shape
            )
    model, info = type(sketch).from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, **options
    )
    for place, (weight, scale) in linears.items():
        model.set_submodule(place, SavedLinear(weight, scale, model.get_submodule(place).bias))
    model.config.quantization_config = settings | (
        {"bnb_4bit_quant_storage": "uint8"} if settings.get("load_in_4bit") else {}
    )
    return model, info


def _place(model: Any, path: str, shape: torch.Size) -> str | None:
    """The path in `model` of a checkpoint's linear, with its prefix or without; None within a head
    that this model does not have. Raises ValueError where there is no linear, or one of another
    shape.
    """
    modules: dict[str | None, Any] = dict(model.named_modules())
    prefix = model.base_model_prefix + "."
    found = next(
        (p for p in (path, prefix + path, path.removeprefix(prefix)) if p in modules), None
    )
    part = path.partition(".")[0]
    if (
        found is None
        and part not in modules
        and prefix + part not in modules
        and part != prefix[:-1]
    ):
        return None
    module = modules.get(found)
    if not (isinstance(module, nn.Linear) or (module is not None and is_conv1d(module))):
        raise ValueError(f"its quantised {path} is no linear of a {type(model).__name__}")
    wanted = module.weight.shape[::-1] if is_conv1d(module) else module.weight.shape
    if tuple(shape) != tuple(wanted):
        raise ValueError(
            f"its quantised {path} is {list(shape)}, and the model has {list(wanted)} there"
        )
    return found


def _read(name: str, revision: str | None) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, by its key; from safetensors only."""
    index = cached_file(
        name,
        SAFE_WEIGHTS_INDEX_NAME,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
    )
    files = (
        sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        if index
        else [SAFE_WEIGHTS_NAME]
    )
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(cached_file(name, file, revision=revision), framework="pt") as shard:
            tensors |= {key: shard.get_tensor(key) for key in shard.keys()}
    return tensors


def _quantised(tensors: dict[str, Tensor]) -> list[str]:
    """The paths of the linears that are stored in 4 or 8 bits."""
    return [
        key.partition(_FOUR)[0] if _FOUR in key else key.removesuffix(_EIGHT)
        for key in tensors
        if _FOUR in key or key.endswith(_EIGHT)
    ]


def _take(tensors: dict[str, Tensor], path: str) -> tuple[nn.Parameter, Tensor | None]:
    """(weight, None or its rows' scales) of a linear; its keys are taken out of `tensors`."""
    if path + ".weight" not in tensors:
        raise ValueError(f"its quantised {path} lacks its weight")
    weight, scale = tensors.pop(path + ".weight"), tensors.pop(path + _EIGHT, None)
    start = path + ".weight"
    beside = {
        key.removeprefix(start + "."): tensors.pop(key)
        for key in [k for k in tensors if k.startswith(start)]
    }
    try:
        made = (
            SavedWeight(weight.view(torch.uint8), SavedState(beside))
            if scale is None
            else nn.Parameter(weight, requires_grad=False)
        )
        view(made, scale)  # whether the sizes belong together
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"its quantised {path} {error}") from None
    return made, scale
