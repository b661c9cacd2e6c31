"""Which linears are chosen: output layers, routers, defaults, hooks."""

import pytest
import torch
import transformers as hf
from torch import nn

from rolora import LoRAConfig, attach, detach
from tests.models import build, inputs

SMALL = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1)


def test_whispers_tied_output_layer_is_left_alone():
    config = hf.WhisperConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = hf.WhisperForConditionalGeneration(config)
    report = attach(model, LoRAConfig(rank=2, target_modules="all-linear"))
    assert report.replaced and "proj_out" not in report.replaced
    assert type(model.proj_out) is nn.Linear


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.shared_expert_gate = nn.Linear(4, 2), nn.Linear(4, 1)
        self.gate_proj, self.experts = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])


def test_routers_are_left_alone():
    model = nn.ModuleDict({"mlp": Experts(), "gate": nn.Linear(4, 4)})
    report = attach(model, LoRAConfig(rank=1, target_modules="all-linear"))
    assert report.replaced == ["mlp.gate_proj", "mlp.experts.0", "gate"]


def test_the_out_projection_of_multihead_attention_is_refused_with_the_way_out():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match=r"attention\.out_proj.*exclude_modules=\['out_proj'\]"):
        attach(model, LoRAConfig(rank=2, target_modules="all-linear"))
    config = LoRAConfig(rank=2, target_modules="all-linear", exclude_modules=["out_proj"])
    assert attach(model, config).replaced == ["mlp"]


def last_names(model):
    return {name.split(".")[-1] for name in attach(model, LoRAConfig(rank=2)).replaced}


def test_defaults_of_more_families_as_in_peft():
    deberta = hf.DebertaV2Config(**SMALL, num_attention_heads=2)
    assert last_names(hf.DebertaV2Model(deberta)) == {"query_proj", "value_proj"}
    phi = hf.PhiConfig(**SMALL, num_attention_heads=2)
    assert last_names(hf.PhiForCausalLM(phi)) == {"q_proj", "v_proj", "fc1", "fc2"}


def test_defaults_of_latent_attention():
    names = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
    assert last_names(model) == set(names) - {"o_proj"}


def test_hooks_stay_through_attach_and_detach_and_can_be_removed():
    model, calls = build("llama"), []
    linear = model.model.layers[0].self_attn.q_proj
    handle = linear.register_forward_hook(lambda *_: calls.append("after"))
    linear.register_forward_pre_hook(lambda *_: calls.append("before"))
    attach(model, LoRAConfig(rank=2))
    model(**inputs("llama"))
    assert calls == ["before", "after"]
    detach(model)
    handle.remove()
    model(**inputs("llama"))
    assert calls == ["before", "after", "before"]


def test_a_forward_that_was_replaced_on_the_instance_is_refused():
    model = build("llama")
    linear = model.model.layers[1].self_attn.v_proj
    linear.forward = lambda x: torch.zeros(*x.shape[:-1], linear.out_features)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj: its forward was replaced"):
        attach(model, LoRAConfig(rank=2))


def test_the_hooks_of_a_device_map_are_no_obstacle():
    hooks = pytest.importorskip("accelerate.hooks")
    model, plain = build("llama"), build("llama")
    hooks.attach_execution_device_hook(model, "cpu")
    attach(model, LoRAConfig(rank=2))
    wanted = plain(**inputs("llama")).logits
    torch.testing.assert_close(model(**inputs("llama")).logits, wanted, rtol=1e-5, atol=1e-6)
