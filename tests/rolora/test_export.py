"""Exports: PEFT and transformers judge that what is written computes the same, and what cannot be
served says so.
"""

import json

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from rolora import LoRAConfig, attach, export, load_adapter, save_adapter
from rolora.adapter.layer import RoLoRALinear
from tests.rolora.commands import small


def base(files):
    return hf.AutoModelForCausalLM.from_pretrained(files["llama"]).eval()


def mixed(files, folder, **options):
    """(an adapted model with ranks and alphas of single modules, the folder of its adapter)."""
    model = base(files)
    report = attach(
        model,
        LoRAConfig(
            rank=4,
            alpha=8,
            target_modules=["q_proj", "v_proj", "up_proj"],
            rank_pattern={"v_proj": 2, r"layers\.1\.mlp.*": 6},
            alpha_pattern={r"layers\.0\.self_attn\.q_proj": 3},
            **options,
        ),
        seed=0,
    )
    for layer in report.layers.values():
        nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(model, folder, base_model=str(files["llama"]), task_type="CAUSAL_LM")
    return model, folder


def logits(model):
    return model(input_ids=torch.arange(5, 25).view(2, 10)).logits


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_go_to_peft_and_come_back(rslora, files, tmp_path):
    model, folder = mixed(files, tmp_path / "a", rslora=rslora)
    ranks = {
        name.split(".")[-1] + name.split(".")[2]: layer.rank
        for name, layer in model.named_modules()
        if isinstance(layer, RoLoRALinear)
    }
    assert (
        ranks["v_proj0"] == 2
        and ranks["up_proj1"] == 6
        and ranks["q_proj1"] == ranks["up_proj0"] == 4
    )
    theirs = peft.PeftModel.from_pretrained(base(files), folder).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    again = base(files)
    load_adapter(again, folder)
    assert torch.equal(logits(again), logits(model))
    theirs.save_pretrained(tmp_path / "peft")
    back = base(files)
    load_adapter(back, tmp_path / "peft")
    torch.testing.assert_close(logits(back), logits(model), rtol=1e-4, atol=1e-5)


def test_excluded_modules_are_peft_s(files):
    model, theirs = base(files), base(files)
    options = dict(
        target_modules="all-linear",
        exclude_modules=["down_proj", "model.layers.1.self_attn.q_proj"],
    )
    report, judge = (
        attach(model, LoRAConfig(rank=2, **options)),
        peft.get_peft_model(theirs, peft.LoraConfig(r=2, **options)),
    )
    assert set(report.replaced) == {
        n.removeprefix("base_model.model.")
        for n, m in judge.named_modules()
        if isinstance(m, peft.tuners.lora.Linear)
    }
    with pytest.raises(ValueError, match="leaves no module"):
        attach(base(files), LoRAConfig(target_modules=["q_proj"], exclude_modules=r".*q_proj"))


def test_pissa_starts_where_peft_s_does_and_leaves_the_base_alone(files, tmp_path):
    model, theirs = base(files), base(files)
    before, clean = {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
    report = attach(
        model, LoRAConfig(rank=4, alpha=8, target_modules=["q_proj", "v_proj"], init="pissa")
    )
    judge = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa"
        ),
    )
    torch.testing.assert_close(logits(model), clean, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    for path, layer in report.layers.items():
        theirs = judge.base_model.model.get_submodule(path)
        A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, B @ A, rtol=1e-3, atol=1e-5)
        nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(model, tmp_path, base_model=str(files["llama"]), task_type="CAUSAL_LM")
    served = peft.PeftModel.from_pretrained(base(files), tmp_path)
    assert served.peft_config["default"].r == 8
    torch.testing.assert_close(logits(served), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_baking_makes_one_rank_and_the_same_model(rslora, files, tmp_path, call):
    model, folder = mixed(files, tmp_path / "a", rslora=rslora)
    code, _, err = call(
        "--adapter", folder, "--to", "vllm", "--output-dir", tmp_path / "v", command=export.command
    )
    assert (
        code == 2
        and "ranks or alphas of single modules" in err
        and "--bake" in err
        and not (tmp_path / "v").exists()
    )
    assert (
        call(
            "--adapter",
            folder,
            "--to",
            "vllm",
            "--bake",
            "--output-dir",
            tmp_path / "v",
            command=export.command,
        )[0]
        == 0
    )
    stored = json.loads((tmp_path / "v" / "adapter_config.json").read_text())
    assert (
        stored["r"] == stored["lora_alpha"] == 6
        and not stored["rank_pattern"]
        and not stored["alpha_pattern"]
    )
    served = peft.PeftModel.from_pretrained(base(files), tmp_path / "v").eval()
    torch.testing.assert_close(logits(served), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, gate", [("fp32", 1e-5), ("bf16", 2e-2)])
def test_a_merged_model_needs_nothing_of_ours(dtype, gate, files, tmp_path, call):
    model, folder = mixed(files, tmp_path / "a")
    code, out, _ = call(
        "--adapter",
        folder,
        "--to",
        "merged",
        "--dtype",
        dtype,
        "--output-dir",
        tmp_path / "m",
        command=export.command,
    )
    assert code == 0 and "rounding lost" in out
    served = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert served.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype] and not any(
        "lora" in key for key in served.state_dict()
    )
    assert (logits(served).float() - logits(model)).norm() < gate * logits(model).norm()
    assert len(hf.AutoTokenizer.from_pretrained(tmp_path / "m")) > 0


def test_a_merged_classifier_keeps_its_head_and_a_run_s_adapter_is_enough(files, tmp_path, call):
    assert call(*small(files, "roberta", rounds=2, **{"output-dir": tmp_path / "run"}))[0] == 0
    code, _, err = call(
        "--adapter",
        tmp_path / "run" / "adapter",
        "--to",
        "vllm",
        "--output-dir",
        tmp_path / "v",
        command=export.command,
    )
    assert code == 2 and "saves classifier whole" in err
    assert (
        call(
            "--adapter",
            tmp_path / "run" / "adapter",
            "--to",
            "merged",
            "--output-dir",
            tmp_path / "m",
            command=export.command,
        )[0]
        == 0
    )
    served = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "m")
    held = [json.loads(line) for line in files["eval"].read_text().splitlines()]
    right = 0
    for row in held:
        ids = tokenizer(row["text"], truncation=True, max_length=32, return_tensors="pt")
        right += served.config.id2label[int(served(**ids).logits.argmax())] == row["label"]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert right / len(held) == last["eval"]["accuracy"]


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ("--adapter", "nowhere", "--output-dir", "new"),
            "--adapter nowhere is not an adapter folder",
        ),
        (("--adapter", "{a}", "--output-dir", "{a}"), "holds other files"),
        (("--adapter", "{a}", "--to", "onnx", "--output-dir", "new"), "--to 'onnx'"),
        (
            ("--adapter", "{a}", "--dtype", "int4", "--output-dir", "new"),
            "--dtype 'int4' is not one of",
        ),
        (("--adapter", "{a}", "--to", "merged", "--model", "{roberta}", "--output-dir", "new"), ""),
    ],
)
def test_bad_input(args, message, files, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, folder = mixed(files, tmp_path / "a")
    code, _, err = call(
        *(a.format(a=folder, roberta=files["roberta"]) for a in args), command=export.command
    )
    assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "new").exists()
