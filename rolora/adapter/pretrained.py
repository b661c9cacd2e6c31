"""`save_pretrained` of a Hugging Face model while factors are on it.

The model's own would write the base with keys that `from_pretrained` passes over in silence, and
what was trained would be lost.
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from rolora import atomic
from rolora.adapter.files import save_tensors
from rolora.adapter.model import adapted_layers, attached_heads, require_layers, require_unmerged


class SavePretrained:
    """Called in the place of a model's own method.

    A model with factors is written as PEFT's files, which `from_pretrained` reads together with
    the base that they name; a merged one as plain weights, without factors. A checkpoint of
    Hugging Face's Trainer (`checkpoint-<step>`) also gets what it resumes from.
    """

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)  # no circle: the model goes when its last user does

    def __deepcopy__(self, memo: dict) -> SavePretrained:
        return SavePretrained(memo[id(self._model())])

    def __reduce__(self) -> tuple[Any, ...]:
        return SavePretrained, (self._model(),)

    def __call__(
        self,
        save_directory: Path | str,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """`options` are those of transformers, for the weights of a merged model."""
        model: Any = self._model()
        if model is None:
            raise RuntimeError("the model is gone: keep it in a variable while it is saved")
        folder, layers = Path(save_directory), require_layers(model)
        if push_to_hub:
            raise ValueError(
                "push_to_hub=True is not done for adapters: save to a folder, then "
                "huggingface_hub.upload_folder(folder_path=…, repo_id=…)"
            )
        if all(layer.merged for _, layer in layers):
            state = _without_factors(model, state_dict)
            options |= {"is_main_process": is_main_process, "state_dict": state}
            type(model).save_pretrained(model, folder, **options)
            return
        require_unmerged(layers)
        if not is_main_process:
            return
        others = _trained_otherwise(model)
        if others:
            warnings.warn(
                f"{others[0]} trains ({len(others)} parameters in all) but is no part of the "
                "adapter, so it is not in its files: name its module in modules_to_save",
                stacklevel=2,
            )
        save_tensors(model, folder, state=state_dict)
        if re.fullmatch(r"checkpoint-\d+", folder.name):
            tensors = _changed(model, state_dict)
            data = save_safetensors(tensors, metadata={"format": "pt"})
            atomic.write_bytes(folder / "model.safetensors", data)


def take_over(model: nn.Module) -> None:
    """Has `model.save_pretrained` write what `SavePretrained` says, where it has such a method."""
    if callable(getattr(model, "save_pretrained", None)):
        model.__dict__["save_pretrained"] = SavePretrained(model)


def give_back(model: nn.Module) -> None:
    """The model's own method again."""
    model.__dict__.pop("save_pretrained", None)


def _factor_keys(model: nn.Module) -> set[str]:
    places = [layer.module_path(path) for path, layer in adapted_layers(model)]
    return {f"{place}.lora_{kind}" for place in places for kind in "AB"}


def _without_factors(model: Any, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The state dict of a merged model without its factors."""
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            "the base is quantised, so that a merged model would be saved half dense: unmerge and "
            "save the adapter, then python -m rolora.export --to merged --dequantize writes it "
            "dense"
        )
    state, factors = model.state_dict() if state is None else state, _factor_keys(model)
    return {key: value for key, value in state.items() if key not in factors}


def _trained_otherwise(model: nn.Module) -> list[str]:
    """Parameters that train and are neither factors nor in a head that is saved."""
    heads = tuple(f"{name}." for name, _ in attached_heads(model))
    factors, found = _factor_keys(model), []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in factors and not name.startswith(heads):
            found.append(name)
    return found


def _changed(model: nn.Module, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What training may have changed, under the model's own keys: all but frozen parameters, a
    factor that rests included.
    """
    state, factors = model.state_dict() if state is None else state, _factor_keys(model)
    frozen = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad and name not in factors:
            frozen.add(name)
    kept = {}
    for key, value in state.items():
        owner = key.partition(".weight.")[0] + ".weight"  # of what bitsandbytes keeps beside it
        if key not in frozen and owner not in frozen:
            kept[key] = value.detach().to("cpu", copy=True).contiguous()
    return kept
