"""An adapter in PEFT's files again, and what vLLM's loader wants of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from rolora.adapter.files import CONFIG_FILE, write_adapter
from rolora.adapter.peft_config import lora_config
from rolora.adapter.tensors import PREFIX, adapted_names
from rolora.errors import BadInput
from rolora.exporting.source import Adapter, new_folder
from rolora.hf.precision import DTYPES
from rolora.run import adapter_folder


def write(
    adapter: Adapter,
    folder: Path,
    for_vllm: bool = False,
    bake: bool = False,
    dtype: str = "fp32",
) -> None:
    """Writes `folder`; raises BadInput for what vLLM would refuse, where it is for that."""
    if bake:
        adapter = baked(adapter)
    if for_vllm:
        _refuse_parameters(adapter, "--to vllm")
        _check_vllm(adapter.stored)
    stored = dict(adapter.stored)
    base = stored.get("base_model_name_or_path")
    if base:
        named = adapter_folder.named_from_anywhere(adapter.folder, base)
        stored["base_model_name_or_path"] = named
    with new_folder(folder) as place:
        write_adapter(place, stored, adapter.tensors, DTYPES[dtype])
        adapter_folder.copy(adapter.folder, place)
    print(
        f"{folder / CONFIG_FILE}: rank {stored['r']}, alpha {stored['lora_alpha']:g}, "
        f"{len(adapter.tensors)} tensors in {dtype}"
    )


def baked(adapter: Adapter) -> Adapter:
    """The same adapter with one rank for all modules and alpha equal to it, so that nothing is
    scaled when it is used. Raises BadInput for factors of parameters.
    """
    _refuse_parameters(adapter, "--bake")
    stored, tensors = adapter.stored, adapter.tensors
    said, rslora = lora_config(stored, tensors), bool(stored.get("use_rslora"))
    names = adapted_names(tensors)
    rank, made = max(said.of(name)[0] for name in names), dict(tensors)
    for name in names:
        own, alpha = said.of(name)
        A, B = (tensors[f"{PREFIX}{name}.lora_{factor}.weight"].float() for factor in "AB")
        made[f"{PREFIX}{name}.lora_A.weight"] = torch.cat([A, A.new_zeros(rank - own, A.shape[1])])
        made[f"{PREFIX}{name}.lora_B.weight"] = torch.cat(
            [B * (alpha / (own**0.5 if rslora else own)), B.new_zeros(B.shape[0], rank - own)], 1
        )
    plain = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
    }
    return replace(adapter, stored=stored | plain, tensors=made)


def _refuse_parameters(adapter: Adapter, what: str) -> None:
    stacks = adapter.stored.get("target_parameters")
    if stacks:
        raise BadInput(
            f"{what}: this adapter has factors of parameters ({', '.join(stacks)}), which is done "
            "for those of linears alone: use --to merged"
        )


def _check_vllm(stored: dict) -> None:
    """What vLLM's loader refuses (its PEFTHelper and LoRA model): patterns, whole modules, DoRA,
    biases.
    """
    if stored.get("rank_pattern") or stored.get("alpha_pattern"):
        raise BadInput(
            "--to vllm: this adapter has ranks or alphas of single modules, of which vLLM takes "
            "one for all: add --bake"
        )
    if stored.get("modules_to_save"):
        raise BadInput(
            f"--to vllm: this adapter saves {', '.join(stored['modules_to_save'])} whole, which "
            "vLLM does not load: use --to merged"
        )
