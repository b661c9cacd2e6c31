"""Models and tokenizers from a Hugging Face folder or the hub, with errors that a person can act
on.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import socket
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import psutil
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from rolora.adapter import quantised
from rolora.adapter.layer import RoLoRALinear
from rolora.adapter.linears import is_conv1d
from rolora.adapter.selection import layer_index
from rolora.errors import BadInput
from rolora.hf import liger as liger_kernels
from rolora.hf import prequantised
from rolora.hf.pointers import is_pointer

_NOT_QUANTISED = ("lm_head", "score", "classifier", "pre_classifier")  # the heads
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Loaded:
    """A frozen model in eval mode.

    `new_heads` are the modules that the checkpoint lacks, freshly initialised.
    """

    model: nn.Module
    new_heads: list[str]


def quieten() -> None:
    """No progress bars, advice or download warnings in between our own lines."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # on a CPU it advises a package for kernels that are not used here
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def read_config(name: str, revision: str | None = None):
    """The model's configuration: the cheapest thing to fetch, so it tells first whether the model
    can be had.
    """
    path = Path(name)
    if os.path.exists(path):
        if not (path / "config.json").is_file():
            raise BadInput(f"--model {name} is not a model folder: it has no config.json")
        _require_files(path)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise BadInput(
            f"--model {name} does not exist: give a Hugging Face folder, or a hub id such as "
            "owner/name"
        )
    else:
        use_cache_if_unreachable()
    with _explained(name):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


def _require_files(folder: Path) -> None:
    """Raises BadInput for a file of a model that a clone left as Git LFS's pointer, or weights that
    are not whole.
    """
    for pattern in ("config.json", "tokenizer*", "vocab*", "merges.txt", "*.model"):
        for path in sorted(folder.glob(pattern)):
            _refuse_pointer(path)
    for path in sorted(folder.glob("*.safetensors")):
        _refuse_pointer(path)
        try:
            with safe_open(path, "pt"):  # the header, which must cover the file
                pass
        except (SafetensorError, OSError) as error:
            raise BadInput(f"--model: {path} is damaged or cut: {error}: fetch it anew") from None


def _refuse_pointer(path: Path) -> None:
    if path.is_file() and is_pointer(path):
        raise BadInput(
            f"--model: {path} is Git LFS's pointer to a file, not the file: run git lfs pull"
        )


