"""Frozen base models from a Hugging Face folder or the hub."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rolora.adapter import quantised
from rolora.adapter.selection import layer_index
from rolora.errors import BadInput
from rolora.hf import liger as liger_kernels
from rolora.hf import prequantised
from rolora.hf.architecture import NOT_QUANTISED, blocks, quantized_as, weight_bytes
from rolora.hf.explained import explained
from rolora.hf.reading import READING, require_safetensors


@dataclass
class Loaded:
    """A frozen model in eval mode.

    `new_heads` are the modules that the checkpoint lacks, freshly initialised.
    """

    model: nn.Module
    new_heads: list[str]


def load_model(
    name: str,
    config,
    tokenizer,
    *,
    labels: Sequence[str] | None,
    dtype: torch.dtype,
    device: torch.device,
    attn: str,
    seed: int,
    revision: str | None = None,
    quantize: str = "none",
    liger: bool = False,
) -> Loaded:
    """The frozen base in `dtype` on `device`; a sequence classifier over `labels` where they are
    given, else a causal LM. `quantize`: "nf4" (double quantisation) or "int8" stores its linears
    so, heads aside. `liger`: with Liger's kernels.

    A head that the checkpoint lacks, or has for other classes, is drawn from `seed`. Raises
    BadInput when the weights do not fit in memory (before loading), or when more than a head is
    missing for a causal LM.
    """
    require_safetensors(name)
    options: dict[str, Any] = dict(
        revision=revision,
        dtype=dtype,
        attn_implementation=attn,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are told, by name, below
    )
    cls: Any = AutoModelForCausalLM
    if labels is not None:
        cls = AutoModelForSequenceClassification
        options |= _classifier(name, config, tokenizer, labels)
    stored = getattr(config, "quantization_config", None)
    if quantize != "none" or stored is not None:
        options |= _quantisation(name, stored, quantize, dtype, device)
    _require_memory(name, cls, config, dtype, device, quantize)
    torch.manual_seed(seed)  # the draw of a new head; nothing else uses the global generator
    own_reader = stored is not None and "device_map" not in options
    model: Any
    with explained(name):
        if own_reader:
            model, info = prequantised.load(cls, name, config, **options)
        else:
            model, info = cls.from_pretrained(name, **options, **READING)
    if labels is not None:
        # Of a model that sees too it is the text's part that looks for padding.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    heads = _new_heads(name, model, info, labels)
    _require_own_tokenizer(name, model, tokenizer)
    model = model.eval().requires_grad_(False)
    _require_whole_blocks(name, model, device)
    if liger:
        liger_kernels.apply(model, name, device)
    return Loaded(model if "device_map" in options else model.to(device), heads)


def _classifier(name: str, config: Any, tokenizer: Any, labels: Sequence[str]) -> dict[str, Any]:
    """What a sequence classifier over `labels` is loaded with."""
    _require_classifier(name, config)
    options: dict[str, Any] = dict(
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    if config.get_text_config() is config:
        options["pad_token_id"] = tokenizer.pad_token_id
    return options


def _require_own_tokenizer(name: str, model: Any, tokenizer: Any) -> None:
    embedded = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embedded:
        raise BadInput(
            f"--model {name}: its tokenizer has {len(tokenizer)} tokens, its embedding "
            f"{embedded}: they do not belong together"
        )


def _new_heads(name: str, model: Any, info: dict, labels: Sequence[str] | None) -> list[str]:
    """The modules that loading has drawn anew, and that may be: a classifier's head, and a pooler.
    Raises BadInput for anything else that the checkpoint lacks, or has of another size.
    """
    base = model.base_model_prefix + "."
    for key, found, wanted in sorted(info["mismatched_keys"]):
        if labels is None or key.startswith(base):
            raise BadInput(
                f"--model {name} does not fit itself: its checkpoint has {key} as {list(found)}, "
                f"its config.json asks for {list(wanted)}"
            )
    for key in sorted(info["unexpected_keys"]):
        block, known = layer_index(key), blocks(model.config)
        if block is not None and known is not None and block >= known:
            raise BadInput(
                f"--model {name} does not fit itself: its checkpoint has {key}, its config.json "
                f"names {known} blocks"
            )
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if missing and labels is None:
        raise BadInput(
            f"--model {name} is no complete causal LM: its checkpoint lacks {missing[0]} "
            f"({len(missing)} in all)"
        )
    for key in missing:
        if key.startswith(base) and "pooler" not in key.split("."):
            raise BadInput(
                f"--model {name} is incomplete: its checkpoint lacks {key} ({len(missing)} missing "
                "in all)"
            )
    inside = {key.rpartition(".")[0] for key in missing if key.startswith(base)}
    return sorted(inside | {key.split(".")[0] for key in missing if not key.startswith(base)})


def _require_memory(
    name: str, cls, config, dtype: torch.dtype, device: torch.device, quantize: str
) -> None:
    with torch.device("meta"), explained(name):
        needed = weight_bytes(
            cls.from_config(config, dtype=dtype, trust_remote_code=False), quantize
        )
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )
    if needed > free:
        kind = quantized_as(config, quantize) or str(dtype).removeprefix("torch.")
        raise BadInput(
            f"--model {name} needs {needed / 2**30:.1f} GiB for its weights in {kind}, but "
            f"{free / 2**30:.1f} GiB are free on "
            f"{device}: use --dtype bf16, --quantize nf4, a smaller model or a larger machine"
        )


def _quantisation(
    name: str, stored, quantize: str, dtype: torch.dtype, device: torch.device
) -> dict:
    """from_pretrained's options for a quantised base, none for a checkpoint that is read here
    because the library is missing. Raises BadInput for one of another kind, or where there is no
    library to quantise with.
    """
    method = None
    if isinstance(stored, dict):
        method = stored.get("quant_method")
    elif stored is not None:
        method = stored.quant_method
    if stored is not None and str(getattr(method, "value", method)) != "bitsandbytes":
        raise BadInput(
            f"--model {name} is quantised by {method}: only bitsandbytes' 4 and 8 bits are read; "
            "use the original model with "
            "--quantize nf4"
        )
    if stored is not None and quantize != "none":
        raise BadInput(f"--model {name} is quantised already: leave --quantize out")
    if stored is not None:
        return {"device_map": {"": device}} if has_bitsandbytes() else {}
    if not has_bitsandbytes():
        raise BadInput(
            f"--quantize {quantize} needs the package `bitsandbytes`: pip install "
            "'.[quantize]' in your clone"
        )
    made = transformers.BitsAndBytesConfig(
        load_in_4bit=quantize == "nf4",
        load_in_8bit=quantize == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(NOT_QUANTISED),
    )
    return {"quantization_config": made, "device_map": {"": device}}


def has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _require_whole_blocks(name: str, model: nn.Module, device: torch.device) -> None:
    """On a CPU bitsandbytes computes 4 bits only where rows are whole blocks."""
    for path, module in model.named_modules() if device.type == "cpu" else ():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if isinstance(state, quantised.SavedState):
            continue
        if state is not None and module.in_features % state.blocksize:
            raise BadInput(
                f"--model {name}: {path} has {module.in_features} inputs, and on a CPU "
                "bitsandbytes needs multiples of "
                f"{state.blocksize} for 4 bits: use --quantize int8 or none, or a GPU"
            )


def sketch(
    name: str,
    config,
    tokenizer,
    *,
    labels: Sequence[str] | None,
    dtype: torch.dtype,
    seed: int,
    **_,
) -> Loaded:
    """The model without its weights, on the meta device: what a plan needs, from the configuration
    alone. Whether the checkpoint lacks a head is told from the architecture that it names.
    """
    cls: Any = AutoModelForCausalLM
    new = False
    if labels is not None:
        cls = AutoModelForSequenceClassification
        _require_classifier(name, config)
        trained = any(
            a.endswith("ForSequenceClassification") for a in config.architectures or ()
        ) and config.num_labels == len(labels)
        config, new = copy.deepcopy(config), not trained
        config.num_labels = len(labels)
    with torch.device("meta"), explained(name):
        model = cls.from_config(config, dtype=dtype, trust_remote_code=False)
    base = model.base_model_prefix
    heads = (
        [
            child
            for child, module in model.named_children()
            if child != base and any(True for _ in module.parameters())
        ]
        if new
        else []
    )
    return Loaded(model.eval().requires_grad_(False), heads)


def _require_classifier(name: str, config) -> None:
    """Raises BadInput where transformers has no sequence classifier of this kind of model."""
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise BadInput(
            f"--model {name}: transformers has no sequence classifier for a {config.model_type}: "
            "train it with --task-type causal-lm or multiple-choice"
        )


def checkpoint_activations(model: Any) -> None:
    """Has the model compute activations again in backward; raises BadInput where it has no such
    mode.
    """
    # transformers' newer name for it; the older one warns.
    newer = getattr(model, "activation_checkpointing_enable", None)
    enable = newer or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise BadInput(
            f"--gradient-checkpointing: {error} Leave it out; a smaller --batch-size with "
            "--gradient-accumulation takes less memory too"
        ) from None
