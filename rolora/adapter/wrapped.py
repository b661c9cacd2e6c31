"""Models inside the wrappers of torch.compile, DistributedDataParallel and FSDP."""

from __future__ import annotations

from typing import cast

from torch import nn

from rolora.adapter.adapted import Adapted
from rolora.adapter.model import adapted_layers

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
_INSERTED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DistributedDataParallel's and FSDP's wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        elif type(model).__name__ in _WRAPPERS:
            model = cast(nn.Module, model.module)
        else:
            return model


def plain_path(name: str) -> str:
    """A module path without the components that compiling or checkpointing a part inserts."""
    return ".".join(part for part in name.split(".") if part not in _INSERTED)


def layers_by_path(model: nn.Module) -> dict[str, Adapted]:
    return {plain_path(name): layer for name, layer in adapted_layers(model)}
