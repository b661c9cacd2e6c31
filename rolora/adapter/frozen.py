"""Linears that are frozen and not adapted: the other half of a model's matmuls, by the library that is faster where PyTorch's is not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rolora_kernels import gemm
from rolora_kernels.weights import frozen_linear


class FrozenLinear(nn.Linear):
    """An nn.Linear that is asked for no gradient of its own: same parameters, names and values (to rounding)."""

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)


def speed_up(model: nn.Module) -> list[str]:
    """Turns frozen plain fp32 linears on a CPU into FrozenLinear in place where `gemm` knows a faster library on this machine; returns their
    names. Call it once what trains has been settled; weights, state dicts and hooks stay as they are."""
    found = []
    for name, module in model.named_modules() if gemm.ahead() else ():
        if type(module) is nn.Linear and not any(p.requires_grad for p in module.parameters()):
            if module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
                module.__class__ = FrozenLinear
                found.append(name)
    return found
