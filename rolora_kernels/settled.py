"""What is settled for all calls of one kind: operands checked, a plan chosen and its words written
when the first one comes, and looked up from the second on.

A kind is all that those follow from: shapes, dtypes, devices, what requires grad, the state of
autocast and of dispatch; never a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rolora_kernels import dispatch, gemm, operands, primitives, tuned
from rolora_kernels.plan import TORCH, Plan
from rolora_kernels.rows import AdapterRows
from rolora_kernels.torch_ragged import Ragged
from rolora_kernels.weights import FrozenWeight

_MOST = 4096  # kinds that are remembered


@dataclass(eq=False)
class Kind:
    """What calls of a kind have in common.

    dtype: of the computation. x_shape: as it comes to the rule. apart: whether `ops` compute
    adapters' or experts' rows one after another. plain: whether the rule in plain computes it.
    key: the record's (dispatch).
    """

    plan: Plan
    ops: Any
    dtype: torch.dtype
    x_shape: torch.Size
    clients: int
    ranks: tuple[int, ...]
    key: tuple[Any, ...]
    apart: bool = False
    plain: bool = False
    choice: dispatch.Choice | None = None

    def __post_init__(self) -> None:
        self.flat = len(self.x_shape) == 2
        self.wide = self.dtype in (torch.float32, torch.float64)
        self.device = self.key[5]
        self.state: tuple[Any, ...] = ()  # of one that is remembered: what `state` was


_kinds: dict[tuple[Any, ...], Kind] = {}


def state(device: str) -> tuple[Any, ...]:
    """What a kind follows from beside the operands."""
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return autocast, dispatch.forced(), tuned.installed(), torch._C._get_mkldnn_enabled()


def kind_of(
    x: Tensor,
    weights: Sequence[Tensor | FrozenWeight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dropout: bool,
) -> Kind:
    """The kind of a call on `x [..., K]`, with or without dropout. Raises what `operands.check` and
    `dispatch.choose` raise.
    """
    if torch.compiler.is_compiling():
        return settle(x, weights, lora_As, lora_Bs, biases, dropout)
    device = x.device
    key: list[Any] = [x.shape, x.dtype, device, dropout, state(device.type), len(weights)]
    for W in weights:
        key += (W.shape, W.dtype, W.device, W.requires_grad if isinstance(W, Tensor) else None)
    for group in lora_As, lora_Bs, biases:
        key.append(len(group))
        for t in group:
            key += (None,) if t is None else (t.shape, t.dtype, t.device, t.requires_grad)
    kind = _kinds.get(given := tuple(key))
    if kind is None:
        kind = settle(x, weights, lora_As, lora_Bs, biases, dropout)
        kind.state = key[4]
        if len(_kinds) >= _MOST:
            _kinds.clear()
        _kinds[given] = kind
    return kind


def settle(
    x: Tensor,
    weights: Sequence[Tensor | FrozenWeight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dropout: bool,
    rows: AdapterRows | None = None,
    ragged: Ragged | None = None,
) -> Kind:
    """A kind made anew, for a call whose rows `rows` sorts as well, and `ragged` computes where
    they are not shared out evenly.
    """
    operands.check(x, weights, lora_As, lora_Bs, biases, rows)
    device, dtype = x.device.type, x.dtype
    if not torch.is_autocast_enabled(device):
        operands.check_dtype(x, weights)
    elif dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    flat = x.detach().reshape(-1, x.shape[-1]).to(dtype)
    ranks = tuple(A.shape[-2] for A in lora_As)
    clients = operands.clients_of(lora_As, lora_Bs)
    given = dispatch.Given(ranks, clients, ragged is not None, dropout)
    plan, reason = dispatch.choose(flat, weights, given)
    key = ("lora_linear", plan, reason, _text(flat, weights, ranks), dtype, x.device, len(weights))
    ops = primitives.of(plan) if ragged is None else ragged
    is_plain = plan == TORCH and rows is None and not (clients or dropout)
    is_plain = is_plain and _all_by_torch(flat, weights, ranks)
    return Kind(plan, ops, dtype, x.shape, clients, ranks, key, ragged is not None, is_plain)


def _all_by_torch(
    flat: Tensor, weights: Sequence[Tensor | FrozenWeight], ranks: tuple[int, ...]
) -> bool:
    """Whether every product of a call that vendor libraries compute, without dropout and clients,
    is PyTorch's own, on weights that are as they will be multiplied.
    """
    if torch.is_autocast_enabled(flat.device.type) or torch.compiler.is_compiling():
        return False
    (M, K), R, N = flat.shape, sum(ranks), max(W.shape[0] for W in weights)
    largest = M * max(N * K, R * K, R * N)
    dense = all(isinstance(W, Tensor) for W in weights)
    return dense and not gemm.by_name(flat, largest)


def forget() -> None:
    """Settles every kind anew."""
    _kinds.clear()


def _text(flat: Tensor, weights: Sequence[Tensor | FrozenWeight], ranks: Sequence[int]) -> str:
    """The shape as `explain` lists it."""
    if torch.compiler.is_compiling():
        return ""
    sizes = "+".join(str(W.shape[0]) for W in weights)
    return f"M={flat.shape[0]} K={flat.shape[1]} N={sizes} r={'+'.join(map(str, ranks))}"
