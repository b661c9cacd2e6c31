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


def test_a_second_backward_is_never_silently_wrong():
    ours, _ = pair()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError):
        (first,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
        first.square().sum().backward()
