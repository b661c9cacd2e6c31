"""Small mixtures of experts made from their configurations, one of each way to keep the weights."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf

_SIZE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, pad_token_id=None, eos_token_id=None,
    bos_token_id=None,
)  # fmt: skip
_HEADS = dict(
    q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    num_key_value_heads=4,
)  # fmt: skip
ROUTED = {
    "mixtral": lambda: hf.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **_SIZE),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, **_SIZE
    ),
    "olmoe": lambda: hf.OlmoeConfig(num_experts=4, num_experts_per_tok=2, **_SIZE),
    # [experts, in, out], biases, and gate and up in turns
    "gpt_oss": lambda: hf.GptOssConfig(
        num_local_experts=4, num_experts_per_tok=2, head_dim=8, **_SIZE
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1,
        topk_group=1, first_k_dense_replace=1, **_SIZE | _HEADS,
    ),
}  # fmt: skip
GENERAL = {
    # [experts, in, out] without saying so, and no mixture that transformers dispatches
    "llama4": lambda: hf.Llama4TextConfig(
        num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=48, head_dim=8,
        interleave_moe_layer_step=1, **_SIZE,
    ),
}  # fmt: skip
LINEARS = {"deepseek_v3": "q_b_proj"}  # elsewhere q_proj
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def build(name: str, seed: int = 0, **sizes: int) -> torch.nn.Module:
    """A small mixture of family `name`, the same for the same seed, in eval mode; `sizes`: what
    differs in its configuration.
    """
    torch.manual_seed(seed)
    config = (ROUTED | GENERAL)[name]()
    config.update(sizes)
    if name == "llama4":
        return hf.Llama4ForCausalLM(config).eval()
    return hf.AutoModelForCausalLM.from_config(config).eval()


def mixture(words: Path, folder: Path) -> None:
    """A Qwen3 mixture in `folder` with the tokenizer that lies in `words`."""
    tokenizer = hf.AutoTokenizer.from_pretrained(words)
    size = _SIZE | {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    config = hf.Qwen3MoeConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, **size
    )
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def inputs(batch: int = 3, length: int = 7) -> dict:
    ids = torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}
