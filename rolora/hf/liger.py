"""Liger's Triton kernels (Hsu et al.

2024) for what is not ours: norms, rotary embedding, gated activations and cross-entropy.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from typing import Any

import torch
from torch import Tensor, nn

from rolora.errors import BadInput

_OFF = {
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}  # a run's loss is per token: ours, around Liger's cross-entropy


def apply(model: nn.Module, name: str, device: torch.device) -> None:
    """Patches `model` in place as transformers' own integration does, and marks it with
    `liger_kernels`, what it runs from now on.

    The rotary embedding is patched for every model of that architecture in the process: Liger
    replaces the function. Raises BadInput without the package, without a GPU (or Triton's
    interpreter), or for an architecture that Liger has nothing for.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise BadInput(
            "--liger needs the package `liger-kernel`: pip install '.[liger]' in your clone"
        )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BadInput(
            f"--liger needs a GPU, its kernels are Triton's, and --device is {device}: leave it out"
        )
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN
    from transformers.integrations.liger import apply_liger_kernel

    patched: Any = model
    kind = patched.config.model_type
    if kind not in KNOWN:
        raise BadInput(
            f"--liger: Liger has no kernels for {name}, a {kind} model; it has them for "
            f"{', '.join(sorted(KNOWN))}"
        )
    apply_liger_kernel(model, _OFF)
    switches = inspect.signature(KNOWN[kind]).parameters.values()
    patched.liger_kernels = (
        *(p.name for p in switches if p.default is True and p.name not in _OFF),
        "cross_entropy",
    )


def losses_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(-log p of each row's label, fp32 `[n]`; its gradient with respect to the logits), from `[n,
    vocabulary]` in any dtype, which is overwritten.
    """
    from liger_kernel.transformers.functional import liger_cross_entropy

    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        losses = liger_cross_entropy(leaf, labels, reduction="none")
        (gradient,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses))
    return losses.detach().float(), gradient
