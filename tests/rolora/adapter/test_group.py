"""Siblings on one input compute together, give the same numbers as alone, and keep nothing past
backward.
"""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rolora import LoRAConfig, attach, set_phase
from rolora.adapter.model import adapted_layers, explain
from rolora_kernels import explain as explain_kernels
from tests.models import TARGETS, build, inputs


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(16, 16),
            nn.Linear(16, 8, bias=False),
            nn.Linear(16, 8),
        )
        self.order, self.change = "qkv", None

    def forward(self, x):
        x = x * 1.0
        parts = []
        for name in self.order:
            parts.append(getattr(self, f"{name}_proj")(x))
            if self.change is not None:
                x = self.change(x)
        return torch.cat(parts, -1)


def block(dropout=0.0, phase="BOTH"):
    torch.manual_seed(3)
    model = Block()
    attach(
        model,
        LoRAConfig(rank=2, target_modules=["q_proj", "k_proj", "v_proj"], dropout=dropout),
        seed=0,
    )
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B)
    set_phase(model, phase)
    return model


def ungrouped(model):
    for _, layer in adapted_layers(model):
        layer.join(None)
    return model


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def sizes_run():
    return [choice.linears for choice in explain_kernels(clear=True) for _ in range(choice.calls)]


@pytest.mark.parametrize("order", ["qkv", "vkq", "kqv"])
@pytest.mark.parametrize("phase", ["A", "B", "BOTH"])
def test_grouped_equals_alone_in_any_order(order, phase):
    x = torch.randn(5, 16)
    results = []
    for model in (block(phase=phase), ungrouped(block(phase=phase))):
        model.order = order
        explain_kernels(clear=True)
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        results.append((sizes_run(), leaf.grad, grads(model)))
    assert results[0][0] == [3] and results[1][0] == [1, 1, 1]
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-5, atol=1e-5)


def test_another_object_is_not_mistaken_for_the_same_input_and_disbands():
    model, alone = block(), ungrouped(block())
    x = torch.randn(5, 16)
    for m in (model, alone):
        m.change = lambda x: x + 1.0
    torch.testing.assert_close(model(x), alone(x))
    assert all("alone: a sibling was called with another input" in line for line in explain(model))
    torch.testing.assert_close(model(x), alone(x))


def test_a_changed_input_is_not_mistaken_for_the_same():
    model, alone = block(phase=None), ungrouped(block(phase=None))
    x = torch.randn(5, 16)
    for m in (model, alone):
        m.change = lambda x: x.add_(1.0)
    with torch.no_grad():
        torch.testing.assert_close(model(x.clone()), alone(x.clone()))


def test_missing_calls_keep_nothing_past_backward_and_disband():
    model = block(phase="A")
    model.order = "q"
    group = model.q_proj.group
    y = model(torch.randn(5, 16, requires_grad=True))
    waiting = [weakref.ref(t) for t in group._waiting.values()]
    assert len(waiting) == 2
    y.sum().backward()
    gc.collect()
    assert not group._waiting and all(ref() is None for ref in waiting)
    set_phase(model, None)
    for _ in range(4):
        model(torch.randn(5, 16))
    assert group.disbanded == "siblings were not called after the first"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("phase", ["A", "B"])
def test_checkpointing_recomputes_the_same(reentrant, dropout, phase):
    x, results = torch.randn(5, 16), []
    for use in (False, True):
        model = block(dropout, phase).train()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(11)
        y = checkpoint(model, leaf, use_reentrant=reentrant) if use else model(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, grads(model)))
        assert not model.q_proj.group._waiting and model.q_proj.group.disbanded is None
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("phase", ["A", "B"])
def test_compile_gives_the_same_numbers_without_a_break(phase):
    x, results = torch.randn(5, 16), []
    for use in (False, True):
        torch._dynamo.reset()
        model = block(phase=phase)
        f = torch.compile(model, fullgraph=True, backend="aot_eager") if use else model
        for _ in range(2):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            f(leaf).square().sum().backward()
        results.append((leaf.grad, grads(model)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_siblings_share_a_dropout_mask_grouped_or_not():
    from rolora.adapter.masks import set_dropout_key

    x, results = torch.randn(5, 16), []
    model = block(0.5).train()
    for group in (True, False):
        set_dropout_key(model, 77)
        if not group:
            ungrouped(model)
        results.append(model(x))
    torch.testing.assert_close(*results)
    set_dropout_key(model, 78)
    assert not torch.allclose(model(x), results[0])


def test_whole_models_group_where_inputs_are_shared():
    model = build("llama")
    report = attach(model, LoRAConfig(rank=2, target_modules="all-linear"), seed=0)
    assert report.groups[:2] == [
        [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"],
        [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up")],
    ]
    explain_kernels(clear=True)
    model(**inputs("llama")).loss.backward()
    assert sorted(sizes_run()) == [1] * 6 + [2] * 3 + [3] * 3
    lines = explain(model)
    assert "grouped with k_proj, v_proj" in lines[0] and "alone: no sibling" in lines[3]


@pytest.mark.parametrize("name", ["llama", "bert", "roberta", "mistral", "qwen2"])
def test_a_model_with_groups_runs_in_inference_mode(name):
    """The way most people run a model for its answers; the same numbers as under no_grad."""

    model = build(name)
    attach(model, LoRAConfig(rank=4, target_modules=TARGETS[name]), seed=0)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    batch = inputs(name)
    with torch.no_grad():
        expected = model(**batch).logits
    with torch.inference_mode():
        inside = model(**batch).logits
        made_inside = model(**{k: v.clone() for k, v in batch.items()}).logits
    torch.testing.assert_close(inside, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made_inside, expected, rtol=1e-5, atol=1e-6)
    model(**batch).loss.backward()  # and it trains afterwards
    assert all(layer.lora_B.grad is not None for _, layer in adapted_layers(model))
