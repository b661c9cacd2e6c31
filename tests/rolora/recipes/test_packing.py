"""Packed batches: the loss and the gradients of padded ones, in fewer rows; models that cannot are refused."""

import pytest
import torch
import transformers as hf

from rolora.adapter.attach import LoRAConfig, adapted_layers, attach
from rolora.errors import BadInput
from rolora.recipes.packing import packed_batch, require_apart, rows
from rolora.recipes.spans import token_batch, token_losses
from tests import models

LENGTHS = [12, 3, 5, 9, 2, 7, 12, 4]
SIZE = dict(
    vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
)


def gemma3():
    """Every other layer sees a window of four tokens."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = hf.Gemma3TextConfig(
        **SIZE, num_key_value_heads=2, head_dim=8, sliding_window=4, layer_types=kinds
    )
    return hf.Gemma3ForCausalLM(config).eval()


def bloom():
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=120, hidden_size=32, n_layer=2, n_head=4))


def mamba():
    return hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=120, hidden_size=32, num_hidden_layers=2, state_size=8)
    )


def batches():
    """The same eight examples padded and packed; the first has no prompt, one learns two spans."""
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(5, 115, (n,), generator=generator).tolist() for n in LENGTHS]
    spans = [
        [(0, 12)],
        [(1, 3)],
        [(2, 5)],
        [(1, 3), (6, 9)],
        [(1, 2)],
        [(5, 7)],
        [(3, 12)],
        [(2, 4)],
    ]
    return token_batch(ids, spans, 0, "cpu"), packed_batch(ids, spans, 0, "cpu")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt2", "gemma3"])
def test_the_loss_and_the_gradients_are_those_of_padded_batches(name, attention):
    torch.manual_seed(0)
    model = gemma3() if name == "gemma3" else models.build(name)
    model.set_attn_implementation(attention)
    model.config.use_cache = False
    attach(model, LoRAConfig(rank=4, target_modules=models.TARGETS.get(name, ["q_proj"])), seed=1)
    for _, layer in adapted_layers(model):
        layer.set_phase("BOTH")
        torch.nn.init.normal_(layer.lora_B)
    require_apart(model)
    padded, packed = batches()
    for what in ("weight", "examples", "tokens"):
        assert getattr(padded, what) == getattr(packed, what)
    assert packed.inputs["input_ids"].shape == (5, 12) and padded.inputs["input_ids"].shape[0] == 8
    sums, gradients = [], []
    for batch in (padded, packed):
        model.zero_grad()
        loss = token_losses(model, batch).sum()
        loss.backward()
        sums.append(loss.item())
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(grads).clone())
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)
    assert gradients[0].norm() > 0


def test_without_restarted_positions_the_loss_is_another():
    """What the comparison above would notice."""
    model = models.build("llama")
    model.config.use_cache = False
    padded, packed = batches()
    right = token_losses(model, padded).sum().item()
    positions = torch.arange(12).expand_as(packed.inputs["position_ids"])
    packed.inputs["position_ids"].copy_(positions)
    assert token_losses(model, packed).sum().item() != pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize("make", [bloom, mamba])
def test_a_model_in_which_examples_see_each_other_is_refused(make):
    torch.manual_seed(0)
    model = make().eval()
    model.config.use_cache = False
    with pytest.raises(BadInput, match="--packing: in this model packed examples see each other"):
        require_apart(model)


def test_no_row_is_longer_than_the_longest_example_and_every_example_is_there_once():
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 40, (16,), generator=generator).tolist()
        found = rows(lengths)
        assert sorted(index for row in found for index in row) == list(range(16))
        loads = [sum(lengths[i] for i in row) for row in found]
        assert max(loads) == max(lengths)
        # First fit: two rows that could be one would be one.
        assert all(a + b > max(lengths) for n, a in enumerate(loads) for b in loads[n + 1 :])
