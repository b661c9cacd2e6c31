"""The chunked loss against the plain one in float64, and what it does not keep."""

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

from rolora import LoRAConfig, attach
from rolora.recipes import Batch, long_vocabulary
from rolora.recipes.spans import IGNORED, token_losses

FAMILIES = {
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=16_400,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=16_400, n_embd=32, n_layer=2, n_head=4)
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(
            vocab_size=16_400,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ),
}


def batch():
    ids = torch.randint(5, 16_000, (3, 11), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :6] = labels[2, 8:] = IGNORED
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, 20, 3, 33)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_the_plain_ones(family, monkeypatch):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    report = attach(model, LoRAConfig(rank=4))
    for layer in report.layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    monkeypatch.setattr(long_vocabulary, "_CHUNK", 4 * 16_400)  # four tokens at a time
    assert long_vocabulary.applies(model)
    weights = torch.rand(3, 10, generator=torch.Generator().manual_seed(1))
    ours = token_losses(model, batch())
    (ours * weights).sum().backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.double()
    logits, labels = model(**batch().inputs).logits[:, :-1], batch().labels[:, 1:]
    plain = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    (plain * weights.double()).sum().backward()
    torch.testing.assert_close(ours.double(), plain, rtol=1e-5, atol=1e-5)
    assert (
        ours.dtype == torch.float32
        and (ours[labels == IGNORED] == 0).all()
        and set(mine) == {name for name, p in model.named_parameters() if p.grad is not None}
    )
    for name, gradient in mine.items():
        wanted = model.get_parameter(name).grad
        assert (gradient.double() - wanted).norm() < 1e-4 * wanted.norm(), name


def test_no_tensor_as_long_as_the_vocabulary_is_kept():
    model = FAMILIES["llama"]().eval()
    attach(model, LoRAConfig(rank=4))
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        token_losses(model, batch()).sum()
    assert max(t.numel() for t in kept if t.untyped_storage().data_ptr() not in own) < 16_400


def test_models_that_do_more_to_their_logits_keep_the_plain_way():
    model = FAMILIES["llama"]()
    assert not long_vocabulary.applies(model), "its head trains"
    model.requires_grad_(False)
    assert long_vocabulary.applies(model)
    model.config.final_logit_softcapping = 30.0
    assert not long_vocabulary.applies(model)
    short = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    )
    assert not long_vocabulary.applies(short.requires_grad_(False))
