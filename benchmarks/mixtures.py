"""Tiny mixtures of experts, and their experts' adapters beside PEFT's `target_parameters`: the part
of the table of architectures (benchmarks.architectures) that is about experts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers as hf
from torch import Tensor

from rolora import LoRAConfig, attach, get_adapter_state_dict, load_adapter, merge, save_adapter
from rolora.adapter.coverage import stacks
from rolora.adapter.model import adapted_layers
from rolora.adapter.parameter import RoLoRAParameter

RANK = 4
_S: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
_IDS: dict[str, Any] = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
_FOUR = dict(num_experts=4, num_experts_per_tok=2)
_MOE: dict[str, Any] = dict(moe_intermediate_size=16, **_FOUR, **_S)
_LOCAL: dict[str, Any] = dict(num_local_experts=4, num_experts_per_tok=2, **_S)
_ATTENTION = dict(layer_types=["full_attention", "full_attention"])
_ROUTED: dict[str, Any] = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
)
_LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
_MLA: dict[str, Any] = _ROUTED | _LATENT | _S | dict(num_key_value_heads=4)
MIXTURES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: hf.MixtralConfig(**_LOCAL),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(shared_expert_intermediate_size=16, **_MOE),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(head_dim=8, **_MOE),
    "qwen3_next": lambda: hf.Qwen3NextConfig(
        head_dim=8, shared_expert_intermediate_size=16, **_ATTENTION, **_MOE, **_IDS
    ),
    "phimoe": lambda: hf.PhimoeConfig(**_LOCAL),
    "gpt_oss": lambda: hf.GptOssConfig(head_dim=8, **_LOCAL),
    "llama4_text": lambda: hf.Llama4TextConfig(
        head_dim=8, intermediate_size_mlp=64, num_local_experts=2, **_S
    ),
    "deepseek_v2": lambda: hf.DeepseekV2Config(**_MLA, **_IDS),
    "deepseek_v3": lambda: hf.DeepseekV3Config(**_MLA),
    "olmoe": lambda: hf.OlmoeConfig(**_FOUR, **_S, **_IDS),
    "granitemoe": lambda: hf.GraniteMoeConfig(**_LOCAL, **_IDS),
    "glm4_moe": lambda: hf.Glm4MoeConfig(head_dim=8, **_ROUTED, **_S, **_IDS),
    "dots1": lambda: hf.Dots1Config(head_dim=8, n_shared_experts=1, **_ROUTED, **_S, **_IDS),
    "ernie4_5_moe": lambda: hf.Ernie4_5_MoeConfig(
        moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_num_shared_experts=1, **_S, **_IDS
    ),
    "hunyuan_v1_moe": lambda: hf.HunYuanMoEV1Config(
        head_dim=8, num_experts=4, moe_topk=2, **_S, **_IDS
    ),
    "minimax": lambda: hf.MiniMaxConfig(head_dim=8, **_ATTENTION, **_LOCAL, **_IDS),
    "lfm2_moe": lambda: hf.Lfm2MoeConfig(num_dense_layers=1, **_ATTENTION, **_MOE, **_IDS),
}


@dataclass(frozen=True)
class Experts:
    """The experts of one architecture, adapted: the ends of their paths, how they are computed, the
    share of the linear parameters that is left beside `all-linear`, and what is apart from PEFT
    (relative; see architectures.Row).
    """

    names: tuple[str, ...]
    routed: bool
    unadapted: float
    outputs: float
    gradients: float
    merged: float
    to_peft: float
    from_peft: float

    @property
    def worst(self) -> float:
        return max(self.outputs, self.gradients, self.merged, self.to_peft, self.from_peft)


def examine(build: Callable[[], Any], batch: dict[str, Tensor]) -> Experts | None:
    """The experts of the model that `build` makes; None for one that has none."""
    ours, names = build(), {}
    for path in stacks(ours):
        names[".".join(path.split(".")[-2:])] = None
    if not names:
        return None
    attach(ours, LoRAConfig(rank=RANK, alpha=6.0, target_modules=(), target_parameters=names))
    parts = [layer for _, layer in adapted_layers(ours) if isinstance(layer, RoLoRAParameter)]
    asked = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=[], target_parameters=list(names))
    judge = peft.get_peft_model(build(), asked).eval()
    _same_factors(ours, judge)
    mine, theirs = ours(**batch), judge(**batch)
    mine.loss.backward(), theirs.loss.backward()
    there = {name: p.grad for name, p in judge.named_parameters() if p.grad is not None}
    gradients = _worst(_gradients(ours), peft.get_peft_model_state_dict(judge, state_dict=there))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(ours, folder)
        loaded = peft.PeftModel.from_pretrained(build(), folder).eval()
        to_peft = apart(loaded(**batch).logits, theirs.logits)
    with tempfile.TemporaryDirectory() as folder:
        judge.save_pretrained(folder)
        again = build()
        load_adapter(again, folder)
        from_peft = apart(again(**batch).logits, theirs.logits)
    merge(ours)
    state = judge.merge_and_unload().state_dict()
    weights = {path: layer.weight.detach() for path, layer in adapted_layers(ours)}
    return Experts(
        tuple(names),
        all(part.routed for part in parts),
        _left(build(), list(names)),
        apart(mine.logits, theirs.logits),
        gradients,
        _worst(weights, state),
        to_peft,
        from_peft,
    )


def _left(model: Any, names: list[str]) -> float:
    config = LoRAConfig(rank=1, target_modules="all-linear", target_parameters=names)
    return attach(model, config, seed=0).unadapted_share


@torch.no_grad()
def _same_factors(ours: Any, judge: Any) -> None:
    """Factors away from zero in both; PEFT is told by its own function."""
    draw = torch.Generator().manual_seed(5)
    for _, layer in adapted_layers(ours):
        layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=draw) * 0.1)
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=draw) * 0.1)
    told = peft.set_peft_model_state_dict(judge, get_adapter_state_dict(ours))
    if told.unexpected_keys:
        raise ValueError(f"PEFT knows no {told.unexpected_keys[0]}")


def _gradients(ours: Any) -> dict[str, Tensor]:
    """Under the keys of files; the factors keep their values."""
    kept = []
    for _, layer in adapted_layers(ours):
        for factor in (layer.lora_A, layer.lora_B):
            kept.append((factor, factor.data))
            factor.data = torch.zeros_like(factor) if factor.grad is None else factor.grad
    found = get_adapter_state_dict(ours)
    for factor, data in kept:
        factor.data = data
    return found


def _worst(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference; every one of ours must be there."""
    return max(apart(value, theirs[key]) for key, value in mine.items())


def apart(mine: Tensor, other: Tensor) -> float:
    """Their difference over the second one's size."""
    size = other.double().norm().item()
    return (mine.double() - other.double()).norm().item() / max(size, 1e-12)
