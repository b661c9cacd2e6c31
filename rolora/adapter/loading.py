"""An adapter's files put on a model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from rolora.adapter.attach import attach, detach
from rolora.adapter.files import read_adapter_for
from rolora.adapter.model import adapted_layers, require_unmerged
from rolora.adapter.peft_config import lora_config, start_of
from rolora.adapter.tensors import copy, fitted
from rolora.adapter.wrapped import layers_by_path, unwrapped


def load_adapter(model: nn.Module, folder: Path | str) -> list[str]:
    """Loads PEFT's files into `model`, attaching factors first where it has none; returns the
    adapted module paths.

    An adapter that PEFT started from the base's weights ("pissa", "olora") is read against what
    that start left of them, which is computed anew here.

    Raises ValueError when a file is missing or unreadable, the configuration asks for what is out
    of scope, or shapes, names or values do not fit. Values are copied only after everything has
    been checked.
    """
    model = unwrapped(model)
    config, tensors = read_adapter_for(model, folder, from_start=True)
    require_unmerged(adapted_layers(model))
    source, start = str(folder), start_of(config)
    if layers_by_path(model):
        if start is not None:
            raise ValueError(
                f"{source}: init_lora_weights={start!r} needs the bare base, of whose weights that "
                "start is made: load it into a model without factors"
            )
        _load(model, config, tensors, source)
        return list(layers_by_path(model))
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    asked = lora_config(config, tensors)
    exact = "|".join(re.escape(name) for name in asked.target_modules)
    asked = replace(asked, target_modules=exact or ())
    attach(model, asked if start is None else replace(asked, init=start))
    try:
        if start is not None:
            _require_start(model, start, source)
        _load(model, config, tensors, source)
    except ValueError:
        detach(model)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise
    return list(layers_by_path(model))


def _require_start(model: nn.Module, start: str, source: str) -> None:
    """Raises ValueError where PEFT would make another start of the weights, or none."""
    for name, layer in layers_by_path(model).items():
        if layer.quantised is not None or (layer.fan_in_fan_out and start == "olora"):
            raise ValueError(
                f"{source}: init_lora_weights={start!r} cannot be made again of the weight of "
                f"{name}, which is quantised or transposed; convert it in PEFT: save_pretrained("
                "..., path_initial_model_for_weight_conversion=...)"
            )


def _load(model: nn.Module, config: dict, tensors: dict[str, Tensor], source: str) -> None:
    """Copies after everything has been checked."""
    targets = fitted(model, tensors, source)
    said, rslora = lora_config(config, tensors), bool(config.get("use_rslora"))
    for name, layer in layers_by_path(model).items():
        alpha = said.of(name)[1]
        expected = alpha / (layer.rank**0.5 if rslora else layer.rank)
        if abs(layer.scaling - expected) > 1e-6 * abs(expected):
            raise ValueError(
                f"{source}: its scaling is {expected:g}, this model's is {layer.scaling:g} at "
                f"{name}"
            )
    copy(targets)
    if start_of(config) is None:  # the files hold the whole path
        for _, layer in adapted_layers(model):
            layer.set_call(replace(layer.call, term=None))
