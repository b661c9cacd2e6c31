"""Whole models on a quantised base: gradients, PEFT, runs, checkpoints, exports and the memory that a plan names."""

import json
import tomllib

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from rolora import LoRAConfig, attach, load_adapter, set_phase
from rolora import evaluate as evaluate_command
from rolora import export as export_command
from rolora.adapter.layer import RoLoRALinear
from rolora.adapter.quantised import kind_of
from rolora.hf import architecture, models
from tests.quantised import KINDS, dense_models, read, saved_quantised
from tests.rolora.commands import bits, rows, small

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_first_layer_after_an_evaluation(kind, files, tmp_path):
    """bitsandbytes 0.50.2 would cut them at every 4-bit linear in between, on a CPU with
    AVX512-BF16.
    """
    model = saved_quantised(tmp_path, files, kind).eval()
    batch = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=batch)
    report = attach(model, LoRAConfig(rank=4, target_modules=["q_proj", "v_proj"]), seed=0)
    for layer in report.layers.values():
        nn.init.normal_(layer.lora_B, std=0.1)
    with torch.no_grad():
        model(input_ids=batch)
    model(input_ids=batch, labels=batch).loss.backward()
    assert all(
        layer.lora_A.grad is not None and layer.lora_A.grad.norm() > 0
        for layer in report.layers.values()
    )


def test_widths_that_are_no_whole_blocks_are_refused_on_a_cpu(files, tmp_path, call):
    code, _, err = call(*small(files, quantize="nf4"), "--output-dir", tmp_path / "new")
    assert (
        code == 2
        and "has 32 inputs, and on a CPU bitsandbytes needs multiples of 64" in err
        and err.count("\n") == 1
    )


