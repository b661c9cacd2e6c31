"""Liger's kernels, in Triton's interpreter: transformers' own modules judge the values, and whoever
cannot have them is told why.
"""

import copy
import importlib.util
import os

import pytest
import torch
import transformers as hf
from torch import nn

from rolora import LoRAConfig, attach, set_phase
from rolora.errors import BadInput
from rolora.hf import liger
from rolora.recipes import Batch, long_vocabulary
from rolora.recipes.spans import token_losses
from tests.rolora.commands import small

pytest.importorskip("liger_kernel")
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or torch.cuda.is_available(),
    reason="needs the interpreter",
)


@pytest.fixture(autouse=True)
def unpatched():
    """Liger replaces functions and classes of transformers' module: what other tests load is put
    back.
    """
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    yield
    vars(modeling_llama).update(before)


@pytest.fixture
def runnable(monkeypatch):
    """What Triton 3.7.1's interpreter lacks for Liger's kernels: float arguments as tensors, and
    libdevice's rsqrt.
    """
    import numpy as np
    from liger_kernel.ops import rms_norm
    from triton import language as tl
    from triton.runtime import interpreter

    def as_kernels_see_it(arg):
        if type(arg) is float:
            return tl.tensor(
                interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32
            )
        return convert(arg)

    convert = interpreter._implicit_cvt
    monkeypatch.setattr(interpreter, "_implicit_cvt", as_kernels_see_it)
    monkeypatch.setattr(
        rms_norm, "rsqrt", lambda x: tl.math.rsqrt(x)
    )  # looked up while the interpreter has put its own there


def pair():
    """(transformers' own Llama, the same with Liger's kernels), both with the same factors."""
    torch.manual_seed(0)
    size = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    plain = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=60, **size)).eval()
    made = []
    for _ in range(2):
        model = copy.deepcopy(plain)
        report = attach(
            model,
            LoRAConfig(
                rank=2, alpha=4, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj"]
            ),
            seed=0,
        )
        generator = torch.Generator().manual_seed(1)
        for layer in report.layers.values():
            nn.init.normal_(layer.lora_B, std=0.1, generator=generator)
        made.append(model)
    theirs = copy.deepcopy(made[0])
    ids = torch.randint(0, 60, (2, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, made[1](input_ids=ids).logits)
    wanted = [
        run(made[0], ids, phase) for phase in ("A", "B")
    ]  # before Liger replaces the module's functions
    liger.apply(made[1], "tiny", CPU)
    return made[1], ids, wanted


def run(model, ids, phase):
    """(losses, gradients of the factors that train) of a run's own loss."""
    model.zero_grad(set_to_none=True)
    set_phase(model, phase)
    losses = token_losses(model, Batch({"input_ids": ids}, ids, 1, len(ids), ids.numel()))
    losses.sum().backward()
    return losses.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@interpreted
@pytest.mark.parametrize("long", [False, True], ids=["short vocabulary", "long vocabulary"])
def test_losses_and_gradients_are_those_of_transformers_own_modules(long, monkeypatch, runnable):
    monkeypatch.setattr(long_vocabulary, "LONG", 50 if long else 10**6)
    model, ids, wanted = pair()
    assert set(model.liger_kernels) == {"rope", "rms_norm", "swiglu", "cross_entropy"}
    assert all(
        "Liger" in module.forward.__qualname__
        for module in (model.model.norm, model.model.layers[0].mlp)
    )
    calls = []
    real = liger.losses_and_gradient
    monkeypatch.setattr(liger, "losses_and_gradient", lambda *args: calls.append(1) or real(*args))
    for phase, (losses, gradients) in zip(("A", "B"), wanted, strict=True):
        mine, own = run(model, ids, phase)
        torch.testing.assert_close(mine, losses, rtol=1e-5, atol=1e-5)
        assert set(own) == set(gradients) and all(f"lora_{phase}" in name for name in own)
        for name, gradient in gradients.items():
            torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-5)
    assert bool(calls) == long


def test_what_liger_cannot_do_is_said(monkeypatch, files, tmp_path, call):
    model = hf.RobertaForSequenceClassification(
        hf.RobertaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=10)
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(
        BadInput, match=r"no kernels for tiny, a roberta model; it has them for .*llama"
    ):
        liger.apply(model, "tiny", CPU)
    monkeypatch.delenv("TRITON_INTERPRET")
    code, _, err = call(*small(files), "--liger", "--output-dir", tmp_path / "new")
    assert (
        code == 2
        and "--liger needs a GPU" in err
        and err.count("\n") == 1
        and not (tmp_path / "new").exists()
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install '\.\[liger\]' in your clone"):
        liger.apply(model, "tiny", CPU)
