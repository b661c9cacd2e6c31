"""The keys of a step's dropout masks, for every layer of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rolora.adapter.adapted import Adapted
from rolora.adapter.call import MaskKey
from rolora.adapter.model import adapted_layers
from rolora_kernels.transfer import to_device


def set_dropout_key(model: nn.Module, key: int | None) -> None:
    """Sets the 64-bit key of this step's dropout masks; None returns to torch's generator.

    Siblings share a mask.
    """
    layers = list(_places(model))
    if key is None:
        for _, layer in layers:
            layer.set_call(replace(layer.call, masks=None))
        return
    for own, (_, layer) in zip(_on_devices(_all_mixed(key, layers), layers), layers, strict=True):
        layer.set_call(replace(layer.call, masks=MaskKey(own)))


class HeldKeys:
    """The keys of a step's masks in memory that stays, for who computes again what was captured."""

    def __init__(self, model: nn.Module):
        self._layers = list(_places(model))
        self._memory: dict[torch.device, Tensor] = {}

    def fill(self, key: int) -> None:
        """Every layer's masks are those of `set_dropout_key(model, key)` from here on."""
        mixed = _all_mixed(key, self._layers)
        for device in dict.fromkeys(layer.lora_A.device for _, layer in self._layers):
            memory = self._memory.setdefault(device, torch.empty_like(mixed, device=device))
            memory.copy_(to_device(mixed, device))

    def hold(self) -> None:
        """Layers that are called draw their masks by what was filled last."""
        for index, (_, layer) in enumerate(self._layers):
            own = self._memory[layer.lora_A.device][index]
            layer.set_call(replace(layer.call, masks=MaskKey(own)))


def set_client_dropout_keys(model: nn.Module, keys: Sequence[int], rows: torch.Tensor) -> None:
    """Sets a key for each client of a cohort that is trained together; rows: int64 `[clients · m]`,
    each row's place in its client's own batch, padded as it would be alone. Every client's mask is
    what it would draw alone.
    """
    layers = list(_places(model))
    mixed = [[_mixed(key, place) for key in keys] for place, _ in layers]
    each = to_device(torch.tensor(mixed, dtype=torch.int64), rows.device)
    each = each.repeat_interleave(len(rows) // len(keys), dim=1)
    for own, (_, layer) in zip(each, layers, strict=True):
        layer.set_call(replace(layer.call, masks=MaskKey(own, rows)))


def _on_devices(mixed: Tensor, layers: Sequence[tuple[int, Adapted]]) -> list[Tensor]:
    """Every layer's key `[]` on its own device: a view of one tensor a device."""
    devices = [layer.lora_A.device for _, layer in layers]
    keys = {device: to_device(mixed, device).unbind() for device in dict.fromkeys(devices)}
    return [keys[device][place] for place, device in enumerate(devices)]


def _places(model: nn.Module) -> Iterator[tuple[int, Adapted]]:
    """Every adapted layer with the place that its masks are drawn for; siblings share one."""
    seen: dict[int, int] = {}
    for index, (_, layer) in enumerate(adapted_layers(model)):
        if layer.group is not None:
            index = seen.setdefault(id(layer.group), index)
        yield index, layer


def _all_mixed(key: int, layers: Sequence[tuple[int, Adapted]]) -> Tensor:
    """The keys of all layers' places, int64 `[layers]` on the CPU."""
    return torch.tensor([_mixed(key, place) for place, _ in layers], dtype=torch.int64)


def _mixed(key: int, place: int) -> int:
    """The key of a place as a signed 64-bit number."""
    mixed = (key ^ (place + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    return mixed - 2**64 if mixed >= 2**63 else mixed
