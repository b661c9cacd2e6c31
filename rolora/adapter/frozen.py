"""Linears that are frozen and not adapted: the other half of a model's matmuls, by the library that
is faster where PyTorch's is not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rolora_kernels import gemm
from rolora_kernels.weights import frozen_linear


class FrozenLinear(nn.Linear):
    """An nn.Linear that is asked for no gradient of its own: same parameters, names and values (to
    rounding).
    """

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)


def is_plain(module: nn.Module) -> bool:
    """Whether `module` computes what an nn.Linear does, and nothing around it."""
    return type(module) in (nn.Linear, FrozenLinear)


def speed_up(model: nn.Module) -> list[str]:
    """Turns frozen plain fp32 linears on a CPU into FrozenLinear in place where `gemm` knows a
    faster library on this machine; returns their names. Weights, state dicts and hooks stay as they
    are; one that is adapted or trained afterwards works as before.
    """
    found = []
    for name, module in model.named_modules() if gemm.ahead() else ():
        if type(module) is nn.Linear and not any(p.requires_grad for p in module.parameters()):
            if module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
                module.__class__ = FrozenLinear
                found.append(name)
    return found
