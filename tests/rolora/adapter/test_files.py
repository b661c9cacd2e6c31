"""What is written is what was asked for, and PEFT loads it: heads, wrapped models, bare bases, names
that end alike.
"""

import json

import peft
import pytest
import torch
from torch import nn

from rolora import (
    LoRAConfig,
    attach,
    get_adapter_state_dict,
    load_adapter,
    save_adapter,
    set_adapter_state_dict,
)
from rolora.adapter.model import adapted_layers
from tests.models import build, inputs
from tests.rolora.adapter.filled import close, filled


def test_a_head_that_attach_was_told_to_save_is_saved_and_restored(tmp_path):
    model = filled(build("roberta"), modules_to_save=["classifier"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**inputs("roberta")).loss.backward()
    optimizer.step()
    save_adapter(model, tmp_path)
    logits = model(**inputs("roberta")).logits
    theirs = peft.PeftModel.from_pretrained(build("roberta"), tmp_path).eval()
    close(theirs(**inputs("roberta")).logits, logits)
    again = build("roberta")
    load_adapter(again, tmp_path)
    close(again(**inputs("roberta")).logits, logits)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


Wrapper.__name__ = "DistributedDataParallel"  # the real one needs a process group


@pytest.mark.parametrize("wrap", [torch.compile, Wrapper, lambda m: Wrapper(torch.compile(m))])
def test_wrapped_models_write_the_keys_of_the_one_inside(wrap, tmp_path):
    model = filled(build("roberta"), modules_to_save=["classifier"])
    save_adapter(wrap(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("roberta"), tmp_path).eval()
    close(theirs(**inputs("roberta")).logits, model(**inputs("roberta")).logits)
    load_adapter(wrap(build("roberta")), tmp_path)


def test_a_part_that_was_compiled_keeps_its_path(tmp_path):
    model = filled(build("roberta"))
    layers = model.roberta.encoder.layer
    plain, layers[1] = layers[1], torch.compile(layers[1])
    save_adapter(model, tmp_path)
    layers[1] = plain
    theirs = peft.PeftModel.from_pretrained(build("roberta"), tmp_path).eval()
    close(theirs(**inputs("roberta")).logits, model(**inputs("roberta")).logits)


def test_the_base_is_named_by_the_models_config(tmp_path):
    model = build("llama")
    model.config._name_or_path = "some/base"
    save_adapter(filled(model, target_modules=["q_proj"]), tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == "some/base"


def test_chosen_layers_of_a_bare_base_model_load_in_peft(tmp_path):
    model = filled(build("llama").model, target_modules=["q_proj"], layers=[0, 2])
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("llama").model, tmp_path).eval()
    batch = {k: v for k, v in inputs("llama").items() if k != "labels"}
    close(theirs(**batch).last_hidden_state, model(**batch).last_hidden_state)


class Alike(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.sub = nn.ModuleDict({"foo": nn.Linear(6, 6)})
        self.foo = nn.Linear(6, 6)

    def forward(self, x):
        return self.foo(self.sub["foo"](x).tanh())


@pytest.mark.parametrize("config", [dict(target_modules=r"foo"), dict(rank_pattern={"^foo": 3})])
def test_paths_that_end_alike_are_not_mixed_up(config, tmp_path):
    model = filled(Alike(), **({"target_modules": ["foo"]} | config))
    save_adapter(model, tmp_path)
    x = torch.randn(4, 6)
    theirs = peft.PeftModel.from_pretrained(Alike(), tmp_path).eval()
    close(theirs(x), model(x))
    again = Alike()
    assert load_adapter(again, tmp_path) == [name for name, _ in adapted_layers(model)]
    close(again(x), model(x))


def test_a_rank_above_the_smaller_side_as_peft_has_it(tmp_path):
    theirs = peft.LoraConfig(r=40, target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(build("llama"), theirs).eval()
    theirs.save_pretrained(tmp_path)
    model = build("llama")
    load_adapter(model, tmp_path)
    close(model(**inputs("llama")).logits, theirs(**inputs("llama")).logits)


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("r", 0, "a whole number of 1 or more"),
        ("r", 2.5, "a whole number of 1 or more"),
        ("r", None, "a whole number of 1 or more"),
        ("r", 10**9, "says rank 1000000000 for .* and lora_A has 2 rows"),
        ("lora_alpha", float("nan"), "a finite number"),
        ("lora_alpha", float("inf"), "a finite number"),
        ("lora_alpha", "16", "a finite number"),
        ("lora_alpha", 10**400, "a finite number"),
        ("lora_dropout", 1.5, "a number from 0 to 1"),
        ("lora_dropout", float("nan"), "a number from 0 to 1"),
        ("rank_pattern", {"q_proj": 0}, "patterns with ranks of 1 or more"),
        ("rank_pattern", {"(": 2}, "patterns with ranks of 1 or more"),
        ("rank_pattern", {"q_proj": 3}, "says rank 3 for .* and lora_A has 2 rows"),
        ("alpha_pattern", {"q_proj": float("nan")}, "patterns with finite numbers"),
        ("modules_to_save", "score", "a list of names"),
        ("base_model_name_or_path", 5, "a name"),
    ],
)
def test_numbers_that_no_adapter_has_are_refused_in_one_line(field, value, expected, tmp_path):
    save_adapter(filled(build("llama"), target_modules=["q_proj"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    model = build("llama")
    with pytest.raises(ValueError, match=expected) as caught:
        load_adapter(model, tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)
    assert not list(adapted_layers(model))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_refused_by_attach(alpha):
    with pytest.raises(ValueError, match="alpha must be a finite number"):
        attach(build("llama"), LoRAConfig(rank=2, alpha=alpha))


def test_a_failed_load_leaves_a_bare_model_bare(tmp_path):
    save_adapter(filled(build("roberta"), modules_to_save=["classifier"]), tmp_path)
    model = build("roberta")
    model.classifier.out_proj = nn.Linear(32, 7)
    with pytest.raises(ValueError, match="made for another base model or rank"):
        load_adapter(model, tmp_path)
    assert not list(adapted_layers(model)) and all(p.requires_grad for p in model.parameters())


def test_state_in_memory_goes_both_ways_with_peft():
    model = filled(build("roberta"), modules_to_save=["classifier"], alpha=4)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["query"], modules_to_save=["classifier"]
    )
    theirs = peft.get_peft_model(build("roberta", seed=3), config).eval()
    wanted = peft.get_peft_model_state_dict(theirs)
    mine = get_adapter_state_dict(model)
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in wanted.items()}
    set_adapter_state_dict(model, wanted)
    now = get_adapter_state_dict(model)
    assert all(torch.equal(value, wanted[key]) for key, value in now.items())
    peft.set_peft_model_state_dict(theirs, mine)
    back = peft.get_peft_model_state_dict(theirs)
    assert all(torch.equal(value, mine[key]) for key, value in back.items())
    broken = now | {next(iter(now)): torch.full_like(next(iter(now.values())), float("nan"))}
    with pytest.raises(ValueError, match="not finite"):
        set_adapter_state_dict(model, broken)
    assert "base_model.model" in json.dumps(list(now))


def test_what_a_configuration_leaves_out_is_peft_s_default(tmp_path):
    ours = build("llama")
    attach(ours, LoRAConfig(rank=8, alpha=8, target_modules=["q_proj"]), seed=0)
    for _, layer in adapted_layers(ours):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(ours, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in ("r", "lora_alpha")}))
    again = build("llama")
    load_adapter(again, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    wanted = theirs(**inputs("llama")).logits
    torch.testing.assert_close(again(**inputs("llama")).logits, wanted, rtol=1e-5, atol=2e-6)
