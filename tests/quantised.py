"""Quantised modules and folders of quantised models, as bitsandbytes and transformers make them."""

import bitsandbytes as bnb
import torch
import transformers as hf
from torch import nn

from rolora.hf import models

KINDS = ("nf4", "int8")


def quantised(kind, out_features=128, in_features=64, bias=True, seed=0):
    """(bitsandbytes' module, its weight dense as bitsandbytes gives it)."""
    torch.manual_seed(seed)
    dense = nn.Linear(in_features, out_features, bias=bias)
    if kind == "nf4":
        made = bnb.nn.Linear4bit(
            in_features, out_features, bias=bias, compute_dtype=torch.float32, quant_type="nf4"
        )
        made.load_state_dict(dense.state_dict())
        made = made.to("cpu")
        if getattr(made.weight, "quant_state", None) is None:
            made.weight = made.weight._quantize("cpu")
        return made, bnb.functional.dequantize_4bit(
            made.weight.data, made.weight.quant_state
        ).float()
    made = bnb.nn.Linear8bitLt(in_features, out_features, bias=bias, has_fp16_weights=False)
    made.load_state_dict(dense.state_dict())
    made = made.to("cpu")
    if made.weight.dtype != torch.int8:
        made.weight = made.weight._quantize("cpu")
    return made, made.weight.data.float() * made.weight.SCB[:, None] / 127


def dense_models(folder, files):
    """Folders of a Llama and a RoBERTa whose widths fill blocks of 64, with the tokenizers of the
    small ones.
    """
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
    made = {}
    for family, cls, config in (
        ("llama", hf.LlamaForCausalLM, hf.LlamaConfig),
        ("roberta", hf.RobertaForMaskedLM, hf.RobertaConfig),
    ):
        tokenizer, made[family] = hf.AutoTokenizer.from_pretrained(files[family]), folder / family
        more = (
            {"pad_token_id": 1, "max_position_embeddings": 66}
            if family == "roberta"
            else {"max_position_embeddings": 128}
        )
        torch.manual_seed(0)
        cls(config(vocab_size=len(tokenizer), **sizes, **more)).save_pretrained(made[family])
        tokenizer.save_pretrained(made[family])
    return {**files, **made}


def saved_quantised(folder, files, kind):
    """A folder with a Llama that is quantised already; the model in memory too."""
    asked = hf.BitsAndBytesConfig(
        load_in_4bit=kind == "nf4",
        load_in_8bit=kind == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    dense = dense_models(folder / "dense", files)["llama"]
    model = hf.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=asked, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(folder / "small")
    hf.AutoTokenizer.from_pretrained(dense).save_pretrained(folder / "small")
    return model


def read(folder, labels=None, dtype=torch.float32):
    config = hf.AutoConfig.from_pretrained(folder)
    return models.load_model(
        str(folder),
        config,
        hf.AutoTokenizer.from_pretrained(folder),
        labels=labels,
        dtype=dtype,
        device=torch.device("cpu"),
        attn="sdpa",
        seed=0,
    )
