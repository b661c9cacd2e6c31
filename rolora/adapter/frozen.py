"""Linears that are frozen and not adapted, on a CPU: the other half of a model's matmuls, by the library that is fastest there."""

from __future__ import annotations

from torch import Tensor, nn

from rolora_kernels import gemm
from rolora_kernels.weights import frozen_linear


class FrozenLinear(nn.Linear):
    """An nn.Linear that is asked for no gradient of its own: same parameters, names and values (to rounding)."""

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)


def speed_up(model: nn.Module) -> list[str]:
    """Turns frozen plain linears of `model` into FrozenLinear in place where `gemm` knows a faster library for their dtype on this
    machine; returns their names. Call it once what trains has been settled; weights, state dicts and hooks stay as they are."""
    found = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not any(p.requires_grad for p in module.parameters()):
            if module.weight.device.type == "cpu" and module.weight.dtype in gemm.dtypes():
                module.__class__ = FrozenLinear
                found.append(name)
    return found
