"""The memory of frozen blocks gives what the blocks give, and asks them once for each sequence."""

import pytest
import torch
import transformers as hf

from benchmarks.suite.memory import Memory, install
from rolora import LoRAConfig, attach, set_phase
from rolora.adapter.model import adapted_layers

SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
SIZE["initializer_range"] = 0.3
MODELS = {
    "bert": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(vocab_size=50, **SIZE)),
        "query,value",
    ),
    "llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=50, **SIZE)),
        "q_proj,v_proj",
    ),
}


def adapted(name):
    """A model of four blocks with factors in the last two, neither of them zero."""
    torch.manual_seed(0)
    make, targets = MODELS[name]
    model = make().eval().requires_grad_(False)
    attach(model, LoRAConfig(rank=2, alpha=4, target_modules=targets, layers=(2, 3)), seed=0)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B)
    set_phase(model, "B")
    return model


def batch(rows=6):
    torch.manual_seed(1)
    ids = torch.randint(1, 50, (rows, 9))
    mask = torch.ones_like(ids)
    mask[::2, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def outcome(model, given):
    """Logits where nothing is padded, and B's gradients."""
    model.zero_grad()
    own = {"use_cache": False} if model.config.model_type == "llama" else {}
    logits = model(**given, **own).logits
    if logits.dim() == 3:
        logits = logits[given["attention_mask"] == 1]
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("name", MODELS)
def test_remembered_blocks_give_what_blocks_give(name):
    model, given = adapted(name), batch()
    plain = outcome(model, given)
    assert len(plain) > 1 and all(value.abs().max() > 1e-3 for value in plain)
    memory = Memory()
    assert install(model, memory) == 2
    for _ in range(2):
        for own, theirs in zip(outcome(model, given), plain, strict=True):
            torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_each_sequence_is_computed_once_and_by_itself(name):
    model, given = adapted(name), batch()
    blocks = model.bert.encoder.layer if name == "bert" else model.model.layers
    seen = []
    for number in (0, 1, 2):  # what is below, and the first block that has factors
        forward = blocks[number].forward

        def counted(hidden, *args, number=number, forward=forward, **own):
            seen.append((number, len(hidden)))
            return forward(hidden, *args, **own)

        blocks[number].forward = counted
    memory = Memory()
    install(model, memory)
    first = outcome(model, given)
    assert seen == [(0, 1), (1, 1)] * 6 + [(2, 6)]
    seen.clear()
    outcome(model, {key: value.flip(0) for key, value in given.items()})
    assert seen == [(2, 6)], "the same sequences in another order"
    other = adapted(name)  # another run of the same base goes on with the same memory
    install(other, memory)
    for own, theirs in zip(outcome(other, given), first, strict=True):
        assert torch.equal(own, theirs)
    mask = given["attention_mask"].clone()
    mask[0] = 1
    seen.clear()
    outcome(model, given | {"attention_mask": mask})
    assert seen == [(0, 1), (1, 1), (2, 6)], "one is not padded any more"


def test_rows_of_their_own_positions_are_refused():
    model, given = adapted("llama"), batch()
    install(model, Memory())
    positions = torch.arange(9).repeat(6, 1)
    with pytest.raises(AssertionError, match="the same for all rows"):
        outcome(model, given | {"position_ids": positions})


def test_what_is_kept_is_bounded(monkeypatch):
    from benchmarks.suite import memory as module

    model, given = adapted("bert"), batch()
    memory = Memory()
    install(model, memory)
    monkeypatch.setattr(module, "_MOST", 3 * 9 * 32 * 4)
    plain = outcome(model, given)
    assert memory.bytes <= 4 * 9 * 32 * 4
    assert torch.equal(outcome(model, given)[0], plain[0])
