"""Quantised linears as frozen bases: bitsandbytes' modules, and our own for what it has saved,
where the library is not installed.

Its modules are told by name and storage, so that it is imported only where a weight must be made,
or read back from its CPU layout.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from rolora_kernels.weights import NF4, FrozenWeight, Int8, frozen_linear

# + nf4 or fp4: where bitsandbytes saves its numbers, as JSON in bytes
STATE = "quant_state.bitsandbytes__"


class SavedState:
    """What bitsandbytes saves beside a 4-bit weight, under its QuantState's own names: `tensors`
    are the checkpoint's, keys without "weight.". Raises ValueError for one that is missing.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = dict(tensors)
        numbers = next((value for key, value in tensors.items() if key.startswith(STATE)), None)
        if numbers is None:
            raise ValueError(f"lacks weight.{STATE}nf4")
        self.numbers = json.loads(bytes(numbers.tolist()))
        self.nested = "nested_blocksize" in self.numbers
        for key in (
            "absmax",
            "quant_map",
            *(("nested_absmax", "nested_quant_map") if self.nested else ()),
        ):
            if key not in tensors:
                raise ValueError(f"lacks weight.{key}")
        self.shape, self.blocksize = torch.Size(self.numbers["shape"]), self.numbers["blocksize"]
        self.quant_type, self.dtype = (
            self.numbers["quant_type"],
            getattr(torch, self.numbers["dtype"]),
        )
        self.offset = torch.tensor(
            float(self.numbers.get("nested_offset", 0.0)), device=tensors["absmax"].device
        )

    @property
    def absmax(self) -> Tensor:
        return self.tensors["absmax"]

    @property
    def code(self) -> Tensor:
        return self.tensors["quant_map"]

    @property
    def state2(self) -> _Nested:
        return _Nested(self)

    def as_dict(self, packed: bool = True) -> dict[str, Tensor]:
        return dict(self.tensors)

    def to(self, device: torch.device | str) -> None:
        self.tensors, self.offset = (
            {key: value.to(device) for key, value in self.tensors.items()},
            self.offset.to(device),
        )


class _Nested:
    """The second quantisation, of the scales."""

    def __init__(self, state: SavedState):
        self.absmax, self.code = state.tensors["nested_absmax"], state.tensors["nested_quant_map"]
        self.blocksize = state.numbers["nested_blocksize"]


class SavedWeight(nn.Parameter):
    """A 4-bit weight as saved, uint8, with its `quant_state`, which follows it to other devices and
    into copies.
    """

    quant_state: SavedState

    def __new__(cls, data: Tensor, quant_state: SavedState) -> SavedWeight:
        made = super().__new__(cls, data, requires_grad=False)
        made.quant_state = quant_state
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> SavedWeight:
        made = memo[id(self)] = SavedWeight(
            self.data.clone(), copy.deepcopy(self.quant_state, memo)
        )
        return made

    def to(self, *args: Any, **kwargs: Any) -> Any:
        moved = super().to(*args, **kwargs)
        self.quant_state.to(moved.device)
        return moved

    def cuda(  # type: ignore[override]
        self, device: Any = None, non_blocking: bool = False, **options: Any
    ) -> Any:
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def cpu(self, **options: Any) -> Any:  # type: ignore[override]
        return self.to("cpu")


class SavedLinear(nn.Linear):
    """A linear of a checkpoint that bitsandbytes has quantised, computed by the kernels here.

    `kind`: "nf4" or "int8"; weight uint8 with a `quant_state`, or int8 `[out, in]` with SCB fp32
    `[out]`; bias `[out]` or None.
    """

    def __init__(self, weight: nn.Parameter, scale: Tensor | None, bias: nn.Parameter | None):
        nn.Module.__init__(self)
        self.kind, self.weight = "nf4" if scale is None else "int8", weight
        self.register_parameter("bias", bias)
        if scale is not None:
            self.register_buffer("SCB", scale)
        self.out_features, self.in_features = view(weight, scale).shape

    @property
    def scale(self) -> Tensor | None:
        return getattr(self, "SCB", None)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, view(self.weight, self.scale), self.bias)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in stored(self.weight, self.kind).items():
            destination[prefix + name] = value if keep_vars else value.detach()

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self.kind}"


def kind_of(module: nn.Module) -> str | None:
    """ "nf4" for a Linear4bit (fp4 included), "int8" for a Linear8bitLt, either for a SavedLinear,
    None for anything else.
    """
    if isinstance(module, SavedLinear):
        return module.kind
    names = {c.__name__ for c in type(module).__mro__ if c.__module__.startswith("bitsandbytes.")}
    if "Linear4bit" in names:
        return "nf4"
    return "int8" if "Linear8bitLt" in names else None


