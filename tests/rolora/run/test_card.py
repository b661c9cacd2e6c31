"""Model cards: huggingface_hub reads their metadata, and they hold no path of this machine."""

import dataclasses
import json
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard, metadata_load

from rolora.errors import BadInput
from rolora.run import adapter_folder, card
from tests.rolora.commands import rows, small

FACTS = card.Facts(
    task="classification",
    method="rolora",
    rounds=4,
    clients=50,
    clients_per_round=5,
    data=[("training", "owner/news", 1200), ("evaluation", "held.jsonl", 60)],
    metrics={"accuracy": 0.75, "loss": float("inf")},
    judged_on="held.jsonl",
    bytes_up=12345,
    bytes_down=23456,
    license="apache-2.0",
)


def test_the_hub_reads_what_it_is_made_of():
    found = ModelCard(card.text("owner/base", ["no", "yes"], FACTS)).data
    assert (found.base_model, found.library_name, found.license) == (
        "owner/base",
        "peft",
        "apache-2.0",
    )
    assert found.datasets == ["owner/news"] and found.pipeline_tag == "text-classification"
    assert found.get("base_model_relation") == "adapter"
    (result,) = found.eval_results  # a loss that is infinite is no number for YAML
    assert (result.metric_type, result.metric_value, result.dataset_name) == (
        "accuracy",
        0.75,
        "held.jsonl",
    )


def test_what_it_says_in_words():
    text = card.text("owner/base", None, dataclasses.replace(FACTS, privacy="ε 3"))
    for said in (
        "| rounds | 4 |",
        "| clients | 50 clients, 5 a round |",
        "| data: training | owner/news, 1,200 examples |",
        "| messages up | 12,345 bytes |",
        "| accuracy | 0.7500 |",
        "| privacy | ε 3 |",
        "| license of the base | apache-2.0 |",
    ):
        assert said in text


def test_texts_of_others_stay_texts():
    label = "a`b\n# c"
    facts = dataclasses.replace(
        FACTS, data=[("training", "x|y<script>\n# z", 3)], license="a: b\n---\nc"
    )
    text = card.text("owner/base", [label], facts)
    assert "0. `a'b # c`" in text and r"x\|y\<script\># z".replace(r"\># ", r"\> # ") in text
    assert "\n# z" not in text and "\n# c" not in text
    assert ModelCard(text).data.license == "a: b\n---\nc"


def test_a_run_s_card_tells_the_run(files, tmp_path, call):
    run = tmp_path / "run"
    assert call(*small(files, rounds=2, **{"output-dir": run, "validation-fraction": 0.2}))[0] == 0
    summary = json.loads((run / "summary.json").read_text())
    found = adapter_folder.read(run / "adapter").facts
    assert found.metrics == summary["test"] and found.judged_on == "eval.jsonl"
    assert (found.bytes_up, found.bytes_down) == (summary["bytes_up"], summary["bytes_down"])
    assert found.bytes_up == sum(row["bytes_up"] for row in rows(run)) > 0
    assert found.data == [
        ("training", "train.jsonl", 128),
        ("validation", "train.jsonl, held out", 32),
        ("evaluation", "eval.jsonl", 60),
    ]
    text = (run / "adapter" / "README.md").read_text()
    assert (
        str(tmp_path) not in text
        and str(files["root"]) not in text
        and "`llama (a folder)`" in text
    )
    said = metadata_load(run / "adapter" / "README.md")
    assert (
        "base_model" not in said
        and said["model-index"][0]["results"][0]["dataset"]["name"] == "eval.jsonl"
    )
    for path in (run / "adapter").rglob("*"):
        if path.is_file() and path.name != "adapter_config.json":  # by which PEFT finds the base
            assert str(files["root"]).encode() not in path.read_bytes(), path.name


def test_clients_with_adapters_of_their_own_share_no_metric(files, tmp_path, call):
    run = tmp_path / "run"
    assert call(*small(files, rounds=2, method="fedsa", **{"output-dir": run}))[0] == 0
    found = adapter_folder.read(run / "adapter" / "client-0000").facts
    assert found.method == "fedsa" and found.metrics == {}


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": "4"},
        {"data": [["training", 3, 4]]},
        {"data": [[]]},
        {"metrics": {"a": "b"}},
        {"more": 1},
        {"clients": True},
    ],
)
def test_damaged_facts_are_one_line(change, tmp_path):
    stored = {"options": {}, "labels": None, "trained": dataclasses.asdict(FACTS) | change}
    (tmp_path / "rolora.json").write_text(json.dumps(stored))
    with pytest.raises(BadInput, match=r"rolora\.json is damaged"):
        adapter_folder.read(tmp_path)


@pytest.mark.parametrize(
    "base, known",
    [
        ("owner/name", True),
        ("gpt2", False),
        ("/models/llama", False),
        ("./x/y", False),
        ("a/b/c", False),
        ("a b/c", False),
    ],
)
def test_what_the_hub_could_have(base, known):
    assert card.is_hub_id(base) == known
    assert card.is_hub_id("gpt2", bare=True) and "base_model: gpt2" in card.text("gpt2", None)


def test_the_card_needs_no_torch():
    program = "import sys, rolora.run.adapter_folder; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
