"""Parameters that cannot be adapted are refused, and the model is as it was."""

import pytest
import torch
from torch import nn

from rolora import (
    LoRAConfig,
    attach,
)  # fmt: skip
from tests.mixtures import EXPERTS, build

REFUSED = {
    "no such name": (
        dict(target_parameters=["experts.gate_proj"]),
        "nearest: experts.gate_up_proj",
    ),
    "a vector": (dict(target_parameters=["model.norm.weight"]), "it has 1 dimensions"),
    "dropout": (
        dict(target_parameters=EXPERTS, dropout=0.1),
        "a parameter has no input of its own",
    ),
    "pissa": (dict(target_parameters=EXPERTS, init="pissa"), "is made of a linear's weight"),
    "twice": (
        dict(target_parameters=["q_proj.weight"], target_modules=["q_proj"]),
        "is adapted with its module too",
    ),
    "no names": (dict(target_parameters=[3]), "expected the ends of parameters' paths"),
    "one number": (dict(target_parameters=4), "expected the ends of parameters' paths"),
    "none left": (
        dict(target_parameters=EXPERTS, exclude_modules=["experts"]),
        "leaves no module to adapt",
    ),
    "rank": (
        dict(target_modules=(), target_parameters=EXPERTS, rank=0),
        "rank 0 does not fit a 96x32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_left_as_it_was(case):
    options, text = REFUSED[case]
    model = build("mixtral")
    before = [(name, type(m)) for name, m in model.named_modules()]
    with pytest.raises(ValueError, match=text):
        attach(model, LoRAConfig(**options))
    assert [(name, type(m)) for name, m in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_quantised_and_four_dimensional_parameters_are_refused():
    for parameter, text in (
        (torch.zeros(2, 3, 3, 3), "it has 4 dimensions"),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), r"it is quantised \(uint8\)"),
    ):
        model = nn.ModuleDict({"m": nn.Module()})
        model["m"].stack = nn.Parameter(parameter, requires_grad=False)
        with pytest.raises(ValueError, match=text):
            attach(model, LoRAConfig(target_modules=(), target_parameters=["m.stack"]))
