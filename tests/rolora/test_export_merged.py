"""Merged models: transformers loads them, and they compute what PEFT makes of the adapter; a folder is whole or not there."""

import json
import signal
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from huggingface_hub import metadata_load
from safetensors import safe_open

from rolora import export
from tests.rolora.commands import small

ROOT = Path(__file__).parent.parent.parent
TEXT = {"prompt-column": "prompt", "response-column": "response"}


def merge(call, adapter, folder, *more):
    args = ("--adapter", adapter, "--to", "merged", "--output-dir", folder, *more)
    return call(*args, command=export.command)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 25).view(2, 10)).logits.float()


def by_peft(base, adapter):
    return logits(
        peft.PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(base), adapter)
    )


@pytest.fixture(scope="module")
def tied(files, tmp_path_factory):
    """A base in bf16 whose output layer is its embedding, with a card, and settings of generation."""
    folder = tmp_path_factory.mktemp("tied") / "base"
    words = hf.AutoTokenizer.from_pretrained(files["llama"])
    words.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=len(words), tie_word_embeddings=True, **size)
    )
    model.generation_config.update(do_sample=True, temperature=0.3, max_new_tokens=7)
    model.to(torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: llama3.2\n---\n# A base\n")
    return folder


@pytest.mark.parametrize("method", ["rolora", "flora", "fedex"])
def test_all_that_was_trained_is_merged_in_shards(method, files, tied, tmp_path, call):
    """flora and fedex change the base too, by a term that travels in the adapter's ranks."""
    options = {
        "model": tied,
        "method": method,
        "dtype": "fp32",
        "lr": 0.05,
        "output-dir": tmp_path / "run",
    }
    assert call(*small(files, rounds=2, **TEXT, **options))[0] == 0
    adapter = tmp_path / "run" / "adapter"
    chosen = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    (adapter / "chat_template.jinja").write_text(chosen)
    code, out, err = merge(
        call, adapter, tmp_path / "m", "--max-shard-size", "20KB", "--dtype", "fp32"
    )
    assert (code, err) == (0, "") and "merged in fp32" in out
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2 and shards == {
        path.name for path in (tmp_path / "m").glob("*.safetensors")
    }
    stored = set()
    for name in shards:
        with safe_open(tmp_path / "m" / name, "pt") as file:
            stored |= set(file.keys())
    assert not {key for key in stored if "lora" in key or "lm_head" in key}
    served = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert served.lm_head.weight is served.model.embed_tokens.weight
    assert (
        served.generation_config.temperature == 0.3 and served.generation_config.max_new_tokens == 7
    )
    base = hf.AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    expected = logits(peft.PeftModel.from_pretrained(base, adapter))
    assert (
        expected - logits(hf.AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32))
    ).norm() > 1e-2
    torch.testing.assert_close(logits(served), expected, rtol=1e-4, atol=1e-5)
    shown = hf.AutoTokenizer.from_pretrained(tmp_path / "m").apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False
    )
    assert shown == "<x>"


def test_it_is_written_in_the_dtype_of_the_base_and_says_its_licence(files, tied, tmp_path, call):
    options = {"model": tied, "output-dir": tmp_path / "run"}
    assert call(*small(files, rounds=1, **TEXT, **options))[0] == 0
    code, out, _ = merge(call, tmp_path / "run" / "adapter", tmp_path / "m")
    assert code == 0 and "merged in bf16" in out
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}
    said = metadata_load(tmp_path / "m" / "README.md")
    assert said["license"] == "llama3.2" and said["library_name"] == "transformers"
    assert "base_model" not in said  # the hub knows no folder of this machine


def test_what_peft_wrote_is_merged_under_the_licence_of_the_base(tied, tmp_path, call):
    base = hf.AutoModelForCausalLM.from_pretrained(tied)
    asked = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, asked).save_pretrained(tmp_path / "theirs")
    assert merge(call, tmp_path / "theirs", tmp_path / "m")[0] == 0
    assert metadata_load(tmp_path / "m" / "README.md")["license"] == "llama3.2"


def test_a_quantised_base_is_asked_for(files, tmp_path, call):
    pytest.importorskip("bitsandbytes")
    options = {"quantize": "int8", "output-dir": tmp_path / "run"}
    assert call(*small(files, rounds=1, **TEXT, **options))[0] == 0
    adapter = tmp_path / "run" / "adapter"
    code, out, _ = merge(call, adapter, tmp_path / "dense")
    assert code == 0 and "trained on a base in int8" in out and "--quantize int8 merges into" in out
    code, _, err = merge(call, adapter, tmp_path / "m", "--dequantize")
    assert code == 2 and "are not quantised: leave it out" in err
    model = hf.AutoModelForCausalLM.from_pretrained(
        files["llama"], quantization_config=hf.BitsAndBytesConfig(load_in_8bit=True)
    )
    model.save_pretrained(tmp_path / "packed")
    hf.AutoTokenizer.from_pretrained(files["llama"]).save_pretrained(tmp_path / "packed")
    given = ("--model", tmp_path / "packed")
    code, _, err = merge(call, adapter, tmp_path / "m", *given)
    assert code == 2 and "add --dequantize" in err and err.count("\n") == 1
    assert merge(call, adapter, tmp_path / "m", *given, "--dequantize")[0] == 0
    served = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert all(p.is_floating_point() for p in served.parameters())
    packed = peft.PeftModel.from_pretrained(
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), adapter
    )
    expected = logits(packed)
    assert (logits(served) - expected).norm() < 0.02 * expected.norm()


KILLED = """
import sys, os, signal
import safetensors.torch
from rolora import cli, export
import transformers.modeling_utils as modeling
whole, left = modeling.safe_save_file, [2]
def part(tensors, path, *args, **kwargs):
    left[0] -= 1
    if not left[0]:
        {end}
    whole(tensors, path, *args, **kwargs)
modeling.safe_save_file = part
sys.argv[1:] = {args}
cli.run(export.command)
"""


@pytest.mark.parametrize(
    "end, code",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("raise OSError(28, 'No space left on device', path)", 2),
        ("raise safetensors.SafetensorError('I/O error: No space left on device')", 2),
        ("raise KeyboardInterrupt", 130),
    ],
)
def test_half_a_folder_is_none(end, code, files, tmp_path, call, python):
    assert call(*small(files, rounds=1, **TEXT, **{"output-dir": tmp_path / "run"}))[0] == 0
    args = ["--adapter", str(tmp_path / "run" / "adapter"), "--to", "merged"]
    args += ["--output-dir", str(tmp_path / "m"), "--max-shard-size", "20KB"]
    program = KILLED.format(end=end, args=args)
    ended, _, err = python.run("-c", program)
    assert ended == code and not (tmp_path / "m").exists(), err
    if code == 2:
        assert err.count("\n") == 1 and "nothing is left of it; make room" in err
    assert call(*args, command=export.command)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run", "m"}
    logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m"))


@pytest.mark.parametrize(
    "args, expected",
    [
        (("--max-shard-size", "huge"), "--max-shard-size 'huge': expected a size such as"),
        (("--bake",), "--bake says nothing to --to merged: it goes with peft, vllm, hub"),
        (("--private",), "--private says nothing to --to merged"),
        (("--dtype", "fp8"), "--dtype 'fp8' is not one of"),
    ],
)
def test_bad_input(args, expected, tmp_path, call):
    code, _, err = merge(call, "nowhere", tmp_path / "m", *args)
    assert code == 2 and expected in err and err.count("\n") == 1
