"""A layer under the transforms of torch.func: vmap, jvp, per-example gradients.

The same numbers in PyTorch's own operations, which they can transform; the kernels' autograd rule
is for plain backward alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from rolora_kernels.weights import dense


def forward(layer: Any, x: Tensor) -> Tensor:
    """What `layer` computes for x. Raises RuntimeError with dropout or in a cohort."""
    if layer.call.clients is not None or layer.active_dropout > 0.0:
        raise RuntimeError(
            "torch.func was called on an adapted layer with dropout, or in a cohort trained "
            "together: call model.eval() or set dropout=0 first, outside a cohort"
        )
    held = layer.base.kept() if layer.merged and not layer.enabled else layer.held
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    y = F.linear(x, dense(layer.base.weight(held), x.dtype), bias)
    if layer.merged or not layer.enabled:
        return y
    paths = [(layer.whole_B, layer.lora_A)]
    if layer.term is not None:
        paths.append(layer.term)
    for up, down in paths:
        y = y + layer.scaling * F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
    return y
