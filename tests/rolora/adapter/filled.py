"""Adapted models away from their start, and what is close."""

import torch
from torch import nn

from rolora import LoRAConfig, attach
from rolora.adapter.model import adapted_layers


def filled(model, **config):
    attach(model, LoRAConfig(**({"rank": 2, "target_modules": ["query"]} | config)), seed=0)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B, std=0.3)
    return model


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
