"""Answers that are written and judged, Alpaca's prompts, and the names of the benchmarks."""

import json

import pytest
import torch
import transformers as hf

from rolora import config
from rolora.config import presets
from rolora.errors import BadInput
from rolora.recipes import commonsense, instructions
from rolora.recipes.answer_sentence import AnswerSentence, parse
from rolora.recipes.benchmarks import BENCHMARKS
from rolora.recipes.multiple_choice import SET
from tests.benchmark_files import (
    COMMONSENSE,
)


@pytest.mark.parametrize(
    "text, choice",
    [
        ("the correct answer is answer2", 1),
        ("answer1, or answer2", 0),
        ("Answer2", None),
        ("nothing", None),
        ("answer10", 9),
    ],
)
def test_the_answer_is_the_first_that_is_named(text, choice):
    assert parse(text, [f"answer{i}" for i in range(1, 11)]) == choice


def test_what_is_written_is_greedy_decoding_and_is_judged_by_what_it_names(files, monkeypatch):
    model = hf.AutoModelForCausalLM.from_pretrained(files["llama"]).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(files["llama"])
    tokenizer.pad_token = tokenizer.eos_token
    recipe = AnswerSentence(tokenizer, 120, commonsense.read)
    found = [{**row, SET: name} for name, (row, _) in COMMONSENSE.items()]
    questions = recipe.encode(found)
    written = recipe.write(model, questions, batch_size=3)
    room = max(len(c.ids) - c.start for q in questions for c in q.choices) + 4
    for question, text in zip(
        questions, written, strict=True
    ):  # one by one, without padding or cache
        ids, new = list(question.choices[0].ids[: question.choices[0].start]), []
        while len(new) < room and len(ids) < model.config.max_position_embeddings:
            with torch.no_grad():
                best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if best == tokenizer.eos_token_id:
                break
            ids.append(best), new.append(best)
        mine = tokenizer.decode(new, skip_special_tokens=True)
        assert mine.startswith(text) or text.startswith(mine)
    answers = [recipe.named(row)[1][recipe.named(row)[2]] for row in found]
    said = [f"the correct answer is {a}" if i % 2 else "no idea" for i, a in enumerate(answers)]
    monkeypatch.setattr(recipe, "write", lambda *_: said)
    metrics = recipe.evaluate(model, questions, 4)
    assert (
        metrics["accuracy"] == metrics["answered"] == 0.5
        and metrics["accuracy/piqa"] == 1.0
        and metrics["accuracy/boolq"] == 0.0
    )
    assert 0 <= metrics["likelihood_accuracy"] <= 1


def test_alpaca_s_two_prompts(tmp_path):
    (tmp_path / "train.jsonl").write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in (
                {"instruction": "Add.", "input": "1 2", "output": "3"},
                {"instruction": "Hi", "input": "", "output": "Hello"},
            )
        )
    )
    (first, second), none = instructions.load("alpaca", str(tmp_path))
    assert none is None and first["response"] == "3"
    assert first["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert "paired with an input" in first["prompt"]
    assert "### Input" not in second["prompt"] and second["prompt"].endswith(
        "### Instruction:\nHi\n\n### Response:\n"
    )
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(BadInput, match="columns text, expected instruction, input, output"):
        instructions.load("alpaca", str(tmp_path))


def test_the_names_are_the_configuration_s():
    assert tuple(BENCHMARKS) == config.BENCHMARKS
    for name, options in presets.PRESETS.items():
        config.resolve({}, preset=name)
        assert options.get("benchmark") in (None, *BENCHMARKS)
    assert {
        clients * options["rounds"]
        for clients in (3, 20, 50)
        for name, options in presets.PRESETS.items()
        if name.startswith(f"mnli-{clients}-")
    } == {1500}, "rounds × clients is constant"
