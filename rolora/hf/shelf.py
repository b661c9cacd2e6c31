"""Base models that several runs of one process share."""

from __future__ import annotations

import copy
from typing import Any

import torch

from rolora.hf.models import Loaded, load_model


class Shelf:
    """Base models that several runs of one process share, each loaded once.

    `take` gives a module tree of its own on the common, frozen weights, with new heads drawn from
    its own seed: the same model, bit for bit, as `load_model` gives for that seed.
    """

    def __init__(self):
        self._loaded: dict[tuple, Loaded] = {}

    def take(self, name: str, *args, seed: int, **options) -> Loaded:
        key = (name, *(str(options[k]) for k in sorted(options)))
        if key not in self._loaded:
            self._loaded[key] = load_model(name, *args, seed=seed, **options)
        kept = self._loaded[key]
        heads = {
            *kept.new_heads,
            *(
                name
                for name in ("pre_classifier", "classifier", "score")
                if hasattr(kept.model, name)
            ),
        }
        own = {id(module) for head in heads for module in kept.model.get_submodule(head).modules()}
        shared = {
            id(value): value
            for module in kept.model.modules()
            if id(module) not in own
            for value in (*module._parameters.values(), *module._buffers.values())
            if value is not None
        }
        model: Any = copy.deepcopy(kept.model, memo=shared)
        torch.manual_seed(seed)
        for head in kept.new_heads:
            for module in model.get_submodule(head).modules():
                for value in module._parameters.values():
                    if value is not None:
                        value._is_hf_initialized = False
                model._init_weights(module)
        return Loaded(model.eval().requires_grad_(False), list(kept.new_heads))
