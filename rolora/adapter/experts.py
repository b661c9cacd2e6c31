"""How a module computes with parameters that are adapted.

A mixture of experts that transformers can dispatch (`@use_experts_implementation`: gate and up in
one weight, an activation, down) is *routed*: tokens are sorted by expert once, and every expert's
tokens meet its weight and its own two factors. No expert's product B A is ever made. Any other
module is handed W + scaling · B A for the length of its forward, as PEFT does it: as large as W,
and so is the gradient that the factors' are made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch._C import _functorch

from rolora.adapter.call import MixesExamples
from rolora.adapter.parameter import RoLoRAParameter, part_name
from rolora_kernels.expert_rows import ExpertRows
from rolora_kernels.experts import expert_lora_linear
from rolora_kernels.weights import frozen_linear

# What `@use_experts_implementation` puts on every mixture that it decorates.
_FACTS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "num_experts")
_ROUNDINGS = 64  # of the weight's dtype, by which two ways to compute a mixture may differ
_PROBED = 16  # tokens


class Owner(nn.Module):
    """A module some of whose parameters are adapted: the class that it had, with another forward.

    Its parameters, state dict and hooks stay as they were; the paths are parts of it,
    `lora_<parameter>`.
    """

    adapted_class: ClassVar[type[nn.Module]]
    general: str | None  # why W + Δ is made; None where tokens are routed

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        parts = parts_of(self)
        if self.general is None and not _transformed() and any(p.computes for p in parts.values()):
            if all(part.enabled or not part.merged for part in parts.values()):
                return _routed(self, parts, *args, **kwargs)
        changed = {}
        for name, part in parts.items():
            if part.computes:
                changed[name] = _changed(part)
            elif part.merged and not part.enabled:
                changed[name] = part.base_weight()
        with _in_place_of(self, changed):
            return super().forward(*args, **kwargs)

    def parts(self) -> dict[str, RoLoRAParameter]:
        """parameter → its path."""
        return parts_of(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Its class is made at run time: copies and pickles make it again.
        return _empty, (self.adapted_class,), self.__dict__


def adopt(owner: nn.Module, layers: Sequence[RoLoRAParameter]) -> None:
    """Has `owner` compute with these paths over its parameters."""
    for layer in layers:
        owner.add_module(part_name(layer.parameter_name), layer)
    made = cast(Owner, owner)
    made.__class__ = _owner_class(type(owner))
    made.general = None
    made.general = _why_not_routed(made)


def release(owner: nn.Module) -> None:
    """`owner` as it was, without paths."""
    made = cast(Owner, owner)
    for name in parts_of(made):
        delattr(made, part_name(name))
    del made.general
    made.__class__ = made.adapted_class  # type: ignore[assignment]


def parts_of(owner: nn.Module) -> dict[str, RoLoRAParameter]:
    """parameter → its path."""
    parts = owner._modules.values()
    return {part.parameter_name: part for part in parts if isinstance(part, RoLoRAParameter)}


_classes: dict[type[nn.Module], type[Owner]] = {}


def _owner_class(adapted: type[nn.Module]) -> type[Owner]:
    if adapted not in _classes:
        facts = {"adapted_class": adapted, "__module__": adapted.__module__}
        _classes[adapted] = type(f"RoLoRA{adapted.__name__}", (Owner, adapted), facts)
    return _classes[adapted]


def _empty(adapted: type[nn.Module]) -> Owner:
    made = _owner_class(adapted)
    return made.__new__(made)


def _transformed() -> bool:
    """Whether torch.func looks on, which our kernels' rule is not for."""
    return _functorch.peek_interpreter_stack() is not None


def _changed(part: RoLoRAParameter) -> Tensor:
    if part.call.clients is not None:
        raise MixesExamples(
            f"{part.parameter_name} is computed as W + Δ, which has no room for a cohort's factors"
        )
    return part.changed()


@contextmanager
def _in_place_of(owner: nn.Module, changed: Mapping[str, Tensor]) -> Iterator[None]:
    """Has `owner.<name>` read as `changed` says: an instance's own attributes are found before its
    parameters are looked for.
    """
    owner.__dict__.update(changed)
    try:
        yield
    finally:
        for name in changed:
            del owner.__dict__[name]


