"""GLUE's files, the hub's and its own, and its metrics."""

import numpy as np
import pytest
import torch

from rolora.errors import BadInput
from rolora.recipes import glue
from rolora.recipes.classification import PART, Classification
from tests.benchmark_files import (
    HUB_COLUMNS,
    write_glue,
)

OWN_FILES = {  # as GLUE itself distributes them
    "sst2": 'sentence\tlabel\nit \'s "great\tgood fun\t1\n"a mess\t0\n',
    "qnli": 'index\tquestion\tsentence\tlabel\n0\tWho "left?\tHe did.\tentailment\n1\tWhen?\tIt rained.\tnot_entailment\n',
    "mnli": "index\tpromptID\tsentence1\tsentence2\tgold_label\n"
    '0\t1\tHe "ate.\tHe was full.\tneutral\n1\t2\tA\tB\tcontradiction\n2\t3\tA\tB\t-\n',
    "qqp": 'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWhy "sky?\tWhy?\t0\n1\t3\t4\tA\tA?\t1\nbroken line\n',
    "rte": "index\tsentence1\tsentence2\tlabel\n0\tIt rained.\tIt was "
    "wet.\tentailment\n1\tA.\tB.\tnot_entailment\n",
}


@pytest.mark.parametrize("task", HUB_COLUMNS)
def test_glue_from_the_hub_s_files_and_from_glue_s_own(task, tmp_path, capsys):
    train, held = glue.load(task, str(write_glue(tmp_path / "hub", task)))
    assert len(train) == 40 and len(held) == (80 if task == "mnli" else 40), (
        "rows without a label are left out"
    )
    assert train[1] == {"text": "green thing 1", "label": glue.TASKS[task].labels[1]} | (
        {"text_pair": "green thing 1"} if len(HUB_COLUMNS[task]) == 2 else {}
    )
    own = tmp_path / "own"
    own.mkdir()
    for stem in ("train", *(("dev_matched", "dev_mismatched") if task == "mnli" else ("dev",))):
        (own / f"{stem}.tsv").write_text(OWN_FILES[task])
    train, held = glue.load(task, str(own))
    said = capsys.readouterr().out
    assert len(train) == (1 if task == "sst2" else 2), (
        "quotes are text, and so are lines with a tab too many wrong"
    )
    left_out = {"sst2": "1 of 2 rows", "qqp": "1 of 3 rows"}
    assert left_out[task] in said if task in left_out else said == ""
    assert '"' in (train[0]["text"] + train[0].get("text_pair", "")) or task == "rte"
    assert {row.get(PART) for row in held} == ({None, "mismatched"} if task == "mnli" else {None})


def test_glue_says_what_is_wrong(tmp_path):
    (tmp_path / "bad").mkdir()
    with pytest.raises(BadInput, match="has no train file"):
        glue.load("rte", str(tmp_path / "bad"))
    for stem in ("train", "validation"):
        (tmp_path / "bad" / f"{stem}.jsonl").write_text('{"premise": "a", "label": 0}\n')
    with pytest.raises(
        BadInput, match="has columns premise, label, expected sentence1 and sentence2, label"
    ):
        glue.load("rte", str(tmp_path / "bad"))


def test_accuracy_f1_and_the_mismatched_half():
    class Guesses(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return type(
                "Out", (), {"logits": torch.nn.functional.one_hot(input_ids[:, 0], 3).float()}
            )

    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    texts = {f"t{i}": [int(g)] for i, g in enumerate(guess)}
    tokenizer = lambda batch, pairs, **_: {"input_ids": [texts[t] for t in batch]}  # noqa: E731
    tokenizer.pad_token_id = 0
    recipe = Classification(tokenizer, ["a", "b", "c"], 8, "text", "label", positive="b")
    found = [
        {"text": f"t{i}", "label": "abc"[t]} | ({PART: "mismatched"} if i % 3 == 0 else {})
        for i, t in enumerate(truth)
    ]
    metrics = recipe.evaluate(Guesses(), recipe.encode(found), 7)
    first = np.arange(60) % 3 != 0
    assert metrics["accuracy"] == pytest.approx((truth == guess)[first].mean())
    assert metrics["accuracy/mismatched"] == pytest.approx((truth == guess)[~first].mean())
    precision, recall = (
        ((truth == 1) & (guess == 1)).sum() / (guess == 1).sum(),
        ((truth == 1) & (guess == 1)).sum() / (truth == 1).sum(),
    )
    assert metrics["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
