"""Classification heads that train, with each client's own weights, in one forward of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rolora.adapter.frozen import is_plain


@contextmanager
def client_heads(
    model: nn.Module, heads: Iterable[str], parameters: list[Tensor], clients: int
) -> Iterator[None]:
    """While open, linears of heads that train compute with each client's own weights."""
    changed, rest = [], list(parameters)
    for head in heads if parameters else ():
        for _, module in model.get_submodule(head).named_modules():
            if is_plain(module):
                own = [rest.pop(0) for _ in module.parameters(recurse=False)]
                module.forward = _head_forward(own[0], own[1] if len(own) > 1 else None, clients)
                changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _head_forward(weight: Tensor, bias: Tensor | None, clients: int) -> Callable[[Tensor], Tensor]:
    """`x [C·b, …, in]` by weights `[C, out, in]` and biases `[C, out]`."""

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(clients, -1, x.shape[-1])
        dtype = (
            torch.get_autocast_dtype(x.device.type)
            if torch.is_autocast_enabled(x.device.type)
            else rows.dtype
        )
        y = torch.bmm(rows.to(dtype), weight.to(dtype).transpose(1, 2))
        y = y if bias is None else y + bias.to(dtype)[:, None]
        return y.view(*x.shape[:-1], weight.shape[1])

    return forward