def test_peft_on_a_4_bit_model_gives_the_same(files, tmp_path):
    theirs = saved_quantised(tmp_path, files, "nf4")
    ours = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", device_map="cpu", dtype=torch.float32
    )
    report = attach(ours, LoRAConfig(rank=4, alpha=8, target_modules=["q_proj", "v_proj"]), seed=0)
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    )
    set_phase(ours, "BOTH")
    ours.train(), theirs.train()  # in evaluation bitsandbytes' CPU kernels compute in bf16
    with torch.no_grad():
        for path, layer in report.layers.items():
            nn.init.normal_(layer.lora_B)
            judge = theirs.base_model.model.get_submodule(path)
            (
                judge.lora_A["default"].weight.copy_(layer.lora_A),
                judge.lora_B["default"].weight.copy_(layer.lora_B),
            )
    batch = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    mine, judged = (model(input_ids=batch, labels=batch) for model in (ours, theirs))
    torch.testing.assert_close(mine.logits, judged.logits, rtol=1e-4, atol=1e-5)
    mine.loss.backward(), judged.loss.backward()
    for path, layer in report.layers.items():
        judge = theirs.base_model.model.get_submodule(path)
        torch.testing.assert_close(
            layer.lora_A.grad, judge.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-6
        )
        torch.testing.assert_close(
            layer.lora_B.grad, judge.lora_B["default"].weight.grad, rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_runs_on_a_quantised_base_resume_and_evaluate(kind, family, files, tmp_path, call):
    files = dense_models(tmp_path / "models", files)
    flags = small(files, family, quantize=kind)
    assert call(*flags, "--output-dir", tmp_path / "whole")[0] == 0
    shorter = [2 if flags[i - 1] == "--rounds" else part for i, part in enumerate(flags)]
    assert call(*shorter, "--output-dir", tmp_path / "parts")[0] == 0
    assert call("--resume", "--output-dir", tmp_path / "parts", "--rounds", 4)[0] == 0
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")
    assert (
        tomllib.loads((tmp_path / "whole" / "config.toml").read_text())["system"]["quantize"]
        == kind
    )
    code, out, err = call(
        "--adapter",
        tmp_path / "whole" / "adapter",
        "--eval-file",
        files["eval"],
        "--json",
        command=evaluate_command.command,
    )
    assert (code, err) == (0, "") and json.loads(out) == pytest.approx(
        rows(tmp_path / "whole")[-1]["eval"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_is_quantised_already(kind, files, tmp_path, call, monkeypatch):
    saved_quantised(tmp_path, files, kind)
    flags = small(files, model=tmp_path / "small", rounds=2)
    assert call(*flags, "--output-dir", tmp_path / "run")[0] == 0
    code, _, err = call(*flags, "--quantize", "nf4", "--output-dir", tmp_path / "new")
    assert (
        code == 2 and "is quantised already: leave --quantize out" in err and err.count("\n") == 1
    )
    monkeypatch.setattr(models, "has_bitsandbytes", lambda: False)
    code, _, err = call(*small(files, quantize="int8"), "--output-dir", tmp_path / "new")
    assert (
        code == 2
        and "--quantize int8 needs the package `bitsandbytes`" in err
        and not (tmp_path / "new").exists()
    )
    path = tmp_path / "small" / "config.json"
    stored = json.loads(path.read_text())
    path.write_text(
        json.dumps(stored | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    code, _, err = call(*flags, "--output-dir", tmp_path / "new")
    assert code == 2 and "is quantised by gptq" in err and err.count("\n") == 1


@pytest.mark.parametrize("library", [True, False], ids=["bitsandbytes", "our reader"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_quantised_checkpoint_is_exported_merged(
    kind, library, files, tmp_path, call, monkeypatch
):
    saved_quantised(tmp_path, files, kind)
    monkeypatch.setattr(models, "has_bitsandbytes", lambda: library)
    assert (
        call(*small(files, model=tmp_path / "small", rounds=2), "--output-dir", tmp_path / "run")[0]
        == 0
    )
    code, _, err = call(
        "--adapter",
        tmp_path / "run" / "adapter",
        "--to",
        "merged",
        "--dequantize",
        "--output-dir",
        tmp_path / "merged",
        command=export_command.command,
    )
    assert (code, err) == (0, "")
    dense = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert not hasattr(dense.config, "quantization_config") and not any(
        kind_of(m) for m in dense.modules()
    )
    tuned = read(tmp_path / "small", labels=list(dense.config.id2label.values())).model
    load_adapter(tuned, tmp_path / "run" / "adapter")
    ids = torch.randint(0, 100, (1, 9), generator=torch.Generator().manual_seed(0))
    tuned.train()  # bitsandbytes in evaluation computes in bf16
    close = (
        dict(rtol=1e-4, atol=1e-5) if kind == "nf4" or not library else dict(rtol=0.05, atol=0.02)
    )
    torch.testing.assert_close(dense(input_ids=ids).logits, tuned(input_ids=ids).logits, **close)


@pytest.mark.parametrize("kind, size", [("none", 4), ("nf4", 0.5 + 1 / 64 + 1 / 4096), ("int8", 1)])
def test_the_planned_memory_is_what_the_loaded_base_takes(kind, size, files, tmp_path):
    folder = dense_models(tmp_path / "models", files)["llama"]
    config, tokenizer = (
        hf.AutoConfig.from_pretrained(folder),
        hf.AutoTokenizer.from_pretrained(folder),
    )
    options = dict(labels=None, dtype=torch.float32, seed=0)
    planned = architecture.weight_bytes(
        models.sketch(str(folder), config, tokenizer, **options).model, kind
    )
    loaded = models.load_model(
        str(folder),
        config,
        tokenizer,
        device=torch.device("cpu"),
        attn="sdpa",
        quantize=kind,
        **options,
    ).model
    linears = 3 * (4 * 64 * 64 + 3 * 64 * 128)
    others = sum(p.numel() for p in loaded.parameters() if p.dtype == torch.float32) - (
        linears if kind == "none" else 0
    )
    scales = 4 * 3 * (4 * 64 + 2 * 128 + 64) if kind == "int8" else 0
    assert planned == pytest.approx(linears * size + scales + 4 * others, rel=1e-3)
    assert planned == pytest.approx(architecture.weight_bytes(loaded, kind), rel=0.08)
    assert attach(loaded, LoRAConfig(rank=2)).frozen_parameters == linears + others


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_made_of_the_weights_is_not_made_again_of_a_quantised_base(kind, files, tmp_path):
    model = saved_quantised(tmp_path, files, kind)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="olora")
    dense = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense" / "llama")
    peft.get_peft_model(dense, config).save_pretrained(tmp_path / "raw")
    with pytest.raises(ValueError, match=r"'olora' cannot be made again .*quantised"):
        load_adapter(model, tmp_path / "raw")
    assert not [m for m in model.modules() if isinstance(m, RoLoRALinear)]