def use_cache_if_unreachable() -> None:
    """Without a way to the hub only its local cache is asked: the client would otherwise retry for
    half a minute.
    """
    endpoint = urlsplit(huggingface_hub.constants.ENDPOINT)
    if huggingface_hub.constants.HF_HUB_OFFLINE or endpoint.scheme in urllib.request.getproxies():
        return
    try:
        socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=5).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def is_causal_lm(config) -> bool:
    """Whether the checkpoint is a decoder that predicts the next token."""
    names = [str(name) for name in config.architectures or ()]
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def load_tokenizer(name: str, revision: str | None = None):
    """The tokenizer; where there is no pad token (Llama, GPT-2) the end token serves: padding is
    masked everywhere.
    """
    with _explained(name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise BadInput(f"--model {name}: its tokenizer has neither a pad nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


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
    _require_safetensors(name)
    options = dict(
        revision=revision,
        dtype=dtype,
        attn_implementation=attn,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are told, by name, below
    )
    cls = AutoModelForCausalLM
    if labels is not None:
        cls = AutoModelForSequenceClassification
        _require_classifier(name, config)
        options |= dict(
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
        options["pad_token_id"] = tokenizer.pad_token_id
    stored = getattr(config, "quantization_config", None)
    if quantize != "none" or stored is not None:
        options |= _quantisation(name, stored, quantize, dtype, device)
    _require_memory(name, cls, config, dtype, device, quantize)
    torch.manual_seed(seed)  # the draw of a new head; nothing else uses the global generator
    own_reader = stored is not None and "device_map" not in options
    with _explained(name):
        model, info = (
            prequantised.load(cls, name, config, **options)
            if own_reader
            else cls.from_pretrained(name, **options, **_READING)
        )
    heads = _new_heads(name, model, info, labels)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise BadInput(
            f"--model {name}: its tokenizer has {len(tokenizer)} tokens, its embedding "
            f"{model.get_input_embeddings().num_embeddings}: they do not belong together"
        )
    model = model.eval().requires_grad_(False)
    _require_whole_blocks(name, model, device)
    if liger:
        liger_kernels.apply(model, name, device)
    return Loaded(model if "device_map" in options else model.to(device), heads)


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


# A model folder's own code never runs, and neither does what a pickle file says when it is read.
_READING = {"trust_remote_code": False, "use_safetensors": True}


def _require_safetensors(name: str) -> None:
    """Raises BadInput for a model folder whose weights are pickle files: reading them can run
    code.
    """
    folder = Path(name)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise BadInput(
            f"--model {name} has its weights in {pickled[0]}, a pickle file, which can run code "
            "when it is read: convert it to safetensors where you trust it (load it with "
            "transformers there and call save_pretrained)"
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
        llm_int8_skip_modules=list(_NOT_QUANTISED),
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
    cls, new = AutoModelForCausalLM, False
    if labels is not None:
        cls = AutoModelForSequenceClassification
        _require_classifier(name, config)
        trained = any(
            a.endswith("ForSequenceClassification") for a in config.architectures or ()
        ) and config.num_labels == len(labels)
        config, new = copy.deepcopy(config), not trained
        config.num_labels = len(labels)
    with torch.device("meta"), _explained(name):
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


class Shelf:
    """Base models that several runs of one process share, each loaded once.

    `take` gives a module tree of its own on the common, frozen weights, with new heads drawn from
    its own seed: the same model, bit for bit, as `load_model` gives for that seed.
    """

    def __init__(self):
        self._loaded: dict[tuple, Loaded] = {}

    def take(self, name: str, *args, seed: int, **options) -> Loaded:
        key = (name, *(str(options[k]) for k in sorted(options)))
        if key not in self._loaded:
            self._loaded[key] = load_model(name, *args, seed=seed, **options)
        kept = self._loaded[key]
        heads = {
            *kept.new_heads,
            *(
                name
                for name in ("pre_classifier", "classifier", "score")
                if hasattr(kept.model, name)
            ),
        }
        own = {id(module) for head in heads for module in kept.model.get_submodule(head).modules()}
        shared = {
            id(value): value
            for module in kept.model.modules()
            if id(module) not in own
            for value in (*module._parameters.values(), *module._buffers.values())
            if value is not None
        }
        model = copy.deepcopy(kept.model, memo=shared)
        torch.manual_seed(seed)
        for head in kept.new_heads:
            for module in model.get_submodule(head).modules():
                for value in module._parameters.values():
                    if value is not None:
                        value._is_hf_initialized = False
                model._init_weights(module)
        return Loaded(model.eval().requires_grad_(False), list(kept.new_heads))


@torch.no_grad()
def make_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Every parameter in `dtype`, bitsandbytes' linears as plain ones."""
    for path, module in list(model.named_modules()):
        kind = quantised.kind_of(module)
        if kind is not None:
            weight = quantised.view(*quantised.take(module, kind)).dequantise(dtype)
            plain = nn.Linear(
                module.in_features, module.out_features, bias=module.bias is not None, device="meta"
            )
            plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), module.bias
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, plain)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for holder in (model, model.config):
        for name in (
            "quantization_config",
            "hf_quantizer",
            "is_quantized",
            "is_loaded_in_4bit",
            "is_loaded_in_8bit",
            "quantization_method",
        ):
            if name in vars(holder):
                delattr(holder, name)
    model.config.dtype = dtype
    kept = getattr(model, "_weight_conversions", None)
    if kept is not None:
        # What loading undid of the quantiser's own format cannot be done again on saving.
        model._weight_conversions = [
            c
            for c in kept
            if not any(hasattr(op, "hf_quantizer") for op in getattr(c, "operations", ()))
        ]


def keep_in_fp32(model: nn.Module, heads: Sequence[str]) -> None:
    """Heads that train stay fp32 on a 16-bit base: their input is raised, so small steps are not
    lost.
    """
    for head in heads:
        module = model.get_submodule(head).float()
        module.register_forward_pre_hook(_raise_inputs)


def _raise_inputs(module, args):
    return tuple(
        a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    )


def pick_device(name: str) -> torch.device:
    """The device of a name; under torchrun every rank has the GPU of its own local rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """fp32, bf16 or fp16: how options name it."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def positions(config) -> int | None:
    """The most tokens that the model has positions for; None where it does not say.

    Encoders such as RoBERTa and MPNet count positions from after the padding index of their
    position embedding, which is looked at itself.
    """
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    known = type(config) in transformers.AutoModel._model_mapping
    if most is not None and most <= 0:
        return None  # XLNet's way of saying that there is no such number
    if most is None or is_causal_lm(config) or not known:
        return most
    with torch.device("meta"), _explained(config.name_or_path):
        model = transformers.AutoModel.from_config(config, trust_remote_code=False)
    for name, module in model.named_modules():
        padded = isinstance(module, nn.Embedding) and module.padding_idx is not None
        if padded and "position" in name.rpartition(".")[2]:
            most = min(most, module.num_embeddings - module.padding_idx - 1)
    return most


def _require_classifier(name: str, config) -> None:
    """Raises BadInput where transformers has no sequence classifier of this kind of model."""
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise BadInput(
            f"--model {name}: transformers has no sequence classifier for a {config.model_type}: "
            "train it with --task-type causal-lm or multiple-choice"
        )


def heads(model: nn.Module) -> list[str]:
    """The heads of a classifier, as PEFT looks for them too."""
    return [name for name in ("score", "classifier") if hasattr(model, name)]


def blocks(config) -> int | None:
    """How many blocks the model has; None where its configuration does not say."""
    return getattr(config.get_text_config(), "num_hidden_layers", None)


def pick_attention(
    name: str, device: torch.device, dtype: torch.dtype, length: int, fused: bool = True
) -> str:
    """The attention of a name; `fused`: whether the model has PyTorch's fused attention.

    It is slow on a CPU in 16 bits: plain matmuls take under half of its time up to 128 tokens, two
    thirds at 256 (benchmarks/results/README.md), but keep the probabilities, [batch, heads, length,
    length].
    """
    if name != "auto":
        return name
    if not fused or (device.type == "cpu" and dtype != torch.float32 and length <= 128):
        return "eager"
    return "sdpa"


def has_fused_attention(config) -> bool:
    """Whether transformers' model of this configuration can use PyTorch's fused attention."""
    known = transformers.AutoModel._model_mapping
    if type(config) not in known:
        return False
    found = known[type(config)]
    first = found[0] if isinstance(found, list | tuple) else found
    return bool(first._supports_sdpa)


def _require_memory(
    name: str, cls, config, dtype: torch.dtype, device: torch.device, quantize: str
) -> None:
    with torch.device("meta"), _explained(name):
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
                and not {*path.split(".")} & {*_NOT_QUANTISED}
            ):
                size = (
                    p.numel() // 2 + p.numel() // 64 + p.numel() // 4096
                    if kind == "nf4"
                    else p.numel() + 4 * p.shape[0]
                )
            total += size
    return total


class _explained:  # noqa: N801
    """Turns what Hugging Face raises into one line."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not isinstance(error, Exception) or isinstance(error, BadInput | torch.OutOfMemoryError):
            return False
        raise BadInput(_explain(self.name, error)) from None


def _explain(name: str, error: BaseException) -> str:
    chain, seen = [error], set()
    while chain[-1] is not None and id(chain[-1]) not in seen:
        seen.add(id(chain[-1]))
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    kinds = {c.__name__ for e in chain if e is not None for c in type(e).__mro__}
    text = " ".join((str(error).strip() or type(error).__name__).split())
    local = "; for local files give --model FOLDER, --train-file and --eval-file"
    if "GatedRepoError" in kinds:
        return (
            f"--model {name} is gated (401/403): accept its licence on the hub and log in with `hf "
            "auth login`" + local
        )
    if (
        kinds
        & {
            "LocalEntryNotFoundError",
            "OfflineModeIsEnabled",
            "ConnectError",
            "ConnectionError",
            "ConnectTimeout",
            "ProxyError",
        }
        or "couldn't connect" in text.lower()
        or "offline mode" in text.lower()
    ):
        return (
            f"--model {name} could not be fetched: no network, or the hub cannot be reached" + local
        )
    if kinds & {"RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"}:
        return (
            f"--model {name} was not found on the hub, or it is private and you are not logged in "
            "(`hf auth login`)" + local
        )
    if "trust_remote_code" in text or "custom code" in text:
        return (
            f"--model {name} needs code of its own, which is never run here: choose a model that "
            "transformers itself supports"
        )
    return f"--model {name} cannot be loaded: {text[:300]}"
