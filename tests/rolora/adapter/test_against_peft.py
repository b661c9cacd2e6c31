"""PEFT judges: outputs, gradients of each phase, merged weights, training curves, and files both
ways.
"""

import peft
import pytest
import torch

from rolora import LoRAConfig, attach, load_adapter, merge, save_adapter, set_phase, unmerge
from rolora.adapter.model import adapted_layers
from tests.models import CAUSAL, ENCODERS, TARGETS, build, inputs

FAMILIES = list(CAUSAL | ENCODERS)


def pair(name, rank=4, alpha=6.0, rslora=False, layers=None):
    """(our model, PEFT's) with the same base and the same random factors, B included."""
    ours, theirs = build(name), build(name)
    attach(
        ours,
        LoRAConfig(
            rank=rank, alpha=alpha, target_modules=TARGETS[name], rslora=rslora, layers=layers
        ),
        seed=0,
    )
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=TARGETS[name],
        use_rslora=rslora,
        layers_to_transform=list(layers) if layers else None,
        fan_in_fan_out=name == "gpt2",
    )
    theirs = peft.get_peft_model(theirs, config).eval()
    generator = torch.Generator().manual_seed(5)
    modules = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for path, layer in adapted_layers(ours):
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.1)
            modules[path].lora_A["default"].weight.copy_(layer.lora_A)
            modules[path].lora_B["default"].weight.copy_(layer.lora_B)
    return ours, theirs


def peft_factors(model):
    modules = model.base_model.model.named_modules()
    return {n: m for n, m in modules if isinstance(m, peft.tuners.lora.LoraLayer)}


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_of_every_phase(name):
    ours, theirs = pair(name)
    batch = inputs(name)
    judge = peft_factors(theirs)
    assert list(judge) == [path for path, _ in adapted_layers(ours)]
    for phase in ("B", "A", "BOTH"):
        set_phase(ours, phase)
        for layer in judge.values():
            layer.lora_A["default"].weight.requires_grad_(phase != "B")
            layer.lora_B["default"].weight.requires_grad_(phase != "A")
        ours.zero_grad(), theirs.zero_grad()
        mine, other = ours(**batch), theirs(**batch)
        torch.testing.assert_close(mine.logits, other.logits, rtol=1e-5, atol=2e-6)
        mine.loss.backward(), other.loss.backward()
        for path, layer in adapted_layers(ours):
            for factor in "AB":
                grad = getattr(layer, f"lora_{factor}").grad
                wanted = getattr(judge[path], f"lora_{factor}")["default"].weight.grad
                assert (grad is None) == (wanted is None) == (phase not in (factor, "BOTH"))
                if grad is not None:
                    assert (grad - wanted).norm() <= 2e-5 * wanted.norm() + 1e-9
            assert layer.weight.grad is None


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_weights(name):
    ours, theirs = pair(name, rslora=True)
    batch = inputs(name)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    unmerged = ours(**batch).logits
    merge(ours)
    judge = theirs.merge_and_unload().state_dict()
    for key, value in ours.state_dict().items():
        if "lora_" not in key:
            torch.testing.assert_close(value, judge[key], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(**batch).logits, unmerged, rtol=1e-4, atol=1e-5)
    unmerge(ours)
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items()), (
        "unmerge restores the same bits"
    )


@pytest.mark.parametrize(
    "name, layers", [("llama", None), ("llama", range(1, 3)), ("roberta", [0, 2]), ("gpt2", None)]
)
def test_our_files_load_in_peft(name, layers, tmp_path):
    ours, _ = pair(name, rslora=True, layers=layers)
    save_adapter(ours, tmp_path, base_model="a/b")
    loaded = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert set(peft_factors(loaded)) == {path for path, _ in adapted_layers(ours)}
    torch.testing.assert_close(
        loaded(**inputs(name)).logits, ours(**inputs(name)).logits, rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize("name, layers", [("llama", None), ("bert", [1]), ("gpt2", None)])
def test_peft_files_load_here(name, layers, tmp_path):
    ours, theirs = pair(name, layers=layers)
    theirs.save_pretrained(tmp_path)
    fresh = build(name)
    assert load_adapter(fresh, tmp_path) == [path for path, _ in adapted_layers(ours)]
    torch.testing.assert_close(
        fresh(**inputs(name)).logits, theirs(**inputs(name)).logits, rtol=1e-5, atol=2e-6
    )


def test_a_trained_head_travels_both_ways(tmp_path):
    ours = build("roberta")
    attach(
        ours, LoRAConfig(rank=4, target_modules=["query"], modules_to_save=["classifier"]), seed=0
    )
    with torch.no_grad():
        ours.classifier.out_proj.weight.normal_()
    save_adapter(ours, tmp_path / "ours", task_type="SEQ_CLS", heads=["classifier"])
    loaded = peft.PeftModel.from_pretrained(build("roberta"), tmp_path / "ours").eval()
    logits = ours(**inputs("roberta")).logits
    torch.testing.assert_close(loaded(**inputs("roberta")).logits, logits, rtol=1e-5, atol=2e-6)
    loaded.save_pretrained(tmp_path / "theirs")
    again = build("roberta")
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(again(**inputs("roberta")).logits, logits, rtol=1e-5, atol=2e-6)


def test_the_same_training_curve():
    """A seeded twin run: 48 AdamW steps, alternating phases, loss for loss."""
    ours, theirs = pair("llama")
    ours, theirs = (
        ours.double(),
        theirs.double(),
    )  # AdamW turns a rounding of a tiny gradient into a full step
    batch, judge = inputs("llama"), None
    curves = ([], [])
    for model, curve in ((ours, curves[0]), (theirs, curves[1])):
        for phase in "BABABA":
            if model is ours:
                set_phase(ours, phase)
            else:
                judge = peft_factors(theirs)
                for layer in judge.values():
                    layer.lora_A["default"].weight.requires_grad_(phase == "A")
                    layer.lora_B["default"].weight.requires_grad_(phase == "B")
            optimizer = torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad], lr=2e-2
            )
            for _ in range(8):
                loss = model(**batch).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                curve.append(loss.item())
    assert curves[0][-1] < curves[0][0] - 0.2, "the run must learn, or the comparison is empty"
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-7


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(use_dora=True), "use_dora=True is not supported"),
        (dict(bias="all"), "bias='all' is not supported"),
        (dict(peft_type="IA3"), "peft_type is 'IA3'"),
    ],
)
def test_what_is_out_of_scope_is_refused_by_name(change, message, tmp_path):
    import json

    ours, _ = pair("llama")
    save_adapter(ours, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_adapter(build("llama"), tmp_path)


def test_an_adapter_of_another_base_leaves_the_model_as_it_was(tmp_path):
    ours, _ = pair("llama")
    save_adapter(ours, tmp_path)
    other = build("llama")
    attach(other, LoRAConfig(rank=2, alpha=3.0, target_modules=TARGETS["llama"]), seed=1)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match="made for another base model or rank"):
        load_adapter(other, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        load_adapter(build("llama"), tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        load_adapter(build("llama"), tmp_path / "nowhere")
