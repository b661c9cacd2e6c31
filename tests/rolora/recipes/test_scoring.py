"""What evaluation says of each token, against the plain logits in float64, and how many logits it
makes at once.
"""

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

from rolora.recipes import Batch, scoring
from rolora.recipes.spans import IGNORED
from tests.rolora.recipes.test_long_vocabulary import FAMILIES, LONG, SIZE

SHORT = {
    "short llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=97, **SIZE)),
    "capped gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(vocab_size=LONG, num_key_value_heads=2, head_dim=8, **SIZE)
    ),
}


def texts(vocabulary):
    ids = torch.randint(5, vocabulary, (5, 12), generator=torch.Generator().manual_seed(0))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :6] = labels[2, 8:] = labels[4] = IGNORED
    mask[2, 8:] = 0
    return Batch({"input_ids": ids, "attention_mask": mask}, labels, 40, 5, 56)


@pytest.mark.parametrize("family", [*FAMILIES, *SHORT])
def test_losses_and_hits_are_those_of_the_plain_logits(family, monkeypatch):
    torch.manual_seed(0)
    model = (FAMILIES | SHORT)[family]().eval()
    batch = texts(model.config.vocab_size)
    made = []
    monkeypatch.setattr(scoring, "_AT_ONCE", 2 * 12 * model.config.vocab_size)
    monkeypatch.setattr(scoring, "_losses", counted(scoring._losses, made))
    with torch.no_grad():  # half of the labels are what the model would have written
        written = model(**batch.inputs).logits[:, :-1].argmax(-1)
    labels = batch.labels[:, 1:]
    labels[:, ::2] = torch.where(labels == IGNORED, labels, written)[:, ::2]
    losses, hits = scoring.token_scores(model, batch, IGNORED)
    assert max(made) <= 2 * 12 * model.config.vocab_size and len(made) > 1

    with torch.no_grad():
        logits = model.double()(**batch.inputs).logits[:, :-1]
    plain = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    torch.testing.assert_close(losses.double(), plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(hits, (logits.argmax(-1) == labels) & (labels != IGNORED))
    assert hits.sum() >= 15 and not hits[4].any() and (losses[4] == 0).all()


def counted(losses, made):
    def call(logits, labels, ignored):
        made.append(logits.numel())
        return losses(logits, labels, ignored)

    return call
