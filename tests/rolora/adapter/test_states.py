"""States that must not lie: merged, disabled, half loaded, half attached. PEFT and the base's own
bits judge.
"""

import copy

import peft
import pytest
import torch
from torch import nn

from rolora import LoRAConfig, attach, detach, load_adapter, merge, save_adapter, unmerge
from rolora.adapter.model import adapted_layers
from tests.models import build, inputs


def filled(name="llama", **config):
    model = build(name)
    attach(model, LoRAConfig(**({"rank": 2} | config)), seed=0)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(3))
    return model


def bits(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_merged_model_refuses_an_adapter(tmp_path):
    model = filled()
    save_adapter(model, tmp_path)
    merge(model)
    before = bits(model)
    with pytest.raises(ValueError, match=r"is merged .*unmerge\(model\) first"):
        load_adapter(model, tmp_path)
    assert same(model, before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_disabled_merged_layer_computes_the_base(name):
    base = build(name)(**inputs(name)).logits
    model = filled(name)
    merge(model)
    for _, layer in adapted_layers(model):
        layer.enabled = False
    torch.testing.assert_close(model(**inputs(name)).logits, base, rtol=1e-5, atol=1e-6)
    model = filled(name)
    merge(model, keep_base=False)
    next(adapted_layers(model))[1].enabled = False
    with pytest.raises(RuntimeError, match="merged with keep_base=False"):
        model(**inputs(name))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_merge_that_is_not_finite_changes_nothing_as_in_peft(value):
    model = filled()
    judge = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["v_proj"]))
    last = list(adapted_layers(model))[-1]
    with torch.no_grad():
        last[1].lora_B[0, 0] = value
        judge.base_model.model.model.layers[2].self_attn.v_proj.lora_B["default"].weight[0] = value
    with pytest.raises(ValueError):
        judge.merge_and_unload(safe_merge=True)
    before = bits(model)
    for attempt in (lambda: merge(model), lambda: detach(model, merge=True)):
        with pytest.raises(ValueError, match=f"module {last[0]}.*nothing was merged"):
            attempt()
        after = model.state_dict()
        assert all(torch.equal(v, before[k]) for k, v in after.items() if "lora_" not in k)
        assert not any(layer.merged for _, layer in adapted_layers(model))


def test_fp64_merges_in_fp64_and_a_zero_path_leaves_the_bits():
    model = nn.Sequential(nn.Linear(6, 5)).double()
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    base = model[0].weight.detach().clone()
    attach(model, LoRAConfig(rank=2, target_modules=["0"]), seed=0)
    assert merge(model) == {"0": 0.0}
    assert torch.equal(model[0].weight.view(torch.int64), base.view(torch.int64))
    unmerge(model)
    model.double()
    nn.init.normal_(model[0].lora_B)
    wanted = base.numpy() + 8.0 * (
        model[0].lora_B.detach().numpy() @ model[0].lora_A.detach().numpy()
    )
    merge(model)
    torch.testing.assert_close(model[0].weight, torch.tensor(wanted), rtol=1e-14, atol=1e-14)


class Shares(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        if how == "embedding":
            self.first.weight = self.embed.weight
        elif how == "module":
            self.second = self.first
        else:
            self.second.weight = self.first.weight


@pytest.mark.parametrize("how", ["embedding", "module", "weight"])
def test_a_shared_weight_is_refused_and_nothing_is_touched(how):
    model = Shares(how)
    with pytest.raises(ValueError, match=r"first shares its weight with (embed|second)"):
        attach(model, LoRAConfig(rank=2, target_modules=["first"]))
    assert type(model.first) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_detaching_a_merged_model_asks_which_weights():
    model = filled()
    merge(model)
    merged = {k: v.clone() for k, v in model.state_dict().items() if "lora_" not in k}
    with pytest.raises(ValueError, match=r"detach\(model, merge=True\) keeps the merged"):
        detach(model)
    assert same(detach(copy.deepcopy(model), merge=True), merged)
    unmerge(model)
    assert same(detach(model), build("llama").state_dict())


def test_a_failed_attach_leaves_requires_grad():
    model = build("llama")
    model.model.norm.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    late = {r"layers\.2\.self_attn\.v_proj": 0}  # the last of the layers that are built
    with pytest.raises(ValueError, match="rank 0"):
        attach(model, LoRAConfig(rank=2, rank_pattern=late))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
