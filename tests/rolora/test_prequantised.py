"""Checkpoints in 4 and 8 bits read without bitsandbytes; bitsandbytes' own model is the judge."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers as hf
from torch import nn

from rolora import LoRAConfig, attach, detach, merge, unmerge
from rolora.adapter.quantised import SavedLinear
from rolora.hf import models, precision, prequantised
from tests.quantised import KINDS, read, saved_quantised
from tests.rolora.commands import rows, small

WITHOUT = """
import sys
from importlib import abc
class Block(abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] == "bitsandbytes" else real(name, *rest)
from rolora import cli, train
cli.run(train.command)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_checkpoint_trains_without_the_library(kind, files, tmp_path, call):
    saved_quantised(tmp_path, files, kind)
    flags = [str(a) for a in small(files, model=tmp_path / "small", rounds=2)]
    assert call(*flags, "--output-dir", tmp_path / "with")[0] == 0
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *flags, "--output-dir", str(tmp_path / "without")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"base in {kind} (read without bitsandbytes)" in done.stdout
    near = 1e-2 if kind == "int8" else 1e-4  # there theirs quantises X too
    one = 1.5 / len(files["eval"].read_text().splitlines()) if kind == "int8" else 1e-6
    for mine, theirs in zip(rows(tmp_path / "without"), rows(tmp_path / "with"), strict=True):
        assert mine["eval"]["loss"] == pytest.approx(theirs["eval"]["loss"], rel=near)
        assert mine["eval"]["accuracy"] == pytest.approx(theirs["eval"]["accuracy"], abs=one)
        if mine["round"]:
            assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=near)


@pytest.fixture
def own_reader(monkeypatch):
    monkeypatch.setattr(models, "has_bitsandbytes", lambda: False)


