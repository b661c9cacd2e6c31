"""An adapter in llama.cpp's format, as its own convert_lora_to_gguf.py writes it, for `--lora`.

A module's factors are `NAME.weight.lora_a` [r, in] and `.lora_b` [out, r], NAME being what gguf's
TensorNameMap calls it; llama.cpp adds alpha / r · B A, where r is that of each tensor.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rolora import config
from rolora.adapter.peft_config import lora_config
from rolora.adapter.tensors import PREFIX, adapted_names
from rolora.errors import BadInput
from rolora.exporting.source import Adapter, new_folder
from rolora.hf.precision import DTYPES
from rolora.run import base_model

NAME = "adapter.gguf"
# transformers' model_type → (gguf's MODEL_ARCH, whether llama.cpp has the rows of q and k in
# another order, in which each rotated pair lies side by side). All other linears are as they are.
_ARCHITECTURES = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "smollm3": ("SMOLLM3", True),
    "granite": ("GRANITE", True),
    "qwen2": ("QWEN2", False),
    "qwen3": ("QWEN3", False),
    "gemma": ("GEMMA", False),
    "gemma2": ("GEMMA2", False),
    "gemma3_text": ("GEMMA3", False),
    "phi3": ("PHI3", False),
    "olmo2": ("OLMO2", False),
    "starcoder2": ("STARCODER2", False),
    "stablelm": ("STABLELM", False),
}


def write(adapter: Adapter, folder: Path, model: str | None = None, dtype: str = "fp32") -> None:
    """Writes `adapter.gguf` in `folder`. Raises BadInput, with its name, for a module or an
    architecture that llama.cpp's format cannot express, and where gguf is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise BadInput(
            "--to gguf-lora needs the package `gguf`: pip install '.[gguf]' in your clone"
        )
    settled = config.Config().with_values(model=adapter.base(model))
    text = base_model.read_config(settled).get_text_config()
    if text.model_type not in _ARCHITECTURES:
        raise BadInput(
            f"--to gguf-lora does not know how llama.cpp lays out a {text.model_type}: it knows "
            f"{', '.join(_ARCHITECTURES)}"
        )
    alpha, pairs = _pairs(adapter, text)
    kind = DTYPES[dtype]
    stored = {name: value.to(kind) for name, value in pairs.items()}
    for name, value in stored.items():
        if not value.isfinite().all():
            raise BadInput(f"--dtype {dtype} cannot hold {name}: give bf16 or fp32")
    size = sum(value.numel() * value.element_size() for value in stored.values())
    with new_folder(folder, size) as place:
        _write(place / NAME, _ARCHITECTURES[text.model_type][0], alpha, stored)
    print(f"{folder / NAME}: {len(pairs) // 2} modules, alpha {alpha:g}, {size:,} bytes in {dtype}")


def _pairs(adapter: Adapter, text: Any) -> tuple[float, dict[str, Tensor]]:
    """(alpha of all modules, llama.cpp's name → factor): what another alpha or rsLoRA makes of a
    module's scaling is in its B.
    """
    import gguf

    arch, permuted = _ARCHITECTURES[text.model_type]
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], text.num_hidden_layers)
    _refuse_others(adapter)
    said, rslora = lora_config(adapter.stored, adapter.tensors), adapter.stored.get("use_rslora")
    names = adapted_names(adapter.tensors)
    # What llama.cpp divides by a module's rank.
    alphas = {}
    for name in names:
        rank, own = said.of(name)
        alphas[name] = own * rank**0.5 if rslora else float(own)
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    alpha = float(np.float32(alpha))  # as the file holds it
    found: dict[str, Tensor] = {}
    for name in names:
        plain = name.replace("language_model.", "")
        other = known.get_name(plain)
        if other is None or (plain.endswith("lm_head") and text.tie_word_embeddings):
            raise BadInput(f"--to gguf-lora: llama.cpp has no place for a change of {name}")
        A, B = (adapter.tensors[f"{PREFIX}{name}.lora_{factor}.weight"] for factor in "AB")
        B = B.double() * (alphas[name] / alpha)
        if permuted and name.endswith(("q_proj", "k_proj")):
            B = _paired(B, _heads(text, name))
        found[f"{other}.weight.lora_a"], found[f"{other}.weight.lora_b"] = A, B
    return alpha, found


def _refuse_others(adapter: Adapter) -> None:
    """Raises BadInput for what is no pair of factors of a linear."""
    stacks = adapter.stored.get("target_parameters")
    if stacks:
        raise BadInput(
            f"--to gguf-lora: this adapter has factors of parameters ({', '.join(stacks)}), which "
            "is done for those of linears alone: use --to merged"
        )
    for key in adapter.tensors:
        if ".lora_" not in key and ".base_layer." not in key:
            raise BadInput(
                f"--to gguf-lora: this adapter saves {key.removeprefix(PREFIX)} whole, which "
                "llama.cpp's format has no place for: use --to merged"
            )


def _heads(text: Any, name: str) -> int:
    heads = text.num_attention_heads
    if name.endswith("q_proj"):
        return heads
    return getattr(text, "num_key_value_heads", None) or heads


def _paired(B: Tensor, heads: int) -> Tensor:
    """Rows `[out, r]` in llama.cpp's order: the halves of each head, which rotate together,
    interleaved.
    """
    out, rank = B.shape
    return B.reshape(heads, 2, out // heads // 2, rank).swapaxes(1, 2).reshape(out, rank)


def _write(path: Path, arch: str, alpha: float, tensors: dict[str, Tensor]) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[arch]])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, value in tensors.items():
        value = value.contiguous()
        if value.dtype == torch.bfloat16:  # which NumPy lacks
            raw = value.view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
