"""Matching, freezing, phases, state_dict, copies, and the errors a user meets."""

import copy
import io

import pytest
import torch
from torch import nn

from rolora import LoRAConfig, RoLoRALinear, attach, detach, set_phase
from rolora.adapter.model import adapted_layers
from tests.models import CAUSAL, ENCODERS, build, inputs


@pytest.mark.parametrize("name", list(CAUSAL | ENCODERS))
def test_step_zero_equals_the_base_and_base_keys_stay(name):
    model = build(name)
    batch = inputs(name)
    keys, logits = set(model.state_dict()), model(**batch).logits
    report = attach(model, LoRAConfig(rank=2), seed=0)
    added = set(model.state_dict()) - keys
    assert keys <= set(model.state_dict())
    assert added == {f"{path}.lora_{f}" for path in report.replaced for f in "AB"}
    torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-5, atol=1e-6)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == added
    assert report.factor_parameters == sum(
        p.numel() for n, p in model.named_parameters() if n in added
    )
    detach(model)
    assert set(model.state_dict()) == keys and torch.allclose(
        model(**batch).logits, logits, atol=1e-6
    )


def test_the_same_seed_draws_the_same_factors_whatever_the_global_generator():
    drawn = []
    for _ in range(2):
        model = build("llama")
        torch.rand(17)
        attach(model, LoRAConfig(rank=4), seed=42)
        drawn.append([layer.lora_A.detach() for _, layer in adapted_layers(model)])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    bound = 1 / 32**0.5  # kaiming_uniform(a = sqrt 5) is uniform in ±1/sqrt(in)
    values = torch.cat([a.flatten() for a in drawn[0]])
    assert values.abs().max() <= bound and abs(values.std() - bound / 3**0.5) < 0.05 * bound


def test_orthogonal_init_has_orthonormal_rows():
    layer = RoLoRALinear.from_linear(nn.Linear(20, 12), rank=5, init="orthogonal")
    torch.testing.assert_close(layer.lora_A @ layer.lora_A.t(), torch.eye(5), rtol=0, atol=1e-5)


def test_an_a_first_step_changes_nothing():
    """With B = 0 the gradient of A is exactly zero."""
    model = build("llama")
    attach(model, LoRAConfig(rank=4), seed=0)
    set_phase(model, "A")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=10.0, momentum=0.9
    )
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs("llama")).loss.backward()
        assert all(layer.lora_A.grad.abs().max() == 0 for _, layer in adapted_layers(model))
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_freezing_a_factor_drops_its_gradient():
    model = build("llama")
    attach(model, LoRAConfig(rank=4), seed=0)
    model(**inputs("llama")).loss.backward()
    set_phase(model, "B")
    for _, layer in adapted_layers(model):
        assert layer.lora_A.grad is None and layer.lora_B.grad is not None and layer.phase == "B"


@pytest.mark.parametrize(
    "config, expected",
    [
        (
            dict(target_modules=r".*layers\.1\..*(q|o)_proj"),
            ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"],
        ),
        (
            dict(target_modules=["v_proj"], layers=range(1, 3)),
            ["model.layers.1.self_attn.v_proj", "model.layers.2.self_attn.v_proj"],
        ),
        (dict(target_modules=["model.layers.0.mlp.up_proj"]), ["model.layers.0.mlp.up_proj"]),
        (dict(layers=[0]), ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]),
    ],
)
def test_matching(config, expected):
    assert attach(build("llama"), LoRAConfig(rank=2, **config)).replaced == expected


def test_all_linear_leaves_the_output_head():
    replaced = attach(build("llama"), LoRAConfig(rank=2, target_modules="all-linear")).replaced
    assert len(replaced) == 21 and not any("lm_head" in name for name in replaced)


@pytest.mark.parametrize(
    "config, message",
    [
        (
            dict(target_modules=["q_prj"]),
            "'q_prj' matches no module; nearest linear layers: q_proj",
        ),
        (dict(target_modules=["q_proj", "w_proj"]), "'w_proj' matches no module"),
        (dict(target_modules="nothing.*"), "matches no module"),
        (dict(target_modules="("), "not a regular expression"),
        (
            dict(target_modules=["embed_tokens"]),
            "embed_tokens.*only linear layers|matches no module",
        ),
        (dict(layers=range(2, 5)), "layers 2-4 given, but the matched modules lie in layers 0-2"),
        (dict(layers=[]), "layers none given"),
        (dict(rank=33, init="pissa"), "rank 33 does not fit a 32x32 linear: give 1 to 32"),
        (dict(rank=0), "rank 0 does not fit"),
        (dict(modules_to_save=["scorer"]), "names 'scorer', which the model lacks"),
        (dict(init="ones"), "init must be one of"),
        (dict(dropout=2.0), r"dropout must lie in \[0, 1\]"),
    ],
)
def test_bad_configurations_name_what_is_wrong_and_change_nothing(config, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        attach(model, LoRAConfig(**({"rank": 2} | config)))
    assert not list(adapted_layers(model)) and all(p.requires_grad for p in model.parameters())


def test_attaching_twice_and_phases_without_factors_raise():
    model = build("llama")
    with pytest.raises(ValueError, match="attach them first"):
        set_phase(model, "A")
    attach(model, LoRAConfig(rank=2))
    with pytest.raises(ValueError, match="already has LoRA factors"):
        attach(model, LoRAConfig(rank=2))
    with pytest.raises(ValueError, match="phase must be one of"):
        set_phase(model, "C")


def test_only_linears_that_are_called_can_be_wrapped():
    with pytest.raises(TypeError, match="Embedding"):
        RoLoRALinear.from_linear(nn.Embedding(4, 4))
    with pytest.raises(TypeError, match="NonDynamicallyQuantizableLinear"):
        RoLoRALinear.from_linear(nn.MultiheadAttention(8, 2).out_proj, rank=2)


def test_copies_and_state_survive():
    model = build("llama")
    attach(model, LoRAConfig(rank=2, target_modules=["q_proj", "k_proj", "v_proj"]), seed=0)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B)
    batch = inputs("llama")
    twin = copy.deepcopy(model)
    logits = model(**batch).logits
    assert torch.equal(twin(**batch).logits, logits)
    own = {id(layer) for _, layer in adapted_layers(twin)}
    assert all(id(m) in own for _, layer in adapted_layers(twin) for m in layer.group.members), (
        "groups are copied, not shared"
    )
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    other = build("llama", seed=9)
    attach(other, LoRAConfig(rank=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(**batch).logits, logits)
    half = model.to(torch.bfloat16)
    half(**batch).loss.backward()
    assert all(layer.lora_A.grad.dtype == torch.bfloat16 for _, layer in adapted_layers(half)), (
        "factors follow .to()"
    )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "roberta"])
def test_gradient_checkpointing_of_whole_models(name, reentrant):
    results = []
    for use in (False, True):
        model = build(name)
        attach(model, LoRAConfig(rank=2, target_modules="all-linear"), seed=0)
        for _, layer in adapted_layers(model):
            nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(1))
        set_phase(model, "A")
        if use:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            model.train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        model(**inputs(name)).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*results)


def test_autocast_trains_fp32_factors():
    model = build("llama")
    attach(model, LoRAConfig(rank=2), seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs("llama")).loss.backward()
    grads = [layer.lora_B.grad for _, layer in adapted_layers(model)]
    assert all(g.dtype == torch.float32 and g.abs().max() > 0 for g in grads)
