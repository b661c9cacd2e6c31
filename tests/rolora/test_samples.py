"""What the model writes at each evaluation, and the F1 of short answers."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from rolora import load_adapter
from rolora.hf.reading import load_tokenizer
from rolora.recipes.generating import continuations, overlap
from tests.rolora.commands import small


def read(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "text, reference, f1",
    [
        ("Paris", "paris.", 1.0),
        ("The Eiffel Tower", "eiffel tower", 1.0),
        ("in Paris", "Paris", 2 / 3),
        ("one two three", "three four", 2 * 1 / 5),
        ("a a b", "b b a", 2 * 1 / 3),
        ("", "Paris", 0.0),
        ("the", "a", 1.0),
    ],
)
def test_overlap_is_squad_s(text, reference, f1):
    """By hand, from the definition: articles are no words, so "a a b" and "b b a" are b and b b."""
    assert overlap(text, reference) == pytest.approx(f1)


def test_continuations_are_those_of_each_prompt_alone(files):
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(files["llama"]).eval()
    tokenizer = load_tokenizer(str(files["llama"]))
    prompts = [tokenizer(text)["input_ids"] for text in ("a", "one two three", "b c d e f g")]
    together = continuations(model, tokenizer, prompts, 6, 2, "cpu")
    alone = []
    for ids in prompts:
        given = torch.tensor([ids])
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        alone.append(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
    assert together == alone


@pytest.mark.parametrize(
    "extra", [{"prompt-column": "prompt", "response-column": "response"}, {}], ids=["qa", "plain"]
)
def test_a_run_writes_samples_before_and_after(extra, files, tmp_path, call):
    asked = {"task-type": "causal-lm", "samples": 2, "eval-every": 2, "output-dir": tmp_path / "r"}
    given = small(files, **extra | asked)
    code, out, err = call(*given)
    assert (code, err) == (0, "")
    found = read(tmp_path / "r")
    assert [sample["round"] for sample in found] == [0, 0, 2, 2, 4, 4]
    assert found[0]["prompt"] == found[4]["prompt"] and found[0]["reference"]

    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(files["llama"]).eval()
    load_adapter(model, tmp_path / "r" / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(files["llama"])
    ids = torch.tensor([tokenizer(found[4]["prompt"], add_special_tokens=False)["input_ids"]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=128, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    written = found[4]["written"]  # no longer than the model has positions for
    assert len(written) > 40 and text.startswith(written) and written != found[0]["written"]

    code, _, err = call("--resume", "--output-dir", tmp_path / "r", "--rounds", 6)
    assert (code, err) == (0, "")
    assert [sample["round"] for sample in read(tmp_path / "r")] == [0, 0, 2, 2, 4, 4, 6, 6]


@pytest.mark.parametrize(
    "extra, message",
    [
        ({}, "--samples: a classification writes no text"),
        ({"method": "fedsa", "task-type": "causal-lm"}, "clients keep factors of their own"),
    ],
)
def test_what_cannot_write_is_told(extra, message, files, tmp_path, call):
    code, _, err = call(*small(files, samples=1, **extra, **{"output-dir": tmp_path / "r"}))
    assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "r").exists()


def test_short_answers_have_an_f1(files, tmp_path, call):
    asked = {"prompt-column": "prompt", "response-column": "response"}
    code, out, err = call(*small(files, **asked, **{"output-dir": tmp_path / "r"}))
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").open()]
    assert all(0 <= row["eval"]["exact_match"] <= row["eval"]["f1"] <= 1 for row in rows)
