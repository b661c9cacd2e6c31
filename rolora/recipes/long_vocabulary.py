"""Cross-entropy over a long vocabulary without the whole of its logits: token by token chunk,
forward and gradient at once.

For `[n, vocabulary]` logits a causal LM keeps n · vocabulary numbers in the model's dtype, again in
fp32, and once more as gradient (Llama-2, 512 tokens: 64 MiB in fp32). The output embedding is
frozen here, so the gradient of each token's loss with respect to its hidden state can be made while
its logits exist, and only `[n, hidden]` numbers are kept (as Liger's fused loss does, Hsu et al.
2024).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from rolora.adapter.frozen import is_plain
from rolora.hf import liger
from rolora.recipes import Batch
from rolora_kernels import gemm

LONG = 16_384  # entries; below it the plain way is as good
_CHUNK = (
    1 << 24
)  # logits at a time: enough rows that reading the embedding for them is not what takes the time
_CACHED = (
    1 << 19
)  # of them, those whose softmax a CPU makes at a time: 2 MiB in fp32 stay in its cache
_LARGE = 100.0  # the size of the logits that a model is tried on: any cap would show
_tried: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def applies(model: Any) -> bool:
    """Whether `model` is a causal LM whose logits are its last hidden states times a long, frozen,
    plain output embedding: told from what it computes, once for a model.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if (
        head is None
        or not is_plain(head)
        or head.bias is not None
        or head.weight.requires_grad
        or head.out_features < LONG
    ):
        return False
    if (
        head._forward_hooks
        or head._forward_pre_hooks
        or not hasattr(model, model.base_model_prefix)
    ):
        return False
    if model not in _tried:
        _tried[model] = _are_products(model, head.weight)
    return _tried[model]


class _Hidden(BaseModelOutputWithPast):
    """Hidden states, and nothing of what else some bases return."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@torch.no_grad()
def _are_products(model: Any, weight: Tensor) -> bool:
    """Whether the model's logits are hidden states times the embedding, and nothing else: no scale,
    no cap. Tried on hidden states of our own, large ones, in place of what the base computes.
    """
    hidden = torch.randn(1, 4, weight.shape[1], generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(weight)
    ids = torch.zeros(1, 4, dtype=torch.long, device=weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        hidden *= _LARGE / (hidden @ weight.t()).float().square().mean().sqrt()
        wanted = (hidden @ weight.t()).double()
        with _giving(_bases(model), _Hidden(last_hidden_state=hidden)):
            try:
                logits = model(input_ids=ids, use_cache=False).logits
            except Exception:  # a model that asks more of its base: the plain way is always right
                return False
    if logits.shape != wanted.shape:
        return False
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
    return bool((logits.double() - wanted).norm() < tolerance * wanted.norm())


def _bases(model: Any) -> list[nn.Module]:
    """What the model may take its hidden states from: its base, or the decoder in it."""
    base = getattr(model, model.base_model_prefix)
    inner = getattr(base, "decoder", None)
    return [base, inner] if isinstance(inner, nn.Module) else [base]


@contextmanager
def _giving(modules: Sequence[Any], output: object) -> Iterator[None]:
    """The modules return `output`, whatever they are given."""
    before = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = lambda *args, **options: output
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own


def token_losses(model: Any, batch: Batch, ignored: int) -> Tensor:
    """-log p of every token of `labels[:, 1:]`, 0 where it is `ignored`: fp32 `[examples, length −
    1]`. A carried place beyond the last fills the batch up: some token's loss, which goes nowhere.
    """
    hidden, weight = hidden_states(model, batch.inputs)
    wanted = batch.labels[:, 1:]
    places = batch.carried
    if places is None:
        places = (wanted != ignored).flatten().nonzero().squeeze(1)
    there = places.clamp(max=wanted.numel() - 1)
    own = _Losses.apply(
        hidden.flatten(0, 1).index_select(0, there),
        weight,
        wanted.flatten().index_select(0, there).clamp(min=0),
        "cross_entropy" in getattr(model, "liger_kernels", ()),
    )
    losses = own.new_zeros(wanted.numel() + 1).index_put((places,), own)
    return losses[:-1].view(wanted.shape)


def hidden_states(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(last hidden states of all tokens but the last `[examples, length − 1, h]`, output embedding
    `[vocabulary, h]`) of a model that `applies`.
    """
    states = getattr(model, model.base_model_prefix)(**inputs).last_hidden_state[:, :-1]
    return states, model.get_output_embeddings().weight


class _Losses(torch.autograd.Function):
    """hidden `[n, h]`, weight `[v, h]` frozen, labels `[n]`, by_liger: bool → losses fp32 `[n]`."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, by_liger):
        rows = max(1, _CHUNK // weight.shape[0])
        inner = rows if hidden.is_cuda else max(1, _CACHED // weight.shape[0])
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        with torch.autocast(hidden.device.type, enabled=False):
            weight = weight.to(hidden.dtype)
            for start in range(0, len(hidden), rows):
                chunk = slice(start, start + rows)
                logits = gemm.abt(hidden[chunk], weight)
                if by_liger:
                    losses[chunk], logits = liger.losses_and_gradient(logits, labels[chunk])
                parts = zip(
                    logits.split(inner),
                    labels[chunk, None].split(inner),
                    losses[chunk].split(inner),
                    strict=True,
                )
                for part, own, loss in () if by_liger else parts:
                    log_p = torch.log_softmax(part, 1, dtype=torch.float32)
                    torch.neg(log_p.gather(1, own).squeeze(1), out=loss)
                    if (
                        gradient is not None
                    ):  # softmax less one at the label, over the logits that it was made from
                        p = log_p.exp_()
                        part.copy_(
                            p.scatter_add_(1, own, torch.full_like(own, -1.0, dtype=p.dtype))
                        )
                if gradient is not None:
                    gradient[chunk] = gemm.abt(logits, weight.t())
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return (
            (None if gradient is None else (gradient * upstream[:, None]).to(gradient.dtype)),
            None,
            None,
            None,
        )
