"""torch.func's transforms through the layer, judged by plain loops, PEFT's layer and finite
differences.
"""

import peft
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from rolora import LoRAConfig, attach


def pair(**config):
    """(our model, PEFT's) in fp64 with the same factors."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    theirs = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    theirs.load_state_dict(ours.state_dict())
    attach(ours, LoRAConfig(rank=2, alpha=4, target_modules=["0", "2"], **config), seed=0)
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"])
    )
    ours.double(), theirs.double()
    with torch.no_grad():
        for index in (0, 2):
            nn.init.normal_(ours[index].lora_B)
            judge = theirs.base_model.model[index]
            judge.lora_A["default"].weight.copy_(ours[index].lora_A)
            judge.lora_B["default"].weight.copy_(ours[index].lora_B)
    return ours, theirs


def test_gradients_of_single_examples_are_pefts():
    ours, theirs = pair()
    x = torch.randn(3, 6, dtype=torch.float64)
    trained = {n: p.detach() for n, p in ours.named_parameters() if p.requires_grad}

    def loss(parameters, example):
        return functional_call(ours, parameters, (example[None],)).square().sum()

    mine = vmap(grad(loss), (None, 0))(trained, x)
    for i in range(3):
        theirs.zero_grad()
        theirs(x[i : i + 1]).square().sum().backward()
        for index in (0, 2):
            for factor in ("lora_A", "lora_B"):
                wanted = getattr(theirs.base_model.model[index], factor)["default"].weight.grad
                torch.testing.assert_close(mine[f"{index}.{factor}"][i], wanted)


def test_vmap_and_jvp():
    ours, theirs = pair()
    x, t = torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(vmap(ours)(x), theirs(x))
    y, tangent = jvp(ours, (x,), (t,))
    torch.testing.assert_close(y, theirs(x))
    torch.testing.assert_close(tangent, (theirs(x + 1e-6 * t) - theirs(x - 1e-6 * t)) / 2e-6)


def test_dropout_under_torch_func_is_refused():
    ours, _ = pair(dropout=0.5)
    with pytest.raises(RuntimeError, match=r"with dropout.*model\.eval"):
        vmap(ours.train())(torch.randn(3, 6, dtype=torch.float64))


@pytest.mark.parametrize("reduce", [torch.Tensor.square, lambda y: y], ids=["square", "linear"])
def test_a_second_backward_is_refused_in_one_line_with_the_way_out(reduce):
    """Of a linear loss no incoming gradient requires grad, and still dX depends on the factors."""
    ours, theirs = pair()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(reduce(ours[2](x[:, :5])).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated twice.*torch\.func"):
        first.square().sum().backward()
    judge = theirs.base_model.model[2]
    (wanted,) = torch.autograd.grad(reduce(judge(x[:, :5])).sum(), x, create_graph=True)
    torch.testing.assert_close(first, wanted)
    wanted.square().sum().backward()
    assert judge.lora_A["default"].weight.grad.abs().max() > 0, "so a zero would have been wrong"


def test_the_way_out_of_a_second_backward_is_pefts_number():
    ours, theirs = pair()
    x = torch.randn(3, 6, dtype=torch.float64)
    factors = {name: p.detach() for name, p in ours.named_parameters() if p.requires_grad}

    def penalty(parameters):
        slope = grad(lambda x: functional_call(ours, parameters, (x,)).square().sum())(x)
        return slope.square().sum()

    mine = grad(penalty)(factors)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(theirs(leaf).square().sum(), leaf, create_graph=True)
    slope.square().sum().backward()
    for index in (0, 2):
        for factor in ("lora_A", "lora_B"):
            wanted = getattr(theirs.base_model.model[index], factor)["default"].weight.grad
            torch.testing.assert_close(mine[f"{index}.{factor}"], wanted)
