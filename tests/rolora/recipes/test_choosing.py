"""A kind of task is one file and one line: how it is told, what it needs, how it is built."""

import sys
import types

import pytest
import torch

from rolora import config
from rolora.config import TASK_TYPES, Config
from rolora.errors import BadInput
from rolora.recipes import choosing
from rolora.recipes.causal_lm import CausalLM


@pytest.mark.parametrize(
    "options, row, expected",
    [
        ({}, {"text": "a", "label": 1}, "classification"),
        ({}, {"text": "a"}, "causal-lm"),
        ({"text_column": "body"}, {"body": "a"}, "causal-lm"),
        ({"label_column": "kind"}, {"text": "a", "kind": 1}, "classification"),
        ({"response_column": "answer"}, {"answer": "a", "label": 1}, "causal-lm"),
        ({"prompt_template": "{q}"}, {"q": "a", "text": "b", "label": 1}, "causal-lm"),
        ({"choices_column": "c", "prompt_column": "q"}, {"q": 1, "label": 1}, "multiple-choice"),
        ({"task_type": "causal-lm"}, {"text": "a", "label": 1}, "causal-lm"),
        ({"benchmark": "rte"}, {"text": "a"}, "classification"),
        ({"dataset": "commonsense"}, {"text": "a"}, "multiple-choice"),
        ({}, {"messages": []}, "chat"),
        ({}, {"conversations": []}, "chat"),
        ({}, {"instruction": "a", "input": "", "output": "b"}, "chat"),
        ({}, {"prompt": "a", "completion": "b"}, "chat"),
        ({"loss_on": "last"}, {"messages": [], "text": "a"}, "chat"),
        ({}, {"messages": [], "text": "a"}, "causal-lm"),
        ({"benchmark": "alpaca"}, {"instruction": "a", "output": "b"}, "causal-lm"),
        ({"response_column": "output"}, {"instruction": "a", "output": "b"}, "causal-lm"),
        ({}, {"chosen": [], "rejected": []}, "preference"),
        ({}, {"prompt": "a", "chosen": "b", "rejected": "c", "messages": []}, "preference"),
        ({"dpo_beta": 0.2}, {"prompt": "a"}, "preference"),
    ],
)
def test_the_task_is_told_by_options_first_and_then_by_columns(options, row, expected):
    settled = choosing.settle(Config().with_values(**options), row)
    assert settled.task.task_type == expected
    assert choosing.settle(settled, {}) == settled  # settling twice changes nothing


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"chat_template": "{{ a }}"},
            "--chat-template is for chat and preference data, and these",
        ),
        (
            {"loss_on": "last", "task_type": "causal-lm"},
            "--loss-on is for chat data, and .* causal",
        ),
        ({"dpo_beta": 1.0, "benchmark": "alpaca"}, "--dpo-beta is for preference data, and"),
    ],
)
def test_an_option_of_another_kind_of_task_is_not_ignored(options, message):
    settled = choosing.settle(Config().with_values(**options), {"text": "a"})
    with pytest.raises(BadInput, match=message):
        choosing.build(settled, None, [{"text": "a"}], torch.device("cpu"))


def test_columns_that_tell_nothing_are_refused_by_name():
    with pytest.raises(BadInput, match="cannot tell the task from the columns a, b"):
        choosing.settle(Config(), {"a": 1, "b": 2})


@pytest.mark.parametrize(
    "task_type, peft", zip(TASK_TYPES, ("SEQ_CLS", *["CAUSAL_LM"] * 4), strict=True)
)
def test_every_recipe_says_what_peft_calls_it(task_type, peft):
    assert choosing.load(task_type).peft_task_type == peft


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "does not exist"),
        ("import nothing_of_that_name", "cannot be loaded: ModuleNotFoundError"),
        ("x = 1", "has no peft_task_type, headline, columns, build"),
        ("class RECIPE:\n    headline = 'loss'", "has no peft_task_type, columns, build"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(text, message, tmp_path):
    path = tmp_path / "own.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInput, match=message):
        choosing.columns(Config().with_values(task_type=str(path)))


def test_a_new_kind_of_task_is_one_file_and_one_line(monkeypatch):
    class Shouted(CausalLM):
        @classmethod
        def is_asked(cls, task):
            return False

        @classmethod
        def is_told(cls, task, row):
            return "shout" in row

        @classmethod
        def columns(cls, task):
            return {"--shout-column": "shout"}

        @classmethod
        def build(cls, task, tokenizer, rows, device, labels=None):
            return cls(tokenizer, task.max_length, "shout", device=device)

    module = types.ModuleType("rolora.recipes.shouted_lm")
    module.RECIPE = Shouted
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(choosing, "TASK_TYPES", ("shouted-lm", *TASK_TYPES))
    settled = choosing.settle(config.resolve({"max_length": 32}), {"shout": "A", "text": "a"})
    assert settled.task.task_type == "shouted-lm"
    assert choosing.columns(settled) == {"--shout-column": "shout"}
    made = choosing.build(settled, None, [{"shout": "A"}], torch.device("cpu"))
    assert isinstance(made, Shouted) and made.max_length == 32
