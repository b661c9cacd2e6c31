"""An adapter as named tensors, in memory: PEFT's keys, taken from a model and put into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rolora.adapter.adapted import Adapted
from rolora.adapter.layer import RoLoRALinear
from rolora.adapter.model import adapted_layers, attached_heads, require_unmerged
from rolora.adapter.parameter_files import PREFIX, file_names, owners_of, renamed, to_file
from rolora.adapter.wrapped import layers_by_path, plain_path, unwrapped


def get_adapter_state_dict(
    model: nn.Module, *, heads: Sequence[str] | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """What `save_adapter` writes, as tensors of their own on the CPU, under PEFT's keys."""
    return adapter_tensors(unwrapped(model), heads, dtype)


def adapter_tensors(
    model: nn.Module,
    heads: Sequence[str] | None,
    dtype: torch.dtype,
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """`get_adapter_state_dict` of a model without wrappers. `state`: its whole state dict, where
    its own tensors are sharded.

    Raises ValueError for sharded factors without one.
    """
    layers = layers_by_path(model)
    if not layers:
        raise ValueError("the model has no LoRA factors: nothing to save")
    whole = None if state is None else {plain_path(key): state[key] for key in state}
    tensors: dict[str, Tensor] = {}
    in_file = file_names(owners_of(layers))
    for path, layer in layers.items():
        A, B = layer.lora_A.detach(), layer.whole_B.detach()
        if whole is not None:
            key = layer.module_path(path)
            A, B = whole[f"{key}.lora_A"], whole[f"{key}.lora_B"]
        _require_whole(path, layer, A, B)
        A, B = to_file(layer, *_with_term(layer, A, B))
        name = in_file.get(path, path)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A.to("cpu", dtype, copy=True)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.to("cpu", dtype, copy=True)
    modules = {plain_path(name): module for name, module in model.named_modules()}
    if heads is None:
        heads = [plain_path(name) for name, _ in attached_heads(model)]
    for head in heads:
        if head not in modules:
            raise ValueError(f"heads names {head!r}, which the model lacks: give a module path")
        for key, value in modules[head].state_dict().items():
            path = f"{head}.{plain_path(key)}"
            value = value if whole is None else whole[path]
            tensors[PREFIX + path] = value.detach().to("cpu", copy=True)
    return tensors


def _require_whole(name: str, layer: Adapted, A: Tensor, B: Tensor) -> None:
    wanted = (layer.rank, layer.in_features), (layer.out_features, layer.rank)
    if (tuple(A.shape[-2:]), tuple(B.shape[-2:])) != wanted:
        raise ValueError(
            f"the factors of {name} are sharded (lora_A holds {list(A.shape)}, not "
            f"{list(wanted[0])}): save inside FSDP.summon_full_params(model)"
        )


def set_adapter_state_dict(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies what `get_adapter_state_dict` gave, or PEFT's `get_peft_model_state_dict`, into a
    model that has the same factors attached.

    Raises ValueError, and leaves the model as it is, where names, shapes or values do not fit.
    """
    model = unwrapped(model)
    if not layers_by_path(model):
        raise ValueError("the model has no LoRA factors: attach them first")
    require_unmerged(adapted_layers(model))
    check_tensors(tensors, "the given tensors")
    tensors = renamed(owners_of(layers_by_path(model)), tensors, "the given tensors")
    copy(fitted(model, tensors, "the given tensors"))
    for _, layer in adapted_layers(model):  # what was given is the whole path
        layer.set_call(replace(layer.call, term=None))


def _with_term(layer: Adapted, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A `[…, r + R, in]` and B `[…, out, r + R]` of the path with its term, of R ranks or none."""
    if layer.term is None:
        return A, B
    U, V = layer.term
    return torch.cat([A, V.to(A)], -2), torch.cat([B, U.to(B)], -1)


def whole_rank(layer: Adapted) -> int:
    """The ranks of the path with its term."""
    return layer.rank if layer.term is None else layer.rank + layer.term[1].shape[-2]


def fitted(
    model: nn.Module, tensors: Mapping[str, Tensor], source: str
) -> list[tuple[Tensor, Tensor]]:
    """(the model's tensor, the value that goes there) for each of `tensors`; raises ValueError
    unless they fit one another and every adapted layer has its factors.
    """
    layers = layers_by_path(model)
    heads = {
        PREFIX + plain_path(name): parameter
        for name, parameter in model.state_dict(keep_vars=True).items()
    }
    targets: list[tuple[Tensor, Tensor]] = []
    for key, value in tensors.items():  # under the paths of modules and parameters
        name, _, rest = key.removeprefix(PREFIX).rpartition(".lora_")
        if rest in ("A.weight", "B.weight"):
            if name not in layers:
                raise ValueError(
                    f"{source}: {name} is in the adapter, but not adapted in this model"
                )
            target = getattr(layers[name], f"lora_{rest[0]}")
        elif key in heads:
            target = heads[key]
        elif _is_own_weight(key, value, layers):
            continue
        else:
            raise ValueError(f"{source}: {key} is in the adapter, but not in this model")
        if target.shape != value.shape:
            raise ValueError(
                f"{source}: {key} is {list(value.shape)}, this model's is {list(target.shape)}: "
                "the adapter was made for another base model or rank"
            )
        targets.append((target, value))
    missing = sorted(set(layers) - set(adapted_names(tensors)))
    if missing:
        raise ValueError(
            f"{source}: holds no factors for {missing[0]} ({len(missing)} in all), which this "
            "model adapts"
        )
    return targets


def _is_own_weight(key: str, value: Tensor, layers: Mapping[str, Adapted]) -> bool:
    """Whether this is the frozen weight of an adapted layer, which PEFT saves too for an output
    layer, as it is here.
    """
    name, found, _ = key.removeprefix(PREFIX).rpartition(".base_layer.weight")
    if not found or name not in layers:
        return False
    layer = layers[name]
    if not isinstance(layer, RoLoRALinear):
        return False
    own = layer.weight
    if own.shape != value.shape or not torch.equal(own, value.to(own)):
        raise ValueError(f"{key} is not this model's: the adapter was made for another base model")
    return True


@torch.no_grad()
def copy(targets: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Puts the values of `fitted` into their places."""
    for target, value in targets:
        target.copy_(value)


def check_tensors(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError unless these are finite, in complete pairs, under PEFT's keys."""
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"{source}: key {key!r} does not start with {PREFIX!r}")
        if not torch.isfinite(value).all():
            raise ValueError(f"{source}: {key} holds values that are not finite")
    names = adapted_names(tensors)
    for name in names:
        for factor in "AB":
            if f"{PREFIX}{name}.lora_{factor}.weight" not in tensors:
                raise ValueError(f"{source}: {name} has no lora_{factor}")
    if not names:
        raise ValueError(f"{source} holds no LoRA factors")


def adapted_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """The paths that the tensors hold factors for."""
    return list(
        dict.fromkeys(
            key.removeprefix(PREFIX).rpartition(".lora_")[0]
            for key in tensors
            if key.endswith((".lora_A.weight", ".lora_B.weight"))
        )
    )
