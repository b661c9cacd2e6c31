"""Adapters in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.

Keys are `base_model.model.<path>.lora_A.weight [r, in]` and `.lora_B.weight [out, r]`, heads
`base_model.model.<head>.<parameter>` under `modules_to_save`: what PEFT's `save_pretrained` writes
and transformers and vLLM read. Only safetensors is read or written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from rolora import atomic
from rolora.adapter.model import attached_heads
from rolora.adapter.parameter_files import named_parameters
from rolora.adapter.peft_config import check_config, check_ranks, to_peft
from rolora.adapter.tensors import adapter_tensors, check_tensors
from rolora.adapter.wrapped import layers_by_path, plain_path, unwrapped

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(
    model: nn.Module,
    folder: Path | str,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    heads: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes the model's factors, and the modules named in `heads`, in PEFT's format. A model
    wrapped by torch.compile or DistributedDataParallel is saved as the one inside.

    Args:
        base_model: recorded as `base_model_name_or_path`; None takes what the model's config names.
        task_type: PEFT's, such as "CAUSAL_LM" or "SEQ_CLS".
        heads: None for the `modules_to_save` of `attach`.
        dtype: of the stored factors; heads keep their own.

    Raises ValueError when nothing is attached or a factor is not finite; nothing is written then.
    """
    save_tensors(unwrapped(model), folder, base_model, task_type, heads, dtype)


def save_tensors(
    model: nn.Module,
    folder: Path | str,
    base_model: str | None = None,
    task_type: str | None = None,
    heads: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """`save_adapter` of a model without wrappers; `state` as in `adapter_tensors`."""
    if heads is None:
        heads = [plain_path(name) for name, _ in attached_heads(model)]
    tensors = _finite(adapter_tensors(model, heads, dtype, state))
    layers = layers_by_path(model)
    if base_model is None:
        base_model = _base_name(model)
    write_adapter(folder, to_peft(model, layers, base_model, task_type, heads), tensors)


def _finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    bad = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
    if bad:
        raise ValueError(f"{bad[0]} is not finite ({len(bad)} tensors in all): not saved")
    return tensors


def _base_name(model: nn.Module) -> str | None:
    names = (
        getattr(holder, key, None)
        for holder in (getattr(model, "config", None), model)
        for key in ("name_or_path", "_name_or_path")
    )
    return next((name for name in names if isinstance(name, str) and name), None)


def write_adapter(
    folder: Path | str, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Writes PEFT's two files; `dtype` casts the factors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: (value.to(dtype) if dtype is not None and ".lora_" in key else value).contiguous()
        for key, value in tensors.items()
    }
    atomic.write_bytes(folder / WEIGHTS_FILE, save_safetensors(tensors, metadata={"format": "pt"}))
    atomic.write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_adapter(folder: Path | str, from_start: bool = False) -> tuple[dict, dict[str, Tensor]]:
    """(configuration, tensors) of a PEFT LoRA folder, checked: readable, in scope, complete pairs,
    finite. `from_start` as in `check_config`.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not an adapter folder: {name} is missing")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE} is not valid JSON: {error}") from None
    check_config(config, str(folder), from_start)
    try:
        stored = load_safetensors((folder / WEIGHTS_FILE).read_bytes())
    except SafetensorError as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} is not a valid safetensors file: {error}"
        ) from None
    tensors = dict(sorted(stored.items()))  # safetensors tells them in any order
    check_tensors(tensors, str(folder))
    if not config.get("target_parameters"):  # whose paths a model tells: `read_adapter_for`
        check_ranks(config, tensors, str(folder))
    return config, tensors


def read_adapter_for(
    model: nn.Module, folder: Path | str, from_start: bool = False
) -> tuple[dict, dict[str, Tensor]]:
    """`read_adapter` for this model: factors of parameters come under the parameters' paths, those
    of experts as stacks.
    """
    config, tensors = read_adapter(folder, from_start)
    tensors = named_parameters(model, config, tensors, str(folder))
    check_ranks(config, tensors, str(folder))
    return config, tensors
