"""Starts made of the base's weights: made again from the base, refused where they cannot be, and as PEFT converts them."""

import peft
import pytest
import torch

from rolora import (
    get_adapter_state_dict,
    load_adapter,
    save_adapter,
    set_adapter_state_dict,
)
from rolora.adapter.files import read_adapter
from rolora.adapter.model import adapted_layers
from tests.models import build, inputs
from tests.rolora.adapter.filled import close, filled


def started(name, start, folder, **config):
    """PEFT's model that was started from the base's weights and then changed, saved raw."""
    targets = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn"]}[name]
    asked = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=start, **config)
    theirs = peft.get_peft_model(build(name), asked).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_B" in key:
                parameter.add_(0.1)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize(
    "name, start, config",
    [
        ("llama", "pissa", {}),
        ("llama", "olora", {}),
        ("llama", "pissa", dict(use_rslora=True, lora_alpha=3, rank_pattern={"up_proj": 5})),
        ("llama", "olora", dict(lora_alpha=3, alpha_pattern={"q_proj": 7})),
        ("gpt2", "pissa", dict(fan_in_fan_out=True)),
    ],
)
def test_starts_that_change_the_base_are_made_again(name, start, config, tmp_path):
    theirs = started(name, start, tmp_path / "raw", **config)
    judge = peft.PeftModel.from_pretrained(build(name), tmp_path / "raw").eval()
    wanted = judge(**inputs(name)).logits
    close(wanted, theirs(**inputs(name)).logits)
    model, base = build(name), build(name).state_dict()
    load_adapter(model, tmp_path / "raw")
    mine = model(**inputs(name)).logits
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    plain = build(name)(**inputs(name)).logits
    assert (wanted - plain).abs().max() > 1e-2, "the change must be seen"
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in base.items())
    save_adapter(model, tmp_path / "again")  # as PEFT converts it: twice the rank, any base
    again = peft.PeftModel.from_pretrained(build(name), tmp_path / "again").eval()
    torch.testing.assert_close(again(**inputs(name)).logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_start_is_made_again_of_a_bf16_base_too(tmp_path):
    """PEFT rounds what is left of the weights to bf16, and here nothing is rounded."""
    started("llama", "pissa", tmp_path)
    judge = peft.PeftModel.from_pretrained(build("llama").bfloat16(), tmp_path).eval()
    model = build("llama").bfloat16()
    load_adapter(model, tmp_path)
    mine, wanted = model(**inputs("llama")).logits, judge(**inputs("llama")).logits
    assert (mine - wanted).norm() <= 2**-6 * wanted.norm()


def test_starts_that_cannot_be_made_again_are_refused_unless_converted(tmp_path):
    started("llama", "pissa", tmp_path / "raw")
    attached = filled(build("llama"), target_modules=["q_proj", "up_proj"], alpha=8)
    with pytest.raises(ValueError, match="needs the bare base"):
        load_adapter(attached, tmp_path / "raw")
    with pytest.raises(ValueError, match="trained against a changed base"):
        read_adapter(tmp_path / "raw")  # an export has no base to make it of
    started("llama", "pissa_niter_4", tmp_path / "random")
    model = build("llama")
    with pytest.raises(ValueError, match="'pissa_niter_4' trained against a changed base"):
        load_adapter(model, tmp_path / "random")
    started("gpt2", "olora", tmp_path / "turned", fan_in_fan_out=True)
    turned = build("gpt2")
    with pytest.raises(ValueError, match="'olora' cannot be made again"):
        load_adapter(turned, tmp_path / "turned")
    assert not [*adapted_layers(model), *adapted_layers(turned)]
    assert all(p.requires_grad for p in turned.parameters())


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_peft_converted_loads(start, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start)
    theirs = peft.get_peft_model(build("llama"), config).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    theirs.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    model = build("llama")
    load_adapter(model, tmp_path / "converted")
    torch.testing.assert_close(
        model(**inputs("llama")).logits, theirs(**inputs("llama")).logits, rtol=1e-4, atol=1e-5
    )


def test_a_plain_adapter_takes_the_place_of_a_start_made_of_the_weights(tmp_path):
    """What the start took off must not stay when other factors come."""
    model = filled(build("llama"), target_modules=["q_proj"])
    save_adapter(model, tmp_path)
    started_here = filled(build("llama"), target_modules=["q_proj"], init="pissa")
    in_memory = filled(build("llama"), target_modules=["q_proj"], init="olora")
    load_adapter(started_here, tmp_path)
    set_adapter_state_dict(in_memory, get_adapter_state_dict(model))
    wanted = model(**inputs("llama")).logits
    close(started_here(**inputs("llama")).logits, wanted)
    close(in_memory(**inputs("llama")).logits, wanted)