def keep_differentiable(model: nn.Module) -> None:
    """Keeps bitsandbytes' remaining 4-bit linears on the path that has a gradient: on a CPU with
    AVX512-BF16 a forward in evaluation rearranges their weights for a kernel without one (0.50.2),
    and whatever lies below would then silently stop training.
    """
    for module in cast(Iterator[Any], model.modules()):
        if kind_of(module) == "nf4" and not isinstance(module, SavedLinear):
            module.support_avx512bf16_for_cpu = False
            _unpack(module.weight)


def mark_trainable(model: Any, trainable: bool) -> None:
    """Hugging Face's Trainer refuses a model with `is_quantized` unless PEFT's adapters are on it:
    the mark is off while ours are.
    """
    if trainable and getattr(model, "is_quantized", False):
        model.is_quantized, model.quantized_base = False, True
    elif not trainable and model.__dict__.pop("quantized_base", False):
        model.is_quantized = True


def _unpack(weight: Any) -> None:
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(
            weight.data, weight.quant_state
        )


def numel(parameter: nn.Parameter) -> int:
    """Elements of the matrix that a parameter stands for; a 4-bit one packs two and more into each
    of its own.
    """
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()


def take(module: Any, kind: str) -> tuple[nn.Parameter, Tensor | None]:
    """(the module's quantised parameter, its rows' scales where they are int8).

    Raises TypeError for one that is not quantised yet.
    """
    weight = module.weight
    if isinstance(module, SavedLinear):
        return weight, module.scale
    if kind == "nf4":
        if getattr(weight, "quant_state", None) is None:
            raise TypeError(
                "its 4-bit weight is not quantised yet: move the model to its device first"
            )
        _unpack(weight)
        return weight.requires_grad_(False), None
    scale = (
        weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
    )  # a first forward moves it there
    values = weight.data if weight.dtype == torch.int8 else module.state.CB
    if scale is None or values is None or values.dtype != torch.int8:
        raise TypeError("its 8-bit weight is not quantised yet: move the model to its device first")
    return nn.Parameter(values, requires_grad=False), scale.detach()


def view(weight: Tensor, scale: Tensor | None) -> FrozenWeight:
    """The parameter's storage as the kernels take it; nothing is copied."""
    return NF4.from_bitsandbytes(weight) if scale is None else Int8(weight.data, scale)


def stored(weight: Any, kind: str) -> dict[str, Tensor]:
    """What bitsandbytes' own modules add to a state_dict beside `weight` (and the buffer SCB)."""
    if kind == "nf4":
        return {
            f"weight.{name}": value
            for name, value in weight.quant_state.as_dict(packed=True).items()
        }
    return {"weight_format": torch.tensor(0, dtype=torch.uint8)}


def dense_dtype(weight: Any, kind: str) -> torch.dtype:
    """The dtype that a weight was quantised from, as far as bitsandbytes keeps it."""
    return weight.quant_state.dtype if kind == "nf4" else torch.float32


def restored(module: Any, weight: Tensor, scale: Tensor | None) -> nn.Module:
    """The quantised module on what `take` or `requantised` gave."""
    if scale is None or isinstance(module, SavedLinear):
        module.weight = weight
        if scale is not None:
            module.SCB = scale
        return module
    module.weight.data, module.weight.CB, module.weight.SCB = weight.data, weight.data, scale
    module.state.CB, module.state.SCB = None, None  # its next forward takes them from the parameter
    return module


def requantised(dense: Tensor, like: Any, kind: str) -> tuple[nn.Parameter, Tensor | None]:
    """A dense fp32 `[out, in]` in the storage of `like`, as `take` gives it."""
    if kind == "int8":
        scale = dense.abs().amax(1).clamp(min=1e-30)
        return nn.Parameter(
            (dense * (127 / scale)[:, None]).round_().to(torch.int8), requires_grad=False
        ), scale
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise RuntimeError(
            "quantising to 4 bits again needs the package `bitsandbytes`: pip install "
            "'.[quantize]' in your clone, or merge into a "
            "dense base"
        ) from None
    state = like.quant_state
    made: Any = bnb.nn.Params4bit(
        dense.to(state.dtype).contiguous(),
        requires_grad=False,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        compress_statistics=state.nested,
    )
    return made.to(dense.device), None
