"""Batches of few lengths: the same examples, loss and gradients."""

import pytest
import torch

from rolora.recipes.padding import Lengths, few
from tests.rolora.cohorts import compare, prepared

KINDS = {
    "a decoder that classifies": {},
    "an encoder that classifies": {"family": "roberta"},
    "conversations": {"task_type": "chat", "train_file": "chat", "max_length": 128},
    "packed": {"task_type": "chat", "train_file": "chat", "max_length": 128, "packing": True},
    "preferences": {"task_type": "preference", "train_file": "pairs"},
}


def gradients(made, batch):
    loss = made.recipe.loss(made.model, batch)
    loss.backward()
    found = [p.grad.clone() for p in made.model.parameters() if p.grad is not None]
    made.model.zero_grad()
    return loss.item(), torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_padded_batch_has_the_same_loss_and_gradients(options, files):
    options = {n: str(files[v]) if n.endswith("_file") else v for n, v in options.items()}
    if "train_file" in options:
        options["eval_file"] = options["train_file"]
    made = prepared(files, **options)
    fill = made.tokenizer.pad_token_id
    for first in (0, 3):
        batch = made.recipe.collate(made.train[first : first + 3])
        length = batch.inputs["input_ids"].shape[1]
        padded = Lengths(7 * (length // 7 + 1), 10**6, fill).pad(batch)
        assert {t.shape[1] for t in padded.inputs.values()} == {7 * (length // 7 + 1)}
        assert (padded.weight, padded.examples, padded.tokens) == (
            batch.weight,
            batch.examples,
            batch.tokens,
        )
        if batch.carried is not None:
            ours = padded.labels[:, 1:].flatten()[padded.carried]
            assert torch.equal(ours, batch.labels[:, 1:].flatten()[batch.carried])
        (loss, ours), (wanted, plain) = gradients(made, padded), gradients(made, batch)
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert (ours - plain).norm() <= 1e-4 * plain.norm() and plain.norm() > 0


def test_no_batch_is_longer_than_the_longest_may_be(files):
    pairs = str(files["pairs"])
    made = prepared(files, task_type="preference", train_file=pairs, eval_file=pairs)
    batch = made.recipe.collate(made.train[:3])
    length = batch.inputs["input_ids"].shape[1]
    fill = made.tokenizer.pad_token_id
    for multiple, longest, wanted in (
        (length, 10**6, length),
        (4 * length, 2 * length, 2 * length),
        (4 * length, length // 2, length),  # it is there already
    ):
        padded = Lengths(multiple, longest, fill).pad(batch)
        assert padded.inputs["input_ids"].shape[1] == padded.labels.shape[1] == wanted


def test_few_lengths_are_eight_at_most_and_of_whole_tiles():
    for longest in range(8, 3000):
        multiple = few(longest)
        assert multiple % 8 == 0 and -(-longest // multiple) <= 8


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_cohort_pads_as_its_clients_would_alone(dropout, files):
    made = prepared(files, pad_to_multiple_of=16, dropout=dropout)
    compare(made, "B", 3)
