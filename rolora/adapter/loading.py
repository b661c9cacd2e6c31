"""An adapter's files put on a model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from rolora.adapter.attach import attach, detach
from rolora.adapter.files import read_adapter
from rolora.adapter.model import adapted_layers, require_unmerged
from rolora.adapter.peft_config import lora_config
from rolora.adapter.tensors import adapted_names, copy, fitted
from rolora.adapter.wrapped import layers_by_path, unwrapped


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
    if layers_by_path(model):
        _load(model, config, tensors, source)
        return list(layers_by_path(model))
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
    return list(layers_by_path(model))


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
