"""Quantised frozen bases: bitsandbytes and PEFT judge what is computed, nothing dense is kept, and
its modules come back as they were.
"""

import copy
import gc
import json
import sys
import tomllib

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers as hf
from torch import nn

from rolora import LoRAConfig, attach, detach, load_adapter, merge, set_phase, unmerge
from rolora import evaluate as evaluate_command
from rolora import export as export_command
from rolora.adapter.layer import RoLoRALinear
from rolora.adapter.quantised import kind_of
from rolora.hf import architecture, models
from tests.rolora.commands import bits, rows, small

KINDS = ("nf4", "int8")


def quantised(kind, out_features=128, in_features=64, bias=True, seed=0):
    """(bitsandbytes' module, its weight dense as bitsandbytes gives it)."""
    torch.manual_seed(seed)
    dense = nn.Linear(in_features, out_features, bias=bias)
    if kind == "nf4":
        made = bnb.nn.Linear4bit(
            in_features, out_features, bias=bias, compute_dtype=torch.float32, quant_type="nf4"
        )
        made.load_state_dict(dense.state_dict())
        made = made.to("cpu")
        if getattr(made.weight, "quant_state", None) is None:
            made.weight = made.weight._quantize("cpu")
        return made, bnb.functional.dequantize_4bit(
            made.weight.data, made.weight.quant_state
        ).float()
    made = bnb.nn.Linear8bitLt(in_features, out_features, bias=bias, has_fp16_weights=False)
    made.load_state_dict(dense.state_dict())
    made = made.to("cpu")
    if made.weight.dtype != torch.int8:
        made.weight = made.weight._quantize("cpu")
    return made, made.weight.data.float() * made.weight.SCB[:, None] / 127


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", ["A", "B", "BOTH"])
def test_outputs_and_gradients_are_those_of_the_dequantised_matmul(kind, phase):
    linear, dense = quantised(kind)
    layer = RoLoRALinear.from_linear(linear, rank=4, alpha=8)
    nn.init.normal_(layer.lora_B)
    layer.set_phase(phase)
    x = torch.randn(6, 64, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    truth = [t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    wanted = (
        truth[0] @ dense.double().t()
        + linear.bias.double()
        + layer.scaling * (truth[0] @ truth[1].t()) @ truth[2].t()
    )
    wanted.square().sum().backward()
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-4)
    for mine, theirs, trains in (
        (x, truth[0], True),
        (layer.lora_A, truth[1], phase in ("A", "BOTH")),
        (layer.lora_B, truth[2], phase in ("B", "BOTH")),
    ):
        if trains:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-3)
        else:
            assert mine.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_no_dense_copy_is_kept(kind):
    layer = RoLoRALinear.from_linear(quantised(kind, 256, 256)[0], rank=4)
    layer.set_phase("A")
    gc.collect()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(torch.randn(8, 256, requires_grad=True))
    assert max(t.untyped_storage().nbytes() for t in kept) <= 8 * 256 * 4
    alive = [
        t
        for t in gc.get_objects()
        if isinstance(t, torch.Tensor) and t.is_floating_point() and tuple(t.shape) == (256, 256)
    ]
    assert not alive, "neither in the graph nor in the layer"
    y.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_deepcopy_and_detach_leave_bitsandbytes_module_as_it_was(kind):
    linear, _ = quantised(kind)
    model = nn.Sequential(linear)
    before, x = {k: v.clone() for k, v in model.state_dict().items()}, torch.randn(5, 64)
    out = model(x)
    attach(model, LoRAConfig(rank=4, target_modules=["0"]))
    kept = {k: v for k, v in model.state_dict().items() if "lora_" not in k}
    assert set(kept) == set(before) and all(torch.equal(kept[k], before[k]) for k in before)
    nn.init.normal_(model[0].lora_B)
    copied = copy.deepcopy(model)
    assert (
        torch.equal(copied(x), model(x))
        and copied[0].weight.data_ptr() != model[0].weight.data_ptr()
    )
    detach(model)
    assert type(model[0]) is type(linear) and torch.equal(model(x), out)
    assert set(model.state_dict()) == set(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [False, True], ids=["dense", "quantised again"])
