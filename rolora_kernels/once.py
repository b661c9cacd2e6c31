"""A backward that can be taken once, and says so."""

from __future__ import annotations

import functools
from typing import Any

import torch

_TWICE = (
    b"a LoRA linear was differentiated twice, and its kernels have one backward: take the second "
    b"derivative by torch.func (grad, jvp, vmap of functional_call), which they leave to PyTorch"
)


def once(backward):
    """Refuses a gradient of the gradients, even where it would only reach the factors: torch's own
    once_differentiable looks at the incoming gradients alone, and lets that one be silently zero.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *dys):
        if not torch.is_grad_enabled():
            return backward(ctx, *dys)
        with torch.no_grad():
            grads = backward(ctx, *dys)
        refuse = torch._C._functions.DelayedError(_TWICE, len(grads))
        given: list[Any] = [None if g is None else g.detach().requires_grad_() for g in grads]
        return refuse(*given)

    return wrapper
