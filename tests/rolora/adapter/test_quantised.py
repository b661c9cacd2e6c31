"""Quantised frozen bases: bitsandbytes and PEFT judge what is computed, nothing dense is kept, and
its modules come back as they were.
"""

import copy
import gc
import sys

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from rolora import LoRAConfig, attach, detach, merge, unmerge
from rolora.adapter.layer import RoLoRALinear
from tests.quantised import KINDS, quantised


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", ["A", "B", "BOTH"])
def test_outputs_and_gradients_are_those_of_the_dequantised_matmul(kind, phase):
    linear, dense = quantised(kind)
    layer = RoLoRALinear.from_linear(linear, rank=4, alpha=8)
    nn.init.normal_(layer.lora_B)
    layer.set_phase(phase)
    x = torch.randn(6, 64, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    truth = [t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    wanted = (
        truth[0] @ dense.double().t()
        + linear.bias.double()
        + layer.scaling * (truth[0] @ truth[1].t()) @ truth[2].t()
    )
    wanted.square().sum().backward()
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-4)
    for mine, theirs, trains in (
        (x, truth[0], True),
        (layer.lora_A, truth[1], phase in ("A", "BOTH")),
        (layer.lora_B, truth[2], phase in ("B", "BOTH")),
    ):
        if trains:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-3)
        else:
            assert mine.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_no_dense_copy_is_kept(kind):
    layer = RoLoRALinear.from_linear(quantised(kind, 256, 256)[0], rank=4)
    layer.set_phase("A")
    gc.collect()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(torch.randn(8, 256, requires_grad=True))
    assert max(t.untyped_storage().nbytes() for t in kept) <= 8 * 256 * 4
    alive = [
        t
        for t in gc.get_objects()
        if isinstance(t, torch.Tensor) and t.is_floating_point() and tuple(t.shape) == (256, 256)
    ]
    assert not alive, "neither in the graph nor in the layer"
    y.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_deepcopy_and_detach_leave_bitsandbytes_module_as_it_was(kind):
    linear, _ = quantised(kind)
    model = nn.Sequential(linear)
    before, x = {k: v.clone() for k, v in model.state_dict().items()}, torch.randn(5, 64)
    out = model(x)
    attach(model, LoRAConfig(rank=4, target_modules=["0"]))
    kept = {k: v for k, v in model.state_dict().items() if "lora_" not in k}
    assert set(kept) == set(before) and all(torch.equal(kept[k], before[k]) for k in before)
    nn.init.normal_(model[0].lora_B)
    copied = copy.deepcopy(model)
    assert (
        torch.equal(copied(x), model(x))
        and copied[0].weight.data_ptr() != model[0].weight.data_ptr()
    )
    detach(model)
    assert type(model[0]) is type(linear) and torch.equal(model(x), out)
    assert set(model.state_dict()) == set(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [False, True], ids=["dense", "quantised again"])
def test_merging_says_what_it_loses(kind, again):
    linear, dense = quantised(kind)
    model = nn.Sequential(linear)
    attach(model, LoRAConfig(rank=4, alpha=8, target_modules=["0"]))
    layer = model[0]
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(5, 64)
    apart, exact, packed = model(x), dense + layer.delta(), layer.weight.data.clone()
    lost = merge(model, requantise=again)["0"]
    if again and kind == "nf4":
        stored = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    else:
        stored = layer.weight.float() * layer.SCB[:, None] / 127 if again else layer.weight.float()
    wanted = ((stored - exact).norm() / layer.delta().norm()).item()
    assert lost == pytest.approx(wanted, rel=1e-3, abs=1e-6) and (
        lost < 1e-6 if not again else 1e-3 < lost < 1
    )
    assert layer.weight.is_floating_point() != again
    torch.testing.assert_close(model(x), x @ stored.t() + linear.bias, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert torch.equal(layer.weight.data, packed) and torch.equal(model(x), apart)
    detach(model, merge=True, requantise=again)
    assert isinstance(model[0], type(linear)) if again else type(model[0]) is nn.Linear
    torch.testing.assert_close(
        model(x), x @ stored.t() + linear.bias, rtol=0.05, atol=0.05 if again else 1e-4
    )


def test_a_merge_that_cannot_quantise_again_changes_nothing(monkeypatch):
    layer = RoLoRALinear.from_linear(quantised("nf4")[0], rank=4)
    nn.init.normal_(layer.lora_B)
    x, packed = torch.randn(5, 64), layer.weight.data.clone()
    before = layer(x)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RuntimeError, match="needs the package `bitsandbytes`"):
        layer.merge(requantise=True)
    assert not layer.merged and torch.equal(layer.weight.data, packed)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_merge_keeps_moves_with_the_layer(kind):
    layer = RoLoRALinear.from_linear(quantised(kind)[0], rank=4)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 64)
    before, kept = layer(x), layer.held
    layer.merge()
    seen = []
    layer._apply(lambda tensor: seen.append(id(tensor)) or tensor.clone())
    assert id(kept.weight) in seen and (kind == "nf4" or id(kept.scale) in seen)
    layer.unmerge()
    assert torch.equal(layer(x), before)


def test_a_weight_that_is_not_quantised_yet_is_refused():
    for made in (bnb.nn.Linear4bit(64, 64), bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)):
        with pytest.raises(TypeError, match="not quantised yet"):
            RoLoRALinear.from_linear(made, rank=4)


def test_a_weight_that_a_forward_on_the_cpu_has_rearranged_is_read_as_it_was():
    linear, dense = quantised("nf4", 128, 128)
    with torch.no_grad():
        linear.eval()(torch.randn(4, 128))
    layer = RoLoRALinear.from_linear(linear, rank=4)
    # bitsandbytes rounds the scales to bf16 on the way, and cannot undo that
    torch.testing.assert_close(
        layer.oriented_weight().dequantise(torch.float32), dense, rtol=2**-8, atol=0
    )
