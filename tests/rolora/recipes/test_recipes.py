"""Losses and metrics against transformers' own, and data files in every format."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rolora.data import files as data
from rolora.errors import BadInput
from rolora.hf.reading import load_tokenizer
from rolora.recipes import commonsense
from rolora.recipes.answer_sentence import AnswerSentence
from rolora.recipes.causal_lm import CausalLM
from rolora.recipes.classification import Classification, label_set
from rolora.recipes.multiple_choice import SET, MultipleChoice, columns
from tests.benchmark_files import COMMONSENSE, write_commonsense


@pytest.fixture(scope="module")
def llama(files):
    return AutoModelForCausalLM.from_pretrained(files["llama"]).eval(), load_tokenizer(
        str(files["llama"])
    )


@pytest.fixture(scope="module")
def rows(files):
    return data.read_file(files["eval"])


def test_the_loss_is_on_the_response_only_and_padding_does_not_count(llama, rows):
    model, tokenizer = llama
    assert AutoTokenizer.from_pretrained(tokenizer.name_or_path).pad_token is None, (
        "the case of Llama"
    )
    recipe = CausalLM(tokenizer, 64, "response", "prompt")
    examples = recipe.encode(rows[:7])
    total = recipe.loss(model, recipe.collate(examples)).item()
    alone = 0.0
    for row in rows[:7]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = [
            *tokenizer(row["response"], add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        ids = torch.tensor([prompt + response])
        labels = torch.tensor([[-100] * len(prompt) + response])
        alone += model(input_ids=ids, labels=labels).loss.item() * len(response)
    assert total == pytest.approx(alone, rel=1e-5)


def test_exact_match_is_what_greedy_generation_gives(files, rows):
    """On a model taught a few answers, so that some match and some do not."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(files["llama"]),
        load_tokenizer(str(files["llama"])),
    )
    recipe = CausalLM(tokenizer, 64, "response", "prompt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        batch = recipe.collate(recipe.encode(rows[:16]))
        (recipe.loss(model, batch) / batch.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    matches = 0
    for row in rows:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        matches += (
            tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == row["response"]
        )
    metrics = recipe.evaluate(model, recipe.encode(rows), batch_size=9)
    assert 0 < matches < len(rows), "some must match and some not, or the comparison is empty"
    assert metrics["exact_match"] == matches / len(rows)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))


