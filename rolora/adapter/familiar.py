"""What PEFT's users reach for on an adapted model, under PEFT's names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rolora.adapter.model import require_layers
from rolora.adapter.quantised import numel


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Runs the base alone inside the `with` block, on a merged model too.

    Raises ValueError for a model without factors, RuntimeError for one merged with
    keep_base=False.
    """
    layers = [layer for _, layer in require_layers(model)]
    for layer in layers:
        layer.require_base()
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints PEFT's line: how many parameters train, of how many."""
    trained, total = 0, 0
    for parameter in model.parameters():
        total += numel(parameter)
        if parameter.requires_grad:
            trained += numel(parameter)
    share = 100 * trained / max(total, 1)
    print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}")
