"""The embedded default: what it is made of, and that it learns through the same code as any
model.
"""

import collections
import json

import pytest
import torch

from rolora import builtin


def read(name):
    return [
        json.loads(line)
        for line in (builtin.TEXT / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_the_text_is_clean():
    train, held = read("train"), read("eval")
    source = json.loads((builtin.TEXT / "source.json").read_text())
    assert len(train) + len(held) == source["texts"] and source["version"] == "3.13.0"
    assert not {r["text"] for r in train} & {r["text"] for r in held}
    assert set(collections.Counter(r["label"] for r in train)) == {r["label"] for r in held}
    assert "PSF" in (builtin.MODEL.parent / "LICENSE-PSF.txt").read_text()


def test_the_model_is_pre_trained():
    """Its loss on held-out text is far below a uniform guess (8.3 nats) and below the frequencies
    of single tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(builtin.MODEL)
    model = AutoModelForCausalLM.from_pretrained(builtin.MODEL, dtype=torch.float32).eval()
    assert tokenizer.pad_token is None and model.config.architectures == ["LlamaForCausalLM"]
    counts = collections.Counter(
        i for r in read("train") for i in tokenizer(r["text"])["input_ids"]
    )
    total, loss, unigram, tokens = sum(counts.values()), 0.0, 0.0, 0
    with torch.no_grad():
        for row in read("eval")[::8]:
            ids = tokenizer(row["text"], truncation=True, max_length=128, return_tensors="pt")[
                "input_ids"
            ]
            n = ids.shape[1] - 1
            loss += model(ids, labels=ids).loss.item() * n
            unigram -= sum(
                torch.log(torch.tensor(max(counts[i], 1) / total)).item()
                for i in ids[0, 1:].tolist()
            )
            tokens += n
    assert loss / tokens < 0.65 * unigram / tokens


@pytest.mark.slow
def test_the_default_job_learns(tmp_path, users_python):
    from rolora import config
    from rolora.run import job

    made = job.prepare(config.resolve({"validation_fraction": 0.0}, preset="builtin"))
    most_frequent = max(collections.Counter(e.label for e in made.evaluation).values()) / len(
        made.evaluation
    )
    flags = ("--rounds", 8, "--eval-every", 8, "--output-dir", tmp_path / "run")
    code, _, err = users_python.run("-m", "rolora.train", *flags)
    assert code == 0, err
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[-1]["eval"]["accuracy"] > most_frequent + 0.1
    assert (tmp_path / "run" / "plots" / "accuracy.png").stat().st_size > 1000