@pytest.mark.parametrize("kind", KINDS)
def test_our_reader_gives_bitsandbytes_own_model(kind, files, tmp_path, own_reader, monkeypatch):
    theirs = saved_quantised(
        tmp_path, files, kind
    ).train()  # in evaluation its CPU kernels compute in bf16
    stand_ins = []
    replace = nn.Module.set_submodule
    monkeypatch.setattr(
        nn.Module,
        "set_submodule",
        lambda self, path, module: (
            stand_ins.append(self.get_submodule(path).weight.untyped_storage().nbytes()),
            replace(self, path, module),
        ),
    )
    ours = read(tmp_path / "small").model
    assert len(stand_ins) == 3 * 7 and max(stand_ins) <= 8, "no dense weight was ever made"
    ids = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    embeds = [m.get_input_embeddings()(ids).detach().requires_grad_() for m in (ours, theirs)]
    logits = [m(inputs_embeds=e).logits for m, e in zip((ours, theirs), embeds, strict=True)]
    close = dict(rtol=1e-5, atol=1e-6) if kind == "nf4" else dict(rtol=0.05, atol=0.02)
    torch.testing.assert_close(*logits, **close)
    for out in logits:
        out.square().mean().backward()
    torch.testing.assert_close(
        embeds[0].grad, embeds[1].grad, rtol=close["rtol"], atol=close["atol"]
    )
    wanted = theirs.state_dict()
    assert set(ours.state_dict()) == set(wanted) and all(
        torch.equal(ours.state_dict()[k], v) for k, v in wanted.items()
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours.model.layers[0].mlp.gate_proj(torch.randn(4, 64, requires_grad=True))
    assert not [t for t in kept if t.numel() >= 64 * 128]


@pytest.mark.parametrize("kind", KINDS)
def test_our_readers_model_is_copied_saved_merged_and_classifies(kind, files, tmp_path, own_reader):
    saved_quantised(tmp_path, files, kind)
    model = read(tmp_path / "small").model
    ids = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(input_ids=ids).logits
        assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, out)
        model.save_pretrained(tmp_path / "again")
        hf.AutoTokenizer.from_pretrained(tmp_path / "small").save_pretrained(tmp_path / "again")
        assert torch.equal(read(tmp_path / "again").model(input_ids=ids).logits, out)
        back = hf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "again", device_map="cpu", dtype=torch.float32
        ).train()
        torch.testing.assert_close(
            back(input_ids=ids).logits, out, rtol=0.05, atol=1e-5 if kind == "nf4" else 0.02
        )
        attach(model, LoRAConfig(rank=4, target_modules="all-linear"), seed=0)
        assert torch.equal(model(input_ids=ids).logits, out)
        nn.init.normal_(model.model.layers[1].mlp.up_proj.lora_B, std=0.1)
        apart = model(input_ids=ids).logits
        assert max(merge(model).values()) < 1e-6
        torch.testing.assert_close(model(input_ids=ids).logits, apart, rtol=1e-4, atol=1e-5)
        unmerge(model)
        assert torch.equal(model(input_ids=ids).logits, apart)
        assert torch.equal(detach(model)(input_ids=ids).logits, out)
        precision.make_dense(model, torch.float32)
        torch.testing.assert_close(model(input_ids=ids).logits, out, rtol=1e-4, atol=1e-5)
    labelled = read(tmp_path / "small", labels=["no", "yes"])
    assert labelled.new_heads == ["score"] and labelled.model.score.weight.shape == (2, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_our_reader_turns_gpt2_s_linears(kind, tmp_path):
    """Its Conv1D holds `[in, out]`, what bitsandbytes saves of it `[out, in]`."""
    config = hf.GPT2Config(
        vocab_size=100,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=32,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "dense")
    asked = hf.BitsAndBytesConfig(
        load_in_4bit=kind == "nf4",
        load_in_8bit=kind == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )  # without double quantisation
    theirs = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=asked, dtype=torch.float32, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "small")
    ours, info = prequantised.load(
        hf.AutoModelForCausalLM,
        str(tmp_path / "small"),
        hf.AutoConfig.from_pretrained(tmp_path / "small"),
        revision=None,
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(info.values()) and isinstance(ours.transformer.h[0].attn.c_attn, SavedLinear)
    ids = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = [m.train()(input_ids=ids).logits for m in (ours, theirs)]
    torch.testing.assert_close(
        *logits, **(dict(rtol=1e-5, atol=1e-6) if kind == "nf4" else dict(rtol=0.05, atol=0.02))
    )
    attach(ours, LoRAConfig(rank=2), seed=0)
    assert torch.equal(ours(input_ids=ids).logits, logits[0])


def test_our_reader_leaves_the_head_of_another_task(tmp_path):
    """A masked language model's head is quantised too (lm_head.dense); a classifier takes the body and draws its own head."""
    config = hf.RobertaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    hf.RobertaForMaskedLM(config).save_pretrained(tmp_path / "dense")
    asked = hf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    hf.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "dense", quantization_config=asked, device_map="cpu"
    ).save_pretrained(tmp_path / "small")
    assert (
        b"lm_head.dense.weight.quant_state"
        in (tmp_path / "small" / "model.safetensors").read_bytes()
    )
    ours, info = prequantised.load(
        hf.AutoModelForSequenceClassification,
        str(tmp_path / "small"),
        hf.AutoConfig.from_pretrained(tmp_path / "small"),
        revision=None,
        dtype=torch.float32,
        num_labels=3,
        output_loading_info=True,
    )
    assert all(
        key.startswith("classifier.") for key in info["missing_keys"]
    ) and ours.classifier.out_proj.weight.shape == (3, 64)
    assert isinstance(ours.roberta.encoder.layer[1].output.dense, SavedLinear)
    assert torch.isfinite(ours(input_ids=torch.ones(1, 5, dtype=int)).logits).all()


def test_a_damaged_quantised_checkpoint_is_one_line(files, tmp_path, own_reader, call):
    from safetensors.torch import load_file, save_file

    saved_quantised(tmp_path, files, "nf4")
    path = tmp_path / "small" / "model.safetensors"
    whole, name = load_file(path), "model.layers.1.mlp.up_proj"
    other = {k.replace(name, "model.layers.1.mlp.sideways_proj"): v for k, v in whole.items()}
    for damaged, wanted in (
        (
            {k: v for k, v in whole.items() if k != f"{name}.weight.absmax"},
            f"{name} lacks weight.absmax",
        ),
        ({k: v for k, v in whole.items() if k != f"{name}.weight"}, f"{name} lacks its weight"),
        (
            other,
            "quantised model.layers.1.mlp.sideways_proj is no linear of a LlamaForSequenceClassification",
        ),
        (whole | {f"{name}.weight": whole[f"{name}.weight"][:-4].clone()}, f"{name}"),
    ):
        save_file(damaged, path, {"format": "pt"})
        code, _, err = call(
            *small(files, model=tmp_path / "small"), "--output-dir", tmp_path / "new"
        )
        assert (
            code == 2 and wanted in err and err.count("\n") == 1 and not (tmp_path / "new").exists()
        ), (wanted, err)