def test_multiple_choice_takes_the_length_normalised_likeliest(llama, rows):
    model, tokenizer = llama
    recipe = MultipleChoice(tokenizer, 64, columns("prompt", "choices", "answer"))
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = [
                *prompt,
                *tokenizer(" " + choice, add_special_tokens=False)["input_ids"],
                tokenizer.eos_token_id,
            ]
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            score = sum(logp[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
            scores.append(score / len((" " + choice).encode()))
        right += max(range(3), key=scores.__getitem__) == row["answer"]
    metrics = recipe.evaluate(model, recipe.encode(rows), batch_size=7)
    assert metrics["accuracy"] == right / len(rows)


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_classification_equals_one_example_at_a_time(family, files, rows):
    tokenizer = load_tokenizer(str(files[family]))
    model = AutoModelForSequenceClassification.from_pretrained(
        files[family], num_labels=3, pad_token_id=tokenizer.pad_token_id
    ).eval()
    recipe = Classification(tokenizer, label_set(rows, "label"), 32, "text", "label")
    assert recipe.labels == ["hill", "sea", "town"]
    metrics = recipe.evaluate(model, recipe.encode(rows), batch_size=8)
    right, loss = 0, 0.0
    for row in rows:
        ids = tokenizer(row["text"], return_tensors="pt")
        label = recipe.labels.index(row["label"])
        out = model(**ids, labels=torch.tensor([label]))
        right += out.logits.argmax().item() == label
        loss += out.loss.item()
    assert metrics["accuracy"] == right / len(rows) and metrics["loss"] == pytest.approx(
        loss / len(rows), rel=1e-4
    )


def test_long_examples_lose_the_beginning_of_the_prompt(llama):
    _, tokenizer = llama
    recipe = CausalLM(tokenizer, 16, "response", "prompt")
    made = recipe.complete("the old ship and the tide are here " * 5, " in the sea")
    whole = recipe.complete("", " in the sea")
    assert len(made.ids) == 16 and made.ids[0] == tokenizer.bos_token_id
    assert (
        made.ids[made.start :] == whole.ids[whole.start :]
        and made.ids[-1] == tokenizer.eos_token_id
    )


def test_templates_and_pairs(llama, rows):
    _, tokenizer = llama
    recipe = CausalLM(tokenizer, 64, "response", template="Q: {prompt} A:")
    example = recipe.encode(rows[:1])[0]
    assert tokenizer.decode(example.ids[1 : example.start]) == f"Q: {rows[0]['prompt']} A:"
    with pytest.raises(BadInput, match=r"'Q: \{question\}' does not fit the columns text, label"):
        CausalLM(tokenizer, 64, "response", template="Q: {question}").encode(rows[:1])
    pair = Classification(
        tokenizer, ["hill", "sea", "town"], 64, "text", "label", text_pair_column="prompt"
    ).encode(rows[:1])[0]
    assert tokenizer.decode(pair.ids[1:]) == rows[0]["text"] + rows[0]["prompt"]


def test_every_file_format_gives_the_same_rows(tmp_path):
    import csv

    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"text": 'a, "b"', "label": "x"}, {"text": "né\n2", "label": "y"}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "r.json").write_text(json.dumps(rows))
    for name, delimiter in (("r.csv", ","), ("r.tsv", "\t")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    for suffix in data.SUFFIXES:
        assert data.read_file(tmp_path / f"r{suffix}") == rows


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"text": 1}\n{"text"\n', "line 2 is not valid JSON"),
        ("a.jsonl", "[1]\n", "expected a list of objects, or an object a line"),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.json", '{"a":\n 1}', "expected a list of objects"),
        ("a.csv", "a,b\n1\n", "line 2: 1 fields, and the heading has 2"),
        ("a.parquet", "junk", "is not a Parquet file"),
        ("a.txt", "x", "is not a data file: expected .jsonl"),
    ],
)
def test_broken_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=message):
        data.read_file(tmp_path / name)
    with pytest.raises(BadInput, match="does not exist"):
        data.read_file(tmp_path / "nowhere.jsonl")


def test_hub_data_sets_split_by_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    part = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features
    )
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *a, **k: datasets.DatasetDict({"train": part, "test": part}),
    )
    assert data.read_hub("x/y", None, ["train"]) == [
        {"text": "a", "label": "pos"},
        {"text": "b", "label": "neg"},
        {"text": "c", "label": None},
    ]
    assert (
        data.read_hub("x/y", None, ["validation", "test"]) is not None
        and data.read_hub("x/y", None, ["validation"]) is None
    )
    monkeypatch.undo()
    with pytest.raises(
        BadInput,
        match=r"'nobody/nothing' could not be fetched: .*; for local files give --train-file",
    ):
        data.read_hub("nobody/nothing", None, ["train"])


def test_commonsense_sets_in_their_own_columns(tmp_path, llama):
    model, tokenizer = llama
    train, evaluation = commonsense.load(str(write_commonsense(tmp_path)))
    assert len(train) == len(evaluation) == 6 * 8
    for row in train[::6]:
        prompt, names, answer = commonsense.read(row)
        right = COMMONSENSE[row[SET]][1]
        said = names[answer]
        assert said == right if row[SET] == "boolq" else f"{said.capitalize()}: {right}" in prompt
        assert prompt.endswith(
            f"\n\nAnswer format: {'/'.join(names)}\n\n### Response:\n"
        ) and prompt.startswith("Below is an instruction")
    recipe = AnswerSentence(tokenizer, 400, commonsense.read)
    metrics = recipe.evaluate(model, recipe.encode(evaluation), 16)
    assert (
        sum(name.startswith("accuracy/") for name in metrics)
        == sum(name.startswith("likelihood_accuracy/") for name in metrics)
        == 8
    )
    with pytest.raises(BadInput, match="holds none of boolq"):
        (tmp_path / "empty").mkdir()
        commonsense.load(str(tmp_path / "empty"))
