"""The chunked loss against the plain one in float64, and what it does not keep."""

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

from rolora import LoRAConfig, attach
from rolora.recipes import Batch, long_vocabulary
from rolora.recipes.spans import IGNORED, token_losses

SIZE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
LONG = 16_400  # words, more than whose logits are kept at once
FAMILIES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=LONG, **SIZE)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=LONG, n_embd=32, n_layer=2, n_head=4)
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(vocab_size=LONG, num_key_value_heads=2, **SIZE)
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


def size(**options):
    return dict(
        vocab_size=16_400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )


class Capped(hf.LlamaForCausalLM):
    """A cap of its own, under a name that nobody knows."""

    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits = 7.0 * torch.tanh(out.logits / 7.0)
        return out


class Shifted(hf.LlamaForCausalLM):
    """Hidden states are changed between the base and the embedding."""

    def forward(self, input_ids, **options):
        hidden = self.model(input_ids=input_ids, **options).last_hidden_state
        return hf.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(hidden / 1.5))


def gemma2(cap):
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**size(head_dim=8, final_logit_softcapping=cap)))


def cohere(scale):
    return hf.CohereForCausalLM(hf.CohereConfig(**size(logit_scale=scale)))


def granite(scale):
    return hf.GraniteForCausalLM(hf.GraniteConfig(**size(logits_scaling=scale)))


SPECIAL = {
    "gemma-2": (lambda: gemma2(30.0), False),
    "gemma-2 without a cap": (lambda: gemma2(None), True),
    "cohere": (lambda: cohere(0.0625), False),
    "cohere without a scale": (lambda: cohere(1.0), True),
    "granite": (lambda: granite(8.0), False),
    "a cap of its own": (lambda: Capped(hf.LlamaConfig(**size())), False),
    "opt, whose base holds a decoder": (
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=16_400,
                hidden_size=32,
                ffn_dim=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=32,
            )
        ),
        True,
    ),
    "experts": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**size(num_local_experts=2))), True),
    "other hidden states": (lambda: Shifted(hf.LlamaConfig(**size())), False),
}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_do_more_to_their_logits_keep_the_plain_way(name, dtype):
    """Told from what they compute: small random models' logits are far below any cap."""
    torch.manual_seed(0)
    make, applies = SPECIAL[name]
    model = make().eval().requires_grad_(False).to(dtype)
    before = model(**batch().inputs).logits
    assert long_vocabulary.applies(model) == applies
    assert torch.equal(model(**batch().inputs).logits, before), "trying leaves nothing behind"
    logits = before[:, :-1].double().flatten(0, 1)
    labels = batch().labels[:, 1:]
    plain = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none")
    rounding = 1e-4 if dtype == torch.float32 else 3e-2
    ours = token_losses(model, batch()).double()
    torch.testing.assert_close(ours, plain.view(labels.shape), rtol=rounding, atol=rounding)


def test_heads_that_train_or_are_short_keep_the_plain_way():
    model = FAMILIES["llama"]()
    assert not long_vocabulary.applies(model), "its head trains"
    assert long_vocabulary.applies(model.requires_grad_(False))
    short = hf.LlamaForCausalLM(hf.LlamaConfig(**size() | {"vocab_size": 300}))
    assert not long_vocabulary.applies(short.requires_grad_(False))
