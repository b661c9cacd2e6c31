"""llama.cpp's format: gguf's own reader reads it, and NumPy computes what llama.cpp would add."""

import json

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from rolora import LoRAConfig, attach, export, save_adapter

gguf = pytest.importorskip("gguf")
SIZE = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
FAMILIES = {
    "llama": (hf.LlamaConfig, {}),
    "mistral": (hf.MistralConfig, {"head_dim": 8}),
    "smollm3": (hf.SmolLM3Config, {}),
    "granite": (hf.GraniteConfig, {}),
    "qwen2": (hf.Qwen2Config, {}),
    "qwen3": (hf.Qwen3Config, {"head_dim": 16}),
    "gemma": (hf.GemmaConfig, {"head_dim": 16}),
    "gemma2": (hf.Gemma2Config, {"head_dim": 16}),
    "gemma3_text": (hf.Gemma3TextConfig, {"head_dim": 16}),
    "phi3": (hf.Phi3Config, {}),
    "olmo2": (hf.Olmo2Config, {}),
    "starcoder2": (hf.Starcoder2Config, {}),
    "stablelm": (hf.StableLmConfig, {}),
}
# What llama.cpp calls the linears of a block.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
PERMUTED = {"llama", "mistral", "smollm3", "granite"}


def adapted(family, folder, **options):
    """{module path: the change that it makes, fp64}, with base and adapter in `folder`."""
    cls, more = FAMILIES[family]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(cls(**SIZE | more))
    model.save_pretrained(folder / "base")
    report = attach(model, LoRAConfig(target_modules="all-linear", **options), seed=0)
    changes = {}
    for path, layer in report.layers.items():
        nn.init.normal_(layer.lora_B, std=0.1)
        A, B = (factor.detach().double().numpy() for factor in (layer.lora_A, layer.lora_B))
        changes[path] = layer.scaling * (B @ A)
    save_adapter(model, folder / "a", base_model=str(folder / "base"), task_type="CAUSAL_LM")
    return model.config, changes


def as_llama_cpp(path):
    """{tensor of the model: what llama.cpp adds to it, fp64}, and the file's keys."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    found = {}
    for tensor in reader.tensors:
        data = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float64)
        found[tensor.name] = data.reshape(tuple(reversed([int(n) for n in tensor.shape])))
    alpha, changes = fields["adapter.lora.alpha"], {}
    for name in [name for name in found if name.endswith(".lora_a")]:
        A, B = found[name], found[name.removesuffix("a") + "b"]
        changes[name.removesuffix(".lora_a")] = alpha / B.shape[1] * (B @ A)
    return changes, fields


def rotated_pairs_together(change, heads):
    """Rows as llama.cpp has them: row i and row i + d/2 of a head next to each other."""
    size = change.shape[0] // heads
    order = [
        h * size + half * (size // 2) + i
        for h in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return change[order]


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_would_add_what_the_adapter_adds(family, tmp_path, call):
    config, changes = adapted(family, tmp_path, rank=3, alpha=5)
    args = ("--adapter", tmp_path / "a", "--to", "gguf-lora", "--output-dir", tmp_path / "g")
    code, out, err = call(*args, command=export.command)
    assert (code, err) == (0, ""), err
    found, fields = as_llama_cpp(tmp_path / "g" / "adapter.gguf")
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    expected_arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(family, family)
    assert fields["general.architecture"] == expected_arch
    expected = {}
    for path, change in changes.items():
        _, _, block, inside = path.split(".", 3)
        if family in PERMUTED and inside == "self_attn.q_proj":
            change = rotated_pairs_together(change, config.num_attention_heads)
        if family in PERMUTED and inside == "self_attn.k_proj":
            change = rotated_pairs_together(change, config.num_key_value_heads)
        expected[f"blk.{block}.{NAMES[inside]}.weight"] = change
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        np.testing.assert_allclose(found[name], change, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype, gate", [("fp32", 1e-6), ("bf16", 8e-3), ("fp16", 1e-3)])
def test_ranks_and_alphas_of_single_modules(rslora, dtype, gate, tmp_path, call):
    options = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"o_proj": 7, r"1\.mlp\..*": 1}}
    _, changes = adapted("qwen2", tmp_path, rank=4, alpha=6, rslora=rslora, **options)
    args = ("--adapter", tmp_path / "a", "--to", "gguf-lora", "--dtype", dtype)
    assert call(*args, "--output-dir", tmp_path / "g", command=export.command)[0] == 0
    found, _ = as_llama_cpp(tmp_path / "g" / "adapter.gguf")
    for path, change in changes.items():
        _, _, block, inside = path.split(".", 3)
        error = found[f"blk.{block}.{NAMES[inside]}.weight"] - change
        assert np.linalg.norm(error) < gate * np.linalg.norm(change), path


def test_what_the_format_cannot_hold_is_refused_by_name(files, tmp_path, call):
    torch.manual_seed(0)
    for name, model, options, expected in (
        (
            "gpt2",
            hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2)),
            {},
            "lays out a gpt2",
        ),
        (
            "head",
            hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE)),
            {"modules_to_save": ["lm_head"]},
            "saves lm_head.weight whole",
        ),
    ):
        model.save_pretrained(tmp_path / name)
        attach(model, LoRAConfig(rank=2, target_modules="all-linear", **options))
        save_adapter(model, tmp_path / f"{name}-a", base_model=str(tmp_path / name))
        args = (
            "--adapter",
            tmp_path / f"{name}-a",
            "--to",
            "gguf-lora",
            "--output-dir",
            tmp_path / "g",
        )
        code, _, err = call(*args, command=export.command)
        assert code == 2 and expected in err and err.count("\n") == 1
        assert not (tmp_path / "g").exists()


def test_a_value_that_fp16_cannot_hold_is_refused(tmp_path, call):
    adapted("llama", tmp_path, rank=2, alpha=4)
    path = tmp_path / "a" / "adapter_config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"alpha_pattern": {"q_proj": 1e9}}))
    args = ("--adapter", tmp_path / "a", "--to", "gguf-lora", "--output-dir", tmp_path / "g")
    code, _, err = call(*args, "--dtype", "fp16", command=export.command)
    assert code == 2 and "--dtype fp16 cannot hold blk.0.attn_q" in err and err.count("\n") == 1
