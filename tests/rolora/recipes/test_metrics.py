"""Which of two runs is better, by any metric."""

import math

import pytest

from rolora.recipes import metrics
from rolora.recipes.causal_lm import CausalLM


@pytest.mark.parametrize(
    "name, lower",
    [
        ("loss", True),
        ("perplexity", True),
        ("validation_loss", True),
        ("accuracy", False),
        ("accuracy/loss", False),
        ("exact_match", False),
        ("f1", False),
    ],
)
def test_the_better_one_comes_first_and_a_lost_run_last(name, lower):
    better, other = (0.2, 0.7) if lower else (0.7, 0.2)
    assert metrics.lower_is_better(name) is lower
    assert metrics.rank(name, better, 9.0) < metrics.rank(name, other, 0.0)
    assert metrics.rank(name, other, 0.0) < metrics.rank(name, other, 1.0), "ties go by loss"
    assert metrics.rank(name, other, 9.0) < metrics.rank(name, metrics.worst(name), math.inf)
    assert metrics.is_reached(name, better, other)
    assert not metrics.is_reached(name, other, better)


class Words:
    """A tokenizer of one token a word."""

    eos_token_id = pad_token_id = 0

    def __call__(self, texts, add_special_tokens=True):
        if isinstance(texts, str):
            return {"input_ids": [1] * len(texts.split())}
        return {"input_ids": [[1] * len(text.split()) for text in texts]}


@pytest.mark.parametrize("words, short", [(1, True), (8, True), (9, False)])
def test_answers_of_a_few_words_are_short(words, short):
    rows = [{"answer": " ".join(["a"] * words)}] * 3 + [{"answer": "a " * 500}] * 2
    recipe = CausalLM(Words(), 64, "answer", "question")
    assert recipe.answers_are_short(rows) is short
