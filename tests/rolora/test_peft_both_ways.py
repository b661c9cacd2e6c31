"""Adapters that PEFT wrote start a run, are evaluated and exported; what comes back loads in PEFT.
PEFT is the judge of what they compute.
"""

import json

import peft
import pytest
import torch
import transformers as hf

from rolora import evaluate, export
from tests.models import tokenizer
from tests.rolora.commands import small

CAUSAL, CLASSIFIER = hf.AutoModelForCausalLM, hf.AutoModelForSequenceClassification
CASES = {
    "ranks and alphas of single modules": (
        "llama",
        dict(
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"v_proj": 2},
            alpha_pattern={"layers.1.self_attn.q_proj": 3},
        ),
    ),
    "an output layer": ("llama", dict(target_modules=["q_proj", "lm_head"])),
    "embeddings saved whole": (
        "llama",
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    ),
    "a classifier": ("roberta", dict(target_modules=["query", "value"])),
    "parts of a head by path": (
        "roberta",
        dict(
            target_modules=["query"],
            modules_to_save=["classifier.dense", "classifier.out_proj"],
            task_type=None,
        ),
    ),
}


def written(files, folder, family, options):
    """An adapter with B off zero, by PEFT; (its model, the base's class and options)."""
    cls, extra = (CAUSAL, {}) if family == "llama" else (CLASSIFIER, {"num_labels": 3})
    kind = "CAUSAL_LM" if family == "llama" else "SEQ_CLS"
    torch.manual_seed(0)
    base = cls.from_pretrained(files[family], **extra)
    model = peft.get_peft_model(base, peft.LoraConfig(**dict(r=4, task_type=kind) | options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "modules_to_save" in name:
            parameter.data.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval(), lambda: cls.from_pretrained(files[family], **extra)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25).view(2, 10)).logits


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, files, tmp_path, call):
    family, options = CASES[case]
    theirs, base = written(files, tmp_path / "peft", family, options)
    task = {"task-type": "causal-lm"} if family == "llama" else {}
    start = {"init-adapter": tmp_path / "peft", "output-dir": tmp_path / "run"}
    code, _, err = call(*small(files, family, rounds=2, lr=1e-3, **task, **start))
    assert (code, err) == (0, "")
    code, _, err = call("--resume", "--output-dir", tmp_path / "run", "--rounds", 3)
    assert (code, err) == (0, "")

    adapter = tmp_path / "run" / "adapter"
    judge = peft.PeftModel.from_pretrained(base(), adapter).eval()
    args = ("--adapter", adapter, "--to", "merged", "--output-dir", tmp_path / "m")
    assert call(*args, command=export.command)[0] == 0
    cls = CAUSAL if family == "llama" else CLASSIFIER
    merged = cls.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits(merged), logits(judge), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(judge), logits(theirs), atol=1e-4), "it has trained"
    mine, given = judge.peft_config["default"], theirs.peft_config["default"]
    assert (mine.r, mine.lora_alpha) == (given.r, given.lora_alpha)


@pytest.mark.parametrize("case", [name for name in CASES if name != "parts of a head by path"])
def test_what_peft_wrote_is_exported_as_it_is(case, files, tmp_path, call):
    """Without anything of ours in the folder."""
    family, options = CASES[case]
    theirs, _ = written(files, tmp_path / "peft", family, options)
    args = ("--adapter", tmp_path / "peft", "--to", "merged", "--output-dir", tmp_path / "m")
    code, _, err = call(*args, command=export.command)
    assert (code, err) == (0, "")
    cls = CAUSAL if family == "llama" else CLASSIFIER
    merged = cls.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits(merged), logits(theirs), rtol=1e-4, atol=1e-5)


def test_an_output_layer_of_another_base_is_refused(files, tmp_path, call):
    theirs, _ = written(files, tmp_path / "peft", "llama", CASES["an output layer"][1])
    theirs.base_model.model.lm_head.base_layer.weight.data.mul_(2)
    theirs.save_pretrained(tmp_path / "other")
    more = ("--eval-file", files["eval"], "--task-type", "causal-lm", "--max-length", 32)
    code, _, err = call("--adapter", tmp_path / "other", *more, command=evaluate.command)
    assert code == 2 and "was made for another base model" in err and err.count("\n") == 1


def test_a_new_pooler_is_saved_by_its_path_and_no_block_with_it(files, tmp_path, call):
    """Its last name, "dense", is also that of every block's linears."""
    model = hf.BertForMaskedLM(
        hf.BertConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    model.save_pretrained(tmp_path / "bert")
    texts = [json.loads(line)["text"] for line in files["train"].read_text().splitlines()]
    tokenizer(texts, "roberta").save_pretrained(tmp_path / "bert")
    flags = small(files, rounds=1, **{"model": tmp_path / "bert", "output-dir": tmp_path / "run"})
    assert call(*flags)[0] == 0
    base = CLASSIFIER.from_pretrained(tmp_path / "bert", num_labels=3)
    judge = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    whole = [
        name.removeprefix("base_model.model.")
        for name, module in judge.named_modules()
        if isinstance(module, peft.utils.ModulesToSaveWrapper)
    ]
    assert whole == ["bert.pooler.dense", "classifier"]
    args = ("--adapter", tmp_path / "run" / "adapter", "--to", "merged", "--output-dir")
    assert call(*args, tmp_path / "m", command=export.command)[0] == 0
    merged = CLASSIFIER.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits(merged), logits(judge), rtol=1e-4, atol=1e-5)
