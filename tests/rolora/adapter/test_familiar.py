"""What PEFT's users reach for, against PEFT."""

from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from torch import nn

from rolora import LoRAConfig, attach, disable_adapter, merge, print_trainable_parameters
from rolora.adapter.model import adapted_layers
from tests.models import build, inputs


def filled():
    model = build("llama")
    attach(model, LoRAConfig(r=2, target_modules="q_proj, v_proj"), seed=0)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B)
    return model


@pytest.mark.parametrize("merged", [False, True])
def test_disabling_runs_the_base_and_restores_what_was(merged):
    base, model = build("llama")(**inputs("llama")).logits, filled()
    if merged:
        merge(model)
    first = next(adapted_layers(model))[1]
    first.enabled = False
    with pytest.raises(KeyError), disable_adapter(model):
        torch.testing.assert_close(model(**inputs("llama")).logits, base, rtol=1e-5, atol=1e-6)
        raise KeyError
    assert [layer.enabled for _, layer in adapted_layers(model)] == [False] + [True] * 5


def test_disabling_what_has_lost_its_base_is_refused_before_the_block():
    model = filled()
    merge(model, keep_base=False)
    with pytest.raises(RuntimeError, match="keep_base=False"), disable_adapter(model):
        raise AssertionError("not reached")
    assert all(layer.enabled for _, layer in adapted_layers(model))


def test_the_line_of_trainable_parameters_is_pefts(capsys):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    peft.get_peft_model(build("llama"), config).print_trainable_parameters()
    wanted = capsys.readouterr().out
    print_trainable_parameters(filled())
    assert capsys.readouterr().out == wanted


def test_pefts_names_are_read():
    config = LoRAConfig(r=4, lora_alpha=32, lora_dropout=0.1, use_rslora=True)
    assert config == LoRAConfig(rank=4, alpha=32, dropout=0.1, rslora=True)
    assert replace(config, rank=5).rank == 5 and LoRAConfig(rank=8, r=8).rank == 8
    plain = LoRAConfig()
    assert (plain.rank, plain.alpha, plain.dropout, plain.rslora) == (8, 16.0, 0.0, False)
    assert type(plain.rank) is int and plain.rslora is False
    with pytest.raises(ValueError, match="rank=8 and r=16 are two names of one thing"):
        LoRAConfig(rank=8, r=16)
    with pytest.raises(ValueError, match="rslora=False and use_rslora=True"):
        LoRAConfig(rslora=False, use_rslora=True)


@pytest.mark.parametrize("layers", ["last 2 of 4", "2,3", 3, [1, "2"], [0.5], iter([1])])
def test_layers_that_are_no_indices_are_refused(layers):
    with pytest.raises(ValueError, match=r"layers=.*: expected the indices of blocks, such as"):
        LoRAConfig(layers=layers)


@pytest.mark.parametrize("layers", [range(1, 2), {1}, np.arange(1, 2)])
def test_layers_are_any_collection_of_indices(layers):
    model = build("llama")
    attach(model, LoRAConfig(target_modules=["q_proj"], layers=layers))
    assert [name for name, _ in adapted_layers(model)] == ["model.layers.1.self_attn.q_proj"]


def test_names_with_commas_are_a_list_and_expressions_stay():
    assert LoRAConfig(target_modules="q_proj,v_proj").target_modules == ["q_proj", "v_proj"]
    for expression in (r".*layers\.[0-1]{1,2}\..*q_proj", "q_proj", "auto", "all-linear"):
        assert LoRAConfig(target_modules=expression).target_modules == expression


def test_pefts_own_objects_are_refused_in_one_line():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(TypeError, match=r"attach takes a rolora\.LoRAConfig, got a peft\."):
        attach(build("llama"), config)
    with pytest.raises(ValueError, match="the model carries PEFT's adapters"):
        attach(peft.get_peft_model(build("llama"), config), LoRAConfig(r=2))