def test_merging_says_what_it_loses(kind, again):
    linear, dense = quantised(kind)
    model = nn.Sequential(linear)
    attach(model, LoRAConfig(rank=4, alpha=8, target_modules=["0"]))
    layer = model[0]
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(5, 64)
    apart, exact, packed = model(x), dense + layer.delta(), layer.weight.data.clone()
    lost = merge(model, requantise=again)["0"]
    if again and kind == "nf4":
        stored = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    else:
        stored = layer.weight.float() * layer.SCB[:, None] / 127 if again else layer.weight.float()
    wanted = ((stored - exact).norm() / layer.delta().norm()).item()
    assert lost == pytest.approx(wanted, rel=1e-3, abs=1e-6) and (
        lost < 1e-6 if not again else 1e-3 < lost < 1
    )
    assert layer.weight.is_floating_point() != again
    torch.testing.assert_close(model(x), x @ stored.t() + linear.bias, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert torch.equal(layer.weight.data, packed) and torch.equal(model(x), apart)
    detach(model, merge=True, requantise=again)
    assert isinstance(model[0], type(linear)) if again else type(model[0]) is nn.Linear
    torch.testing.assert_close(
        model(x), x @ stored.t() + linear.bias, rtol=0.05, atol=0.05 if again else 1e-4
    )


def test_a_merge_that_cannot_quantise_again_changes_nothing(monkeypatch):
    layer = RoLoRALinear.from_linear(quantised("nf4")[0], rank=4)
    nn.init.normal_(layer.lora_B)
    x, packed = torch.randn(5, 64), layer.weight.data.clone()
    before = layer(x)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RuntimeError, match="needs the package `bitsandbytes`"):
        layer.merge(requantise=True)
    assert not layer.merged and torch.equal(layer.weight.data, packed)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_merge_keeps_moves_with_the_layer(kind):
    layer = RoLoRALinear.from_linear(quantised(kind)[0], rank=4)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 64)
    before, kept = layer(x), layer.held
    layer.merge()
    seen = []
    layer._apply(lambda tensor: seen.append(id(tensor)) or tensor.clone())
    assert id(kept.weight) in seen and (kind == "nf4" or id(kept.scale) in seen)
    layer.unmerge()
    assert torch.equal(layer(x), before)


def test_a_weight_that_is_not_quantised_yet_is_refused():
    for made in (bnb.nn.Linear4bit(64, 64), bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)):
        with pytest.raises(TypeError, match="not quantised yet"):
            RoLoRALinear.from_linear(made, rank=4)


def dense_models(folder, files):
    """Folders of a Llama and a RoBERTa whose widths fill blocks of 64, with the tokenizers of the
    small ones.
    """
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
    made = {}
    for family, cls, config in (
        ("llama", hf.LlamaForCausalLM, hf.LlamaConfig),
        ("roberta", hf.RobertaForMaskedLM, hf.RobertaConfig),
    ):
        tokenizer, made[family] = hf.AutoTokenizer.from_pretrained(files[family]), folder / family
        more = (
            {"pad_token_id": 1, "max_position_embeddings": 66}
            if family == "roberta"
            else {"max_position_embeddings": 128}
        )
        torch.manual_seed(0)
        cls(config(vocab_size=len(tokenizer), **sizes, **more)).save_pretrained(made[family])
        tokenizer.save_pretrained(made[family])
    return {**files, **made}


def saved_quantised(folder, files, kind):
    """A folder with a Llama that is quantised already; the model in memory too."""
    asked = hf.BitsAndBytesConfig(
        load_in_4bit=kind == "nf4",
        load_in_8bit=kind == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    dense = dense_models(folder / "dense", files)["llama"]
    model = hf.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=asked, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(folder / "small")
    hf.AutoTokenizer.from_pretrained(dense).save_pretrained(folder / "small")
    return model


def read(folder, labels=None, dtype=torch.float32):
    config = hf.AutoConfig.from_pretrained(folder)
    return models.load_model(
        str(folder),
        config,
        hf.AutoTokenizer.from_pretrained(folder),
        labels=labels,
        dtype=dtype,
        device=torch.device("cpu"),
        attn="sdpa",
        seed=0,
    )


def test_a_weight_that_a_forward_on_the_cpu_has_rearranged_is_read_as_it_was():
    linear, dense = quantised("nf4", 128, 128)
    with torch.no_grad():
        linear.eval()(torch.randn(4, 128))
    layer = RoLoRALinear.from_linear(linear, rank=4)
    # bitsandbytes rounds the scales to bf16 on the way, and cannot undo that
    torch.testing.assert_close(
        layer.oriented_weight().dequantise(torch.float32), dense, rtol=2**-8, atol=0
    )


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
