"""Models of known shapes with random weights: speed does not depend on their values."""

from __future__ import annotations

import peft
import torch
import transformers as hf

# name → (model, adapted modules, batch, length)
SHAPES = {
    "Llama-shaped": (
        lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=32_000,
                hidden_size=1024,
                intermediate_size=2816,
                num_hidden_layers=4,
                num_attention_heads=16,
            )
        ),
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        2,
        256,
    ),
    "RoBERTa-shaped": (
        lambda: hf.RobertaForSequenceClassification(
            hf.RobertaConfig(
                vocab_size=8_000, num_labels=2, num_hidden_layers=6, max_position_embeddings=514
            )
        ),
        ["query", "key", "value"],
        8,
        128,
    ),
}
RANK = 16


def losses(model, ids, labels):
    """What a run's recipe computes, ours and PEFT's alike but for our chunked loss."""
    from rolora.recipes import Batch
    from rolora.recipes.spans import token_losses

    if labels.ndim == 1:
        return torch.nn.functional.cross_entropy(model(input_ids=ids).logits.float(), labels)
    if isinstance(model, peft.PeftModel):
        logits = model(input_ids=ids).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    return (
        token_losses(model, Batch({"input_ids": ids}, labels, 1, len(ids), ids.numel())).sum()
        / labels[:, 1:].numel()
    )
