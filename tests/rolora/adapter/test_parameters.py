"""Factors on parameters that no linear owns, such as experts'. PEFT's target_parameters judges:
outputs, gradients, merged weights, files both ways.
"""

import copy
import json
import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rolora import (
    LoRAConfig,
    attach,
    detach,
    explain,
    get_adapter_state_dict,
    load_adapter,
    merge,
    save_adapter,
    set_adapter_state_dict,
    set_phase,
    unmerge,
)  # fmt: skip
from rolora.adapter.familiar import disable_adapter
from rolora.adapter.model import adapted_layers
from tests.mixtures import EXPERTS, GENERAL, LINEARS, ROUTED, build, inputs

ALL = ROUTED | GENERAL


def theirs(family, seed=0, **options):
    """PEFT's model with all its factors away from zero."""
    modules = [LINEARS.get(family, "q_proj")]
    asked = dict(r=4, lora_alpha=6, target_modules=modules, target_parameters=list(EXPERTS))
    made = peft.get_peft_model(build(family), peft.LoraConfig(**asked | options))
    torch.manual_seed(seed)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return made.eval()


def both(family, folder, **options):
    """(PEFT's model, ours with what PEFT wrote)."""
    judge = theirs(family, **options)
    judge.save_pretrained(folder)
    ours = build(family)
    load_adapter(ours, folder)
    return judge, ours


def close(a, b, gate=1e-5):
    return (a - b).abs().max() <= gate * b.abs().max()


CASES = {
    "gate, up and down": {},
    "down alone": {"target_parameters": ["experts.down_proj"]},
    "no linear": {"target_modules": []},
    "patterns": {
        "rank_pattern": {"experts.down_proj": 2, "q_proj": 3},
        "alpha_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 3},
    },
    "rslora": {"use_rslora": True},
    "a router too": {"target_parameters": [*EXPERTS, "gate.weight"]},
}


@pytest.mark.parametrize(
    ("family", "case"),
    [*((family, "gate, up and down") for family in ALL), *(("qwen3_moe", case) for case in CASES)],
)
def test_outputs_gradients_merges_and_files_are_pefts(family, case, tmp_path):
    judge, ours = both(family, tmp_path / "peft", **CASES[case])
    batch = inputs()
    wanted, found = judge(**batch), ours(**batch)
    assert not close(build(family)(**batch).logits, wanted.logits, 1e-2), "the factors count"
    assert close(found.logits, wanted.logits)

    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    mine = get_adapter_state_dict(ours)
    assert mine.keys() == stored.keys()
    assert all(torch.equal(mine[key], stored[key]) for key in stored)
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours").eval()
    assert close(again(**batch).logits, wanted.logits, 1e-7)

    set_phase(ours, "BOTH")
    judge.train(), judge.eval()
    for name, parameter in judge.named_parameters():
        parameter.requires_grad_("lora_" in name)
    found.loss.backward(), judge(**batch).loss.backward()
    grads = {n: p.grad for n, p in judge.named_parameters() if p.grad is not None}
    grads = peft.get_peft_model_state_dict(judge, state_dict=grads)
    for _, layer in adapted_layers(ours):
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.grad, layer.lora_B.grad
    mine = get_adapter_state_dict(ours)
    assert mine.keys() == grads.keys() and all(close(mine[key], grads[key]) for key in grads)


@pytest.mark.parametrize("family", ALL)
def test_merged_weights_are_pefts_and_unmerging_is_exact(family, tmp_path):
    judge, ours = both(family, tmp_path)
    base = {name: p.clone() for name, p in build(family).state_dict().items()}
    wanted = judge.merge_and_unload().state_dict()
    found = ours(**inputs()).logits
    lost = merge(ours)
    assert len(lost) == len(list(adapted_layers(ours))) and max(lost.values()) < 1e-3
    assert close(ours(**inputs()).logits, found)
    with disable_adapter(ours):
        assert close(ours(**inputs()).logits, build(family)(**inputs()).logits, 1e-6)
    for name, value in wanted.items():
        assert close(ours.state_dict()[name], value, 1e-6), name
    unmerge(ours)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in base.items())
    merge(ours)
    plain = detach(ours, merge=True)
    assert plain.state_dict().keys() == base.keys()
    assert [type(m) for m in plain.modules()] == [type(m) for m in build(family).modules()]
    assert close(plain(**inputs()).logits, found)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
@pytest.mark.parametrize("phase", ["A", "B", None])
def test_a_frozen_factor_has_no_gradient_and_the_other_has_its_own(family, phase, tmp_path):
    _, ours = both(family, tmp_path)
    ours(**inputs()).loss.backward()
    wanted = {path: (x.lora_A.grad, x.lora_B.grad) for path, x in adapted_layers(ours)}
    set_phase(ours, phase)
    for _, layer in adapted_layers(ours):
        layer.lora_A.grad = layer.lora_B.grad = None
    loss = ours(**inputs()).loss
    if phase is None:
        assert not loss.requires_grad
        return
    loss.backward()
    for path, layer in adapted_layers(ours):
        rests, trains = (
            (layer.lora_B, layer.lora_A) if phase == "A" else (layer.lora_A, layer.lora_B)
        )
        assert rests.grad is None and close(trains.grad, wanted[path]["AB".index(phase)], 1e-6)


def test_what_is_routed_says_so_and_what_is_not_says_why():
    routed, general, matrix = build("mixtral"), build("llama4"), build("olmoe")
    attach(matrix, LoRAConfig(rank=2, target_parameters=["gate.weight"]))
    assert "it is one matrix, not a stack of experts" in explain(matrix)[-1]
    for model in (routed, general):
        attach(model, LoRAConfig(rank=2, target_parameters=EXPERTS))
    assert any(line.endswith("down_proj: phase BOTH, routed by expert") for line in explain(routed))
    assert (
        "W + Δ made in every forward: Llama4TextExperts is no mixture that" in explain(general)[-1]
    )


