"""What a value of a row may be: nothing is made into text by chance."""

import json
import types

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from rolora.data import cells
from rolora.hf.reading import load_tokenizer
from rolora.recipes.causal_lm import CausalLM
from rolora.recipes.classification import Classification, label_set
from rolora.recipes.joined import opening_tokens
from rolora.recipes.multiple_choice import columns
from tests.rolora.commands import small

NO_TEXT = [["a"], {"role": "user"}, b"bytes", 5, 1.5, True, None, float("nan"), "\ud800"]


@pytest.mark.parametrize("value", NO_TEXT, ids=repr)
def test_what_is_no_text_is_refused(value):
    with pytest.raises(ValueError, match="expected text"):
        cells.text(value)


@pytest.mark.parametrize("value", ["a", "", "ä", "\U0001f600"])
def test_a_text_is_taken_as_it_is(value):
    assert cells.text(value) is value


@pytest.mark.parametrize(
    "value, name",
    [
        (1, "1"), (1.0, "1"), ("1", "1"), ("1.0", "1"), ("01", "1"), (-1, "-1"), ("-1.0", "-1"),
        (True, "True"), ("yes", "yes"), ("1.5", "1.5"), ("²", "²"), ("v2", "v2"),
    ],
)  # fmt: skip
def test_labels(value, name):
    assert cells.label(value) == name


@pytest.mark.parametrize(
    "value", ["", "  ", None, [1], {"a": 1}, b"a", 0.5, float("nan"), float("inf"), "\ud800"]
)
def test_what_is_no_label_is_refused(value):
    with pytest.raises(ValueError, match="expected"):
        cells.label(value)


def test_label_sets_of_odd_digits_and_numbers():
    assert label_set([{"y": v} for v in ("²", "1")], "y") == ["1", "²"]
    assert label_set([{"y": v} for v in (10, "9", 2.0, "2.0")], "y") == ["2", "9", "10"]


@pytest.mark.parametrize(
    "choices, answer, index",
    [
        (["2", "4", "1", "8"], 1, 1),  # a number is an index, be there a choice of its name
        (["2", "4", "1", "8"], "1", 2),
        (["2", "4", "1", "8"], 1.0, 1),
        (["red", "blue"], "blue", 1),
        (["red", "blue"], "1", 1),
        (["red", "blue"], "b", 1),
        (["red", "blue"], "A", 0),
        ([3, 4.5], "4.5", 1),
        ('["x", "y"]', "y", 1),
        (["B", "A"], "A", 1),
    ],
)
def test_answers(choices, answer, index):
    row = {"prompt": "q", "choices": choices, "answer": answer}
    assert columns("prompt", "choices", "answer")(row)[2] == index


@pytest.mark.parametrize(
    "choices, answer",
    [("x, y", 0), ({"a": 1}, 0), (["a", ["b"]], 0), (["a", "b"], True), (["a", "b"], None),
     (["a", "b"], "purple"), (["a", "b"], 0.5), ("[" * 100_000, 0)],
)  # fmt: skip
def test_what_is_no_question_is_refused(choices, answer):
    with pytest.raises(ValueError):
        columns("prompt", "choices", "answer")(
            {"prompt": "q", "choices": choices, "answer": answer}
        )


def test_templates_fill_columns_in_and_nothing_else():
    row = {"q": "why", "n": 3, "x": [1]}
    assert cells.template("{q}: {n}")(row) == "why: 3"
    assert cells.template(r"{q}\n\tA\\n:")(row) == "why\n\tA\\n:"
    assert cells.template("{{q}} {q}")(row) == "{q} why"
    for text in ("{q.__class__}", "{q[0]}", "{q:>3000000000}", "{q!r}", "{}", "{", "{q}}"):
        with pytest.raises(ValueError, match="prompt template"):
            cells.template(text)
    with pytest.raises(ValueError, match="column 'x' is list"):
        cells.template("{x}")(row)
    with pytest.raises(ValueError, match="there is no 'y'"):
        cells.template("{y}")(row)


class Opening:
    """A tokenizer of characters with two opening tokens, an end, and their texts."""

    eos_token_id, pad_token_id = 1, 0
    texts = types.MappingProxyType({"<a>": 2, "<b>": 3, "</s>": 1})

    def __call__(self, text, add_special_tokens=True):
        ids = []
        while text:
            special = next((name for name in self.texts if text.startswith(name)), None)
            ids.append(self.texts[special] if special else 10 + ord(text[0]))
            text = text[len(special or "x") :]
        return {"input_ids": [2, 3, *ids, 1] if add_special_tokens else ids}


def test_all_opening_tokens_are_kept_and_none_is_doubled():
    tokenizer = Opening()
    assert opening_tokens(tokenizer) == [2, 3]
    recipe = CausalLM(tokenizer, 64, "r", "p")
    plain = recipe.complete("p", "r")
    assert plain.ids == [2, 3, 10 + ord("p"), 10 + ord("r"), 1] and plain.start == 3
    assert recipe.complete("<a><b>p", "r</s>") == plain, "what a template has written already"
    assert recipe.complete("", "<a><b>r").ids == [2, 3, 10 + ord("r"), 1]


def test_pairs_tell_a_bert_which_text_a_token_is_of(files):
    """The recipe's batch gives the model's own predictions, as transformers' tokenizer asks."""
    tokenizer = load_tokenizer(str(files["roberta"]))
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    rows = [{"a": "one two", "b": "three", "y": 0}, {"a": "two", "b": "one three two", "y": 1}]
    recipe = Classification(tokenizer, ["0", "1"], 32, "a", "y", "b")
    judge = tokenizer(
        [r["a"] for r in rows], [r["b"] for r in rows], padding=True, return_tensors="pt"
    )
    examples = recipe.encode(rows)
    if examples[0].types is None:
        pytest.skip("this tokenizer's files do not tell two texts apart")
    batch = recipe.collate(examples)
    assert torch.equal(batch.inputs["token_type_ids"], judge["token_type_ids"])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch.inputs).logits, model(**judge).logits)


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("text", ["a"], "row 3: column 'text' is list ['a'], expected text"),
        ("text", {"role": "user"}, "row 3: column 'text' is dict"),
        ("text", 5, "row 3: column 'text' is int 5, expected text"),
        ("text", None, "row 3 has no value for column 'text'"),
        ("label", [1], "row 3: column 'label' is list [1], expected a label"),
        ("label", "", "row 3: column 'label' is an empty text, expected a label"),
        ("label", 0.25, "row 3: column 'label' is float 0.25, expected a label"),
    ],
)
def test_a_column_of_another_kind_is_one_line_with_the_files_row(
    column, value, message, files, tmp_path, call
):
    rows = [json.loads(line) for line in files["train"].read_text().splitlines()]
    rows[2][column] = value
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = small(files, **{"task-type": "classification", "output-dir": tmp_path / "run"})
    flags[flags.index("--train-file") + 1] = path
    code, _, err = call(*flags)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_column_that_is_named_as_one_of_ours_is_nothing_special(files, tmp_path, call):
    rows = [json.loads(line) for line in files["train"].read_text().splitlines()]
    for name in ("part", "task"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row | {name: {"x": [1]}}) + "\n" for row in rows))
        flags = small(files, rounds=1, **{"output-dir": tmp_path / name})
        for flag in ("--train-file", "--eval-file"):
            flags[flags.index(flag) + 1] = path
        code, _, err = call(*flags)
        assert (code, err) == (0, "")
