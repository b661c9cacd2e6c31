"""One adapted linear, forward and backward, by every contender; and what it keeps for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from rolora import RoLoRALinear
from rolora_kernels import use_backend
from rolora_kernels.weights import frozen_linear


class ManualLoRA(torch.autograd.Function):
    """What today's fused engines do by hand (Unsloth's LoRA backward, restated): keep X, always
    compute both factors' gradients, whatever trains.
    """

    @staticmethod
    def forward(ctx, x, W, A, B, scaling):
        ctx.save_for_backward(x, A, B)
        ctx.W, ctx.scaling = W, scaling
        return torch.addmm(x @ W.t(), x @ A.t(), B.t(), alpha=scaling)

    @staticmethod
    def backward(ctx, dy):
        x, A, B = ctx.saved_tensors
        dyB = dy @ B
        dA = ctx.scaling * (dyB.t() @ x)
        dB = ctx.scaling * (dy.t() @ (x @ A.t()))
        return (dy @ ctx.W).addmm_(dyB, A, alpha=ctx.scaling), None, dA, dB, None


CONTENDERS = ("frozen", "peft_default", "peft_phase", "ours", "ours_merged")


def contenders(
    M: int,
    K: int,
    N: int,
    r: int,
    dtype: torch.dtype,
    phase: str,
    device: str = "cpu",
    dropout: float = 0.0,
):
    """name → a step on the same input; `frozen` has no adapter and runs by the library that ours
    takes, `peft_default` trains both factors in fp32 (autocast on a 16-bit base), `peft_phase` has
    factors in the base's dtype and trains those of the phase. `ours` follows the plan that dispatch
    chooses, `ours_merged` multiplies with W + s·B A, which pays from .8 K rows on and has no place
    for dropout.
    """
    x = torch.randn(M, K, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(M, N, device=device, dtype=dtype)
    linear = nn.Linear(K, N, bias=False, device=device, dtype=dtype).requires_grad_(False)
    default, phased = (peft_layer(linear, r, given, dropout) for given in (None, dtype))
    for name, module in (("A", phased.q.lora_A), ("B", phased.q.lora_B)):
        module.requires_grad_(phase in (name, "BOTH"))
    ours = RoLoRALinear.from_linear(linear, rank=r, alpha=2 * r, dropout=dropout)
    nn.init.normal_(ours.lora_B)
    ours.set_phase(phase)

    def frozen(x):
        return frozen_linear(x, linear.weight)

    def merged(x):
        with use_backend("merged"):
            return ours(x)

    def step(forward, parameters):
        def run():
            for p in (x, *parameters):
                p.grad = None
            forward(x).backward(dy)

        return run

    def autocast(x):
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            return default.q(x)

    steps = {
        "frozen": step(frozen, ()),
        "peft_default": step(autocast, list(default.parameters())),
        "peft_phase": step(phased.q, list(phased.parameters())),
        "ours": step(ours, list(ours.parameters())),
        "ours_merged": step(merged, list(ours.parameters())),
    }
    forwards = {
        "frozen": frozen,
        "peft_default": autocast,
        "peft_phase": phased.q,
        "ours": ours,
        "ours_merged": merged,
    }
    if dropout:
        del steps["ours_merged"], forwards["ours_merged"]
    own = own_storages(linear, default, phased, ours)
    return steps, {name: lambda f=f: kept_bytes(f, x, own) for name, f in forwards.items()}


def peft_layer(
    linear: nn.Linear, r: int, dtype: torch.dtype | None = None, dropout: float = 0.0
) -> nn.Module:
    """PEFT's layer on the same weight, its factors fp32 or in `dtype`."""
    import peft  # where there is none, the others are measured all the same

    config = peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=["q"])
    model = peft.inject_adapter_in_model(config, nn.ModuleDict({"q": linear}))
    nn.init.normal_(model.q.lora_B["default"].weight)
    for module in (model.q.lora_A, model.q.lora_B):
        module.to(dtype or torch.float32)
    return model


def own_storages(*modules: nn.Module) -> set[int]:
    """Where the weights and buffers of modules lie."""
    return {
        t.untyped_storage().data_ptr()
        for module in modules
        for t in (*module.parameters(), *module.buffers())
    }


def kept(step: Callable[[], object], own: set[int]) -> int:
    """Bytes that autograd keeps of a step beyond `own` storages, of which it also keeps views;
    every storage once.
    """
    storages: dict[int, int] = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(size for pointer, size in storages.items() if pointer not in own)


def kept_bytes(forward: Callable[[torch.Tensor], object], x: torch.Tensor, own: set[int]) -> int:
    """The same of a forward on an activation in the middle of a model, not a leaf that lives on
    anyway.
    """
    return kept(lambda: forward(x * 1.0), own)