def test_no_expert_s_product_is_made_and_an_unseen_expert_has_a_gradient_of_zero():
    model = build("qwen3_moe")
    attach(model, LoRAConfig(rank=2, target_modules=(), target_parameters=EXPERTS), seed=0)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B)
    stack = dict(adapted_layers(model))["model.layers.0.mlp.experts.gate_up_proj"]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = model(input_ids=torch.tensor([[5]])).logits.sum()
    weights = {p.data_ptr() for p in model.parameters()}
    assert not any(t.shape == stack.weight.shape and t.data_ptr() not in weights for t in kept)
    loss.backward()
    seen = stack.lora_A.grad.flatten(1).any(1)
    assert seen.sum() == 2, "one token meets two of four experts"
    assert not stack.lora_B.grad[~seen].any()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits(family, autocast, tmp_path):
    judge, ours = both(family, tmp_path)
    if not autocast:
        ours = build(family).bfloat16()
        load_adapter(ours, tmp_path)
        assert {x.lora_A.dtype for _, x in adapted_layers(ours)} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = ours(**inputs())
    found.loss.backward()
    assert close(found.logits.float(), judge(**inputs()).logits, 3e-2)
    grads = {path: x.lora_B.grad for path, x in adapted_layers(ours)}
    assert {g.dtype for g in grads.values()} == {torch.float32}
    exact = build(family)
    load_adapter(exact, tmp_path)
    exact(**inputs()).loss.backward()
    for path, layer in adapted_layers(exact):
        assert (grads[path] - layer.lora_B.grad).norm() < 0.1 * layer.lora_B.grad.norm()


def test_checkpointed_blocks_compute_the_same(tmp_path):
    _, ours = both("qwen3_moe", tmp_path)
    ours.train()
    ours(**inputs()).loss.backward()
    wanted = {path: x.lora_A.grad.clone() for path, x in adapted_layers(ours)}
    for _, layer in adapted_layers(ours):
        layer.lora_A.grad = None
    ours.gradient_checkpointing_enable()
    ours(**inputs()).loss.backward()
    assert all(torch.equal(x.lora_A.grad, wanted[path]) for path, x in adapted_layers(ours))


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_copies_and_pickles_compute_alone(family, tmp_path):
    _, ours = both(family, tmp_path)
    wanted = ours(**inputs()).logits
    for made in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(made(**inputs()).logits, wanted)
        for _, layer in adapted_layers(made):
            layer.lora_B.data.zero_()
        assert close(made(**inputs()).logits, build(family)(**inputs()).logits, 1e-6)
    assert torch.equal(ours(**inputs()).logits, wanted)


def test_state_dicts_under_peft_s_keys_come_back(tmp_path):
    judge, ours = both("gpt_oss", tmp_path)
    other = build("gpt_oss")
    modules = ["q_proj"]
    attach(other, LoRAConfig(rank=4, alpha=6, target_modules=modules, target_parameters=EXPERTS))
    set_adapter_state_dict(other, peft.get_peft_model_state_dict(judge))
    assert torch.equal(other(**inputs()).logits, ours(**inputs()).logits)


def test_a_start_draws_what_peft_draws():
    model = build("mixtral")
    attach(model, LoRAConfig(rank=4, target_parameters=["gate_up_proj"]), seed=0)
    for path, layer in adapted_layers(model):
        if path.endswith("gate_up_proj"):
            assert layer.lora_A.shape == (4, 4, 32) and not layer.lora_B.any()
            assert 0.9 / 32**0.5 < layer.lora_A.abs().max() <= 1 / 32**0.5


def test_reports_count_what_no_adapter_reaches():
    model = build("mixtral")
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    report = attach(model, LoRAConfig(rank=2, target_parameters=["experts.down_proj"]))
    assert report.parameters == [f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)]
    assert report.expert_parameters == sum(n for name, n in sizes.items() if "gate_up" in name)
    assert report.frozen_parameters == sum(sizes.values())
    matrices = {name: n for name, n in sizes.items() if "norm" not in name and "embed" not in name}
    assert report.linear_parameters == sum(matrices.values())
    ends = ("q_proj.weight", "v_proj.weight", "down_proj")
    reached = sum(n for name, n in matrices.items() if name.endswith(ends))
    assert report.unadapted_share == pytest.approx(1 - reached / sum(matrices.values()))
    assert report.experts == [f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(2)]
    own = [p.numel() for _, x in adapted_layers(model) for p in (x.lora_A, x.lora_B)]
    assert report.factor_parameters == sum(own)


def test_a_module_that_is_excluded_keeps_its_parameters():
    model = build("mixtral")
    asked = LoRAConfig(rank=2, target_parameters=EXPERTS, exclude_modules=["layers.0.mlp.experts"])
    found = attach(model, asked).parameters
    assert found == [f"model.layers.1.mlp.{name}" for name in EXPERTS]


def test_files_that_do_not_fit_are_refused(tmp_path):
    theirs("mixtral").save_pretrained(tmp_path)
    model = build("qwen3_moe")
    with pytest.raises(ValueError, match="the adapter was made for another base"):
        load_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, text in (
        ({"target_parameters": ["experts.up_proj"]}, "names 'experts.up_proj', which this model"),
        ({"target_parameters": "experts"}, "expected a list of names"),
        ({"r": 3}, "the two files belong to different adapters"),
        ({"lora_dropout": 0.1}, "does not go with dropout=0.1"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=text):
            load_adapter(build("mixtral"), tmp_path)
