"""bitsandbytes' quantised linears as frozen bases. The library is needed to load or make them, not to compute with them here.

Told by name and storage, so that bitsandbytes is imported only where a weight must be made, or read back from its CPU layout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rolora_kernels.weights import NF4, FrozenWeight, Int8


def kind_of(module: nn.Module) -> str | None:
    """"nf4" for a Linear4bit (fp4 included), "int8" for a Linear8bitLt, None for anything else."""
    names = {c.__name__ for c in type(module).__mro__ if c.__module__.startswith("bitsandbytes.")}
    return "nf4" if "Linear4bit" in names else "int8" if "Linear8bitLt" in names else None


def keep_differentiable(model: nn.Module) -> None:
    """Keeps bitsandbytes' remaining 4-bit linears on the path that has a gradient: on a CPU with AVX512-BF16 a forward in evaluation
    rearranges their weights for a kernel without one (0.50.2), and whatever lies below would then silently stop training."""
    for module in model.modules():
        if kind_of(module) == "nf4":
            module.support_avx512bf16_for_cpu = False
            _unpack(module.weight)


def _unpack(weight: nn.Parameter) -> None:
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)


def take(module: nn.Module, kind: str) -> tuple[nn.Parameter, Tensor | None]:
    """(the module's quantised parameter, its rows' scales where they are int8). Raises TypeError for one that is not quantised yet."""
    weight = module.weight
    if kind == "nf4":
        if getattr(weight, "quant_state", None) is None:
            raise TypeError("its 4-bit weight is not quantised yet: move the model to its device first")
        _unpack(weight)
        return weight.requires_grad_(False), None
    scale = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB  # a first forward moves it there
    values = weight.data if weight.dtype == torch.int8 else module.state.CB
    if scale is None or values is None or values.dtype != torch.int8:
        raise TypeError("its 8-bit weight is not quantised yet: move the model to its device first")
    return nn.Parameter(values, requires_grad=False), scale.detach()


def view(weight: nn.Parameter, scale: Tensor | None) -> FrozenWeight:
    """The parameter's storage as the kernels take it; nothing is copied."""
    return NF4.from_bitsandbytes(weight) if scale is None else Int8(weight.data, scale)


def stored(weight: nn.Parameter, kind: str) -> dict[str, Tensor]:
    """What bitsandbytes' own modules add to a state_dict beside `weight` (and the buffer SCB)."""
    if kind == "nf4":
        return {f"weight.{name}": value for name, value in weight.quant_state.as_dict(packed=True).items()}
    return {"weight_format": torch.tensor(0, dtype=torch.uint8)}


def restored(module: nn.Module, weight: nn.Parameter, scale: Tensor | None) -> nn.Module:
    """bitsandbytes' own module on what `take` or `requantised` gave."""
    if scale is None:
        module.weight = weight
        return module
    module.weight.data, module.weight.CB, module.weight.SCB = weight.data, weight.data, scale
    module.state.CB, module.state.SCB = None, None  # its next forward takes them from the parameter
    return module


def requantised(dense: Tensor, like: nn.Parameter, kind: str) -> tuple[nn.Parameter, Tensor | None]:
    """A dense fp32 `[out, in]` in the storage of `like`, as `take` gives it."""
    if kind == "int8":
        scale = dense.abs().amax(1).clamp(min=1e-30)
        return nn.Parameter((dense * (127 / scale)[:, None]).round_().to(torch.int8), requires_grad=False), scale
    import bitsandbytes as bnb

    state = like.quant_state
    return bnb.nn.Params4bit(
        dense.to(state.dtype).contiguous(), requires_grad=False, blocksize=state.blocksize, quant_type=state.quant_type,
        compress_statistics=state.nested).to(dense.device), None
