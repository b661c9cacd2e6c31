"""The operation in plain PyTorch, differentiable by autograd: the oracle of every test, and a
backend for the doubtful.

Y = X Wᵀ + bias + scaling · (drop(X) Aᵀ) Bᵀ      (LoRA, Hu et al. 2021, eq. 3)
"""

from __future__ import annotations

from torch import Tensor

from rolora_kernels import dropout as _dropout
from rolora_kernels.dropout import Dropout


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """`x [..., in]`, `weight [out, in]`, `lora_A [r, in]`, `lora_B [out, r]`, `bias [out]` → `[...,
    out]`; one dtype.
    """
    dropped = x
    if dropout is not None and dropout.p > 0.0:
        flat = x.reshape(-1, x.shape[-1])
        keep = _dropout.keep_mask(range(len(flat)), flat.shape[1], dropout).view(x.shape)
        dropped = x * keep.to(x.dtype) / (1.0 - dropout.p) if dropout.p < 1.0 else x * 0.0
    y = x @ weight.t() + scaling * ((dropped @ lora_A.t()) @ lora_B.t())
    return y if bias is None else y + bias