def _routed(
    owner: Any,
    parts: Mapping[str, RoLoRAParameter],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """What transformers' own implementations compute, with every expert's path.

    hidden_states `[..., in]` of M tokens, top_k_index int64 and top_k_weights `[M, k]`; gives the
    shape and the dtype of hidden_states.
    """
    tokens, chosen = hidden_states.reshape(-1, hidden_states.shape[-1]), top_k_index.shape[-1]
    clients = _clients(parts, len(tokens))
    rows = ExpertRows.of(top_k_index.reshape(-1), owner.num_experts, clients)
    of_token = rows.pairs.sort(torch.arange(len(tokens) * chosen, device=tokens.device) // chosen)
    up = "gate_up_proj" if owner.has_gate else "up_proj"
    y = _projected(owner, parts, up, tokens[of_token], rows)
    y = owner._apply_gate(y) if owner.has_gate else owner.act_fn(y)
    y = _projected(owner, parts, "down_proj", y, rows)
    if owner.has_post_expert_norm:
        y = owner.post_expert_norm(y)
    y = y * rows.pairs.sort(top_k_weights.reshape(-1, 1))
    y = rows.pairs.restore(y).view(len(tokens), chosen, -1).sum(1)
    return y.to(hidden_states.dtype).view(*hidden_states.shape[:-1], y.shape[-1])


def _clients(parts: Mapping[str, RoLoRAParameter], tokens: int) -> int:
    """How many clients the tokens come from, as many from each."""
    for part in parts.values():
        own = part.call.clients
        if own is None:
            continue
        if tokens % own.batch:
            raise MixesExamples(
                f"a cohort of {own.batch} examples is trained together, but a mixture of experts "
                f"was called with {tokens} tokens: this model reorders or mixes examples"
            )
        return next((len(f) for f in (own.A, own.B) if f is not None), 1)
    return 1


def _projected(
    owner: Any, parts: Mapping[str, RoLoRAParameter], name: str, x: Tensor, rows: ExpertRows
) -> Tensor:
    weight = getattr(owner, name)
    weight = weight.transpose(1, 2) if owner.is_transposed else weight
    bias = getattr(owner, f"{name}_bias") if owner.has_bias else None
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)
    part = parts.get(name)
    if part is None or not part.computes:
        return _frozen(x, weight, bias, rows)
    A, B = part.factors()
    y = expert_lora_linear(x, weight, A, B, part.scaling, bias, rows=rows)
    if part.term is None:
        return y
    U, V = (factor.to(y.dtype) for factor in part.term)
    return y + part.scaling * _frozen(_frozen(x.to(y.dtype), V, None, rows), U, None, rows)


def _frozen(x: Tensor, weight: Tensor, bias: Tensor | None, rows: ExpertRows) -> Tensor:
    """`x_e W_eᵀ + b_e` of every expert, of which only x has a gradient."""
    parts = [
        frozen_linear(x[own], weight[e], None if bias is None else bias[e]) for e, own in rows.spans
    ]
    return torch.cat(parts) if parts else x.new_empty(0, weight.shape[1])


def _why_not_routed(owner: Owner) -> str | None:
    """None where tokens can be routed; else why W + Δ is made, in words."""
    made: Any = owner
    if all(part.experts is None for part in parts_of(owner).values()):
        return "it is one matrix, not a stack of experts'"
    missing = [fact for fact in _FACTS if not hasattr(made, fact)]
    if missing:
        return f"{made.adapted_class.__name__} is no mixture that transformers dispatches"
    up = "gate_up_proj" if made.has_gate else "up_proj"
    for name in parts_of(owner):
        if name not in (up, "down_proj"):
            return f"{name} is no weight of the mixture's experts"
    if not _same(made, made._parameters[up]):
        return f"{made.adapted_class.__name__} computes something else than its facts say"
    return None


@torch.no_grad()
def _same(owner: Any, weight: Tensor) -> bool:
    """Whether routing gives what the class's own forward does, for random tokens."""
    if weight.is_meta:
        return True
    draw = torch.Generator().manual_seed(0)
    width, experts = weight.shape[1 if owner.is_transposed else 2], owner.num_experts
    x = torch.randn(_PROBED, width, generator=draw).to(weight)
    chosen = torch.rand(_PROBED, experts, generator=draw).argsort(1)[:, : min(2, experts)]
    share = torch.rand(chosen.shape, generator=draw).to(weight)
    chosen = chosen.to(weight.device)
    wanted = owner.adapted_class.forward(owner, x, chosen, share)
    found = _routed(owner, parts_of(owner), x, chosen, share)
    if not isinstance(wanted, Tensor) or found.shape != wanted.shape:
        return False
    rounding = _ROUNDINGS * torch.finfo(weight.dtype).eps * wanted.abs().max()
    return bool((found - wanted).abs().max() <= rounding)
