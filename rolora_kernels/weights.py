"""Frozen base weights: what a linear's `W [out, in]` may be stored as.

The operation asks a weight for three things only: its shape, the device, and a dense `[out, in]`
tensor in the compute dtype for the length of one matmul. A quantised type implements `dequantise`
and is never kept dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rolora_kernels import dispatch, gemm, torch_ops
from rolora_kernels.torch_ops import LowRank


@runtime_checkable
class FrozenWeight(Protocol):
    """A frozen `[out, in]` matrix in any storage."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that x must have outside autocast; None if any will do (quantised types)."""

    def dequantise(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Dense `[out, in]` in `dtype`; written into `out` where given. Strides are free."""


class Dense:
    """A plain tensor `[out, in]` of any strides (GPT-2's Conv1D hands in a transposed view)."""

    def __init__(self, tensor: Tensor):
        if tensor.ndim != 2:
            raise ValueError(f"weight must be [out, in], got shape {list(tensor.shape)}")
        self.tensor = tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def dequantise(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return self.tensor.to(dtype) if out is None else out.copy_(self.tensor)


class NF4:
    """A 4-bit matrix in bitsandbytes' layout, dequantised for each matmul and never kept dense.

    packed: uint8, two elements a byte, the earlier one in the high nibble, row by row; absmax: fp32
    a block of `block` elements, or uint8 with `double` = (code2 fp32 [256], absmax2 fp32, block2,
    offset fp32 []); code: fp32 [16].
    """

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        code: Tensor,
        shape: Sequence[int],
        block: int = 64,
        double: tuple[Tensor, Tensor, int, Tensor] | None = None,
    ):
        out_features, in_features = shape
        size = out_features * in_features
        packed = packed.detach().reshape(-1).view(torch.uint8)
        if (
            packed.numel() != -(-size // 2)
            or absmax.numel() != -(-size // block)
            or block % 2
            or tuple(code.shape) != (16,)
        ):
            raise ValueError(
                f"a {out_features} × {in_features} matrix in blocks of {block} needs "
                f"{-(-size // 2)} packed bytes, "
                f"{-(-size // block)} absmax and 16 codes, got {packed.numel()}, {absmax.numel()} "
                f"and {list(code.shape)}"
            )
        if (absmax.dtype == torch.uint8) != (double is not None):
            raise ValueError(f"absmax is {absmax.dtype}: uint8 needs `double`, fp32 takes none")
        if double is not None and double[1].numel() != -(-absmax.numel() // double[2]):
            raise ValueError(
                f"{absmax.numel()} absmax in blocks of {double[2]} need "
                f"{-(-absmax.numel() // double[2])} scales of their own, "
                f"got {double[1].numel()}"
            )
        self.packed, self.absmax, self.code = packed, absmax, code
        self.block, self.double = block, double
        self.shape = torch.Size((out_features, in_features))

    @classmethod
    def from_bitsandbytes(cls, weight: Tensor) -> NF4:
        """The same storage as a `bitsandbytes.nn.Params4bit` that has been quantised; the library
        is not imported.
        """
        state = getattr(weight, "quant_state", None)
        if state is None:
            raise ValueError(
                "the weight has no quant_state: move the bitsandbytes layer to its device first, "
                "which quantises it"
            )
        double = None
        if state.nested:
            offset = state.offset.detach().to(torch.float32).reshape(())
            double = (state.state2.code, state.state2.absmax, state.state2.blocksize, offset)
        return cls(weight.data, state.absmax, state.code, state.shape, state.blocksize, double)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def dtype(self) -> None:
        return None

    def dequantise(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Dense `[out, in]`, bit for bit what bitsandbytes' dequantize_4bit gives, by the backend
        that `explain()` names.
        """
        out = torch.empty(self.shape, dtype=dtype, device=self.device) if out is None else out
        if (
            not out.is_contiguous()
            or tuple(out.shape) != tuple(self.shape)
            or out.device != self.device
        ):
            raise ValueError(
                f"out must be a contiguous {list(self.shape)} on {self.device}, got "
                f"{list(out.shape)} on {out.device}"
            )
        operation = "dequantise_nf4_double" if self.double else "dequantise_nf4"
        backend, reason = dispatch.choose_dequantise(self.packed, self.shape)
        shape = f"N={self.shape[0]} K={self.shape[1]}"
        dispatch.record(operation, backend, reason, shape, self.packed, 1)
        if backend == "triton":
            from rolora_kernels.triton_ops.dequantise_nf4 import dequantise_nf4

            return dequantise_nf4(self.packed, self.code, self.absmax, self.block, self.double, out)
        return torch_ops.dequantise_nf4(
            self.packed, self.code, self.absmax, self.block, self.double, out
        )

    def plus(self, low_rank: LowRank, dtype: torch.dtype) -> Tensor:
        """Dense W + scaling · B A: the sum in fp32, one rounding to `dtype`."""
        return torch_ops.dequantise_nf4(
            self.packed,
            self.code,
            self.absmax,
            self.block,
            self.double,
            torch.empty(self.shape, dtype=dtype, device=self.device),
            low_rank,
        )


class Int8:
    """An 8-bit matrix as bitsandbytes' Linear8bitLt stores it: values int8 `[out, in]`, `scale`
    fp32 `[out]`, each row's largest magnitude; W = values · scale / 127. X is not quantised here,
    which bitsandbytes' own matmul does beside.
    """

    def __init__(self, values: Tensor, scale: Tensor):
        if (
            values.dtype != torch.int8
            or values.ndim != 2
            or tuple(scale.shape) != (values.shape[0],)
        ):
            raise ValueError(
                f"values must be int8 [out, in] and scale [out], got {values.dtype} "
                f"{list(values.shape)} and "
                f"{list(scale.shape)}"
            )
        self.values, self.scale = values.detach(), scale.detach().float()

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> None:
        return None

    def dequantise(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Dense `[out, in]`: one product in fp32, one rounding to `dtype`."""
        made = self._exact()
        return made.to(dtype) if out is None else out.copy_(made)

    def plus(self, low_rank: LowRank, dtype: torch.dtype) -> Tensor:
        """Dense W + scaling · B A: the sum in fp32, one rounding to `dtype`."""
        A, B, scaling = low_rank
        return self._exact().addmm_(B.float(), A.float(), alpha=scaling).to(dtype)

    def _exact(self) -> Tensor:
        return torch.mul(self.values, (self.scale * (1 / 127))[:, None])


def no_autocast(x: Tensor):
    """A context without autocast on x's device; entering one that changes nothing takes longer than
    looking.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def dense(weight: Tensor | FrozenWeight, dtype: torch.dtype) -> Tensor:
    """`weight` as a dense `[out, in]` tensor in `dtype`, no copy when it already is one."""
    if not isinstance(weight, Tensor):
        return weight.dequantise(dtype)
    return weight if weight.dtype == dtype else weight.to(dtype)


def merged(
    weight: Tensor | FrozenWeight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    """W + scaling · B A in `dtype`, dense `[out, in]`: one product on vendor libraries and one
    rounding; the factors are rounded to `dtype` first, as everywhere. A FrozenWeight of another
    library's is dequantised to `dtype` before, which rounds it once more.
    """
    A, B = A.to(dtype), B.to(dtype)
    if isinstance(weight, NF4 | Int8):
        return weight.plus((A, B, scaling), dtype)
    if not isinstance(weight, Tensor):
        weight = weight.tensor if isinstance(weight, Dense) else weight.dequantise(dtype)
    wide = torch.promote_types(weight.dtype, dtype)
    made = torch.addmm(weight.to(wide), B.to(wide), A.to(wide), alpha=scaling)
    return made.to(dtype)


def frozen_linear(x: Tensor, weight: Tensor | FrozenWeight, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + bias`, x `[..., in]` in any floating dtype → `[..., out]` in x's (autocast's under
    autocast). Only x has a gradient; a quantised weight is dequantised again in backward: between
    the two no dense copy of W is kept, which torch's own linear would save. A dense one goes by
    whichever library is faster (gemm).
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    if isinstance(weight, Tensor):
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        if autocast or trains or not gemm.by_onednn(x, weight):
            return torch.nn.functional.linear(x, weight, bias)
        shape = f"M={x.numel() // x.shape[-1]} K={x.shape[-1]} N={weight.shape[0]}"
        dispatch.record(
            "frozen_linear", "torch", "not adapted; oneDNN, called directly", shape, x, 1
        )
    if autocast:
        x = x.to(torch.get_autocast_dtype(device))
    y = _FrozenLinear.apply(
        x.reshape(-1, x.shape[-1]), weight, None if bias is None else bias.to(x.dtype)
    )
    return y.view(*x.shape[:-1], y.shape[-1])


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.quantised = None if isinstance(weight, Tensor) else weight
        ctx.save_for_backward(
            weight if isinstance(weight, Tensor) and ctx.needs_input_grad[0] else None
        )
        with no_autocast(x):
            return gemm.abt(x, dense(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        with no_autocast(dy):
            weight = dense(ctx.quantised, dy.dtype) if weight is None else weight
            if torch.is_grad_enabled():  # for a gradient of this gradient
                return _FrozenLinear.apply(dy, weight.t(), None), None, None
            return gemm.abt(dy, weight.t()), None, None
