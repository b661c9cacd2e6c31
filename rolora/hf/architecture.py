"""What a model is, told from its configuration, or from its modules without a weight of them."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from rolora.adapter.layer import RoLoRALinear
from rolora.adapter.linears import is_conv1d
from rolora.hf.explained import explained

NOT_QUANTISED = ("lm_head", "score", "classifier", "pre_classifier")  # the heads


def is_causal_lm(config) -> bool:
    """Whether the checkpoint is a decoder that predicts the next token."""
    names = [str(name) for name in config.architectures or ()]
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return True
    # Models that see or hear too and are made for text all the same (Gemma 3, Qwen 3.5).
    known = type(config) in transformers.AutoModelForCausalLM._model_mapping
    return known and any(name.endswith("ForConditionalGeneration") for name in names)


def positions(config) -> int | None:
    """The most tokens that the model has positions for; None where it does not say.

    Encoders such as RoBERTa and MPNet count positions from after the padding index of their
    position embedding, which is looked at itself.
    """
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    known = type(config) in transformers.AutoModel._model_mapping
    if most is not None and most <= 0:
        return None  # XLNet's way of saying that there is no such number
    if most is None or is_causal_lm(config) or not known:
        return most
    with torch.device("meta"), explained(config.name_or_path):
        model = transformers.AutoModel.from_config(config, trust_remote_code=False)
    for name, module in model.named_modules():
        padded = isinstance(module, nn.Embedding) and module.padding_idx is not None
        if padded and "position" in name.rpartition(".")[2]:
            most = min(most, module.num_embeddings - module.padding_idx - 1)
    return most


def blocks(config) -> int | None:
    """How many blocks the model has; None where its configuration does not say."""
    return getattr(config.get_text_config(), "num_hidden_layers", None)


def heads(model: nn.Module) -> list[str]:
    """The heads of a classifier, as PEFT looks for them too."""
    return [name for name in ("score", "classifier") if hasattr(model, name)]


def has_fused_attention(config) -> bool:
    """Whether transformers' model of this configuration can use PyTorch's fused attention."""
    known = transformers.AutoModel._model_mapping
    if type(config) not in known:
        return False
    found = known[type(config)]
    first = found[0] if isinstance(found, list | tuple) else found
    return bool(getattr(first, "_supports_sdpa", False))


def quantized_as(config, quantize: str = "none") -> str | None:
    """ "nf4" or "int8" where a base of this configuration is stored so, by its checkpoint or by
    --quantize; else None.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None if quantize == "none" else quantize
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    return "nf4" if stored.get("load_in_4bit") else "int8"


def weight_bytes(model: nn.Module, quantize: str = "none") -> int:
    """Bytes of a model's parameters; on the meta device linears count as they will be stored: half
    a byte and the scales with their own (double quantisation, blocks of 64 and 256), or one byte
    and fp32 scales of the rows.
    """
    kind = quantized_as(model.config, quantize)
    total = 0
    for path, module in model.named_modules():
        linear = isinstance(module, nn.Linear | RoLoRALinear) or is_conv1d(module)
        for name, p in module._parameters.items():
            if p is None:
                continue
            size = p.numel() * p.element_size()
            if (
                kind
                and p.is_meta
                and linear
                and name == "weight"
                and not {*path.split(".")} & {*NOT_QUANTISED}
            ):
                size = (
                    p.numel() // 2 + p.numel() // 64 + p.numel() // 4096
                    if kind == "nf4"
                    else p.numel() + 4 * p.shape[0]
                )
            total += size
    return total
