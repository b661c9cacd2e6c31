"""Dtypes by the names that options have for them, and models put into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rolora.adapter import quantised

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """fp32, bf16 or fp16: how options name it."""
    return next(name for name, known in DTYPES.items() if known == dtype)


@torch.no_grad()
def make_dense(model: Any, dtype: torch.dtype) -> None:
    """Every parameter in `dtype`, bitsandbytes' linears as plain ones."""
    for path, module in list(model.named_modules()):
        kind = quantised.kind_of(module)
        if kind is not None:
            weight = quantised.view(*quantised.take(module, kind)).dequantise(dtype)
            plain = nn.Linear(
                module.in_features, module.out_features, bias=module.bias is not None, device="meta"
            )
            plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), module.bias
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, plain)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for holder in (model, model.config):
        for name in (
            "quantization_config",
            "hf_quantizer",
            "is_quantized",
            "is_loaded_in_4bit",
            "is_loaded_in_8bit",
            "quantization_method",
        ):
            if name in vars(holder):
                delattr(holder, name)
    model.config.dtype = dtype
    kept = getattr(model, "_weight_conversions", None)
    if kept is not None:
        # What loading undid of the quantiser's own format cannot be done again on saving.
        model._weight_conversions = [
            c
            for c in kept
            if not any(hasattr(op, "hf_quantizer") for op in getattr(c, "operations", ()))
        ]


def keep_in_fp32(model: nn.Module, heads: Sequence[str]) -> None:
    """Heads that train stay fp32 on a 16-bit base: their input is raised, so small steps are not
    lost.
    """
    for head in heads:
        module = model.get_submodule(head).float()
        module.register_forward_pre_hook(_raise_inputs)


def _raise_inputs(module, args):
    return tuple(
        a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    )
