"""The default command on small models of many families: each starts, trains and says what it adapts."""

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from rolora.hf import architecture, reading
from tests.rolora.commands import rows, small

SIZE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
DECODERS = {
    "gemma2": lambda v: hf.Gemma2Config(
        vocab_size=v, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, **SIZE
    ),
    "bloom": lambda v: hf.BloomConfig(vocab_size=v, hidden_size=32, n_layer=2, n_head=4),
    "gptj": lambda v: hf.GPTJConfig(
        vocab_size=v, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64
    ),
    "gpt-neo": lambda v: hf.GPTNeoConfig(
        vocab_size=v, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
    ),
    "mpt": lambda v: hf.MptConfig(
        vocab_size=v, d_model=32, n_heads=4, n_layers=2, max_seq_len=64
    ),
    "xglm": lambda v: hf.XGLMConfig(
        vocab_size=v, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4,
        max_position_embeddings=64,
    ),
}  # fmt: skip
ENCODERS = {
    "mpnet": lambda v: hf.MPNetConfig(vocab_size=v, max_position_embeddings=34, **SIZE),
    "deberta-v2": lambda v: hf.DebertaV2Config(
        vocab_size=v, max_position_embeddings=32, relative_attention=True,
        pos_att_type=["p2c", "c2p"], **SIZE,
    ),
    "xlm-roberta": lambda v: hf.XLMRobertaConfig(
        vocab_size=v, max_position_embeddings=34, pad_token_id=1, **SIZE
    ),
}  # fmt: skip


def saved(config, cls, files, family, folder):
    torch.manual_seed(0)
    words = reading.load_tokenizer(str(files[family]))
    made = cls.from_config(config(len(words)))
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def started(folder, files, run, call, **extra):
    flags = small(files, rounds=1, **{"output-dir": run}, **extra)
    flags[flags.index("--model") + 1] = folder
    code, out, err = call(*flags)
    assert code == 0, err
    assert len(rows(run)) == 2 and "linears" in out


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_start_with_the_defaults(family, files, tmp_path, call):
    folder = saved(DECODERS[family], hf.AutoModelForCausalLM, files, "llama", tmp_path / "m")
    columns = {"task-type": "causal-lm", "prompt-column": "prompt", "response-column": "response"}
    started(folder, files, tmp_path / "run", call, **columns)


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_start_with_all_their_positions(family, files, tmp_path, call):
    folder = saved(ENCODERS[family], hf.AutoModelForMaskedLM, files, "roberta", tmp_path / "m")
    assert architecture.positions(reading.read_config(str(folder))) == 32
    started(folder, files, tmp_path / "run", call, **{"max-length": 32})


UNREACHED = {
    "mamba": (
        lambda v: hf.MambaConfig(vocab_size=v, hidden_size=32, num_hidden_layers=2, state_size=4),
        "in_proj,out_proj,x_proj",
    ),
    "gpt2 with cross-attention": (
        lambda v: hf.GPT2Config(
            vocab_size=v, n_embd=32, n_layer=2, n_head=4, n_positions=64, add_cross_attention=True
        ),
        r"'.*(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", UNREACHED)
def test_linears_that_get_no_gradient_are_named_and_the_advice_works(family, files, tmp_path, call):
    config, advised = UNREACHED[family]
    folder = saved(config, hf.AutoModelForCausalLM, files, "llama", tmp_path / "m")
    columns = {"task-type": "causal-lm", "target-modules": "all-linear", "rank": 2}
    flags = small(files, **{"output-dir": tmp_path / "run"}, **columns)
    flags[flags.index("--model") + 1] = folder
    code, _, err = call(*flags)
    assert code == 2 and err.count("\n") == 1 and "no gradient reaches" in err and advised in err
    assert not (tmp_path / "run").exists()
    columns["target-modules"] = advised.strip("'")
    started(folder, files, tmp_path / "run", call, **columns)


@pytest.mark.parametrize("family", ["mpnet", "albert"])
def test_a_model_without_checkpointing_is_told(family, files, tmp_path, call):
    configs = ENCODERS | {
        "albert": lambda v: hf.AlbertConfig(vocab_size=v, embedding_size=16, **SIZE)
    }
    folder = saved(configs[family], hf.AutoModelForMaskedLM, files, "roberta", tmp_path / "m")
    asked = {"gradient-checkpointing": True, "output-dir": tmp_path / "run"}
    flags = small(files, family="roberta", **asked)
    flags[flags.index("--model") + 1] = folder
    code, _, err = call(*flags)
    assert code == 2 and err.count("\n") == 1 and "--gradient-checkpointing: " in err
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_classifier_is_told(files, tmp_path, call):
    config = UNREACHED["mamba"][0]
    folder = saved(config, hf.AutoModelForCausalLM, files, "llama", tmp_path / "m")
    flags = small(files, **{"output-dir": tmp_path / "run", "target-modules": "in_proj"})
    flags[flags.index("--model") + 1] = folder
    for more in ([], ["--dry-run"]):
        code, _, err = call(*flags, *more)
        assert code == 2 and err.count("\n") == 1 and "no sequence classifier for a mamba" in err


def test_linears_of_a_head_that_trains_are_not_adapted_as_well(files, tmp_path, call):
    config = lambda v: hf.DebertaConfig(vocab_size=v, max_position_embeddings=64, **SIZE)  # noqa: E731
    folder = saved(config, hf.AutoModelForMaskedLM, files, "roberta", tmp_path / "m")
    started(folder, files, tmp_path / "run", call, **{"target-modules": "all-linear"})


def test_no_limit_of_positions_may_be_said_by_minus_one():
    assert (
        architecture.positions(hf.XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=64)) is None
    )


def gemma3(v):
    """One that sees."""
    return hf.Gemma3Config(
        text_config=dict(vocab_size=v, num_key_value_heads=2, head_dim=8, **SIZE),
        vision_config=dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            image_size=28, patch_size=14,
        ),
        mm_tokens_per_image=4,
    )  # fmt: skip


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_of_a_model_that_sees_text_trains_the_language_model(targets, task, files, tmp_path, call):
    folder = saved(gemma3, hf.AutoModelForCausalLM, files, "llama", tmp_path / "m")
    columns = {"task-type": task, "target-modules": targets, "samples": 0}
    if task == "causal-lm":
        columns |= {"prompt-column": "prompt", "response-column": "response", "samples": 1}
    started(folder, files, tmp_path / "run", call, **columns)
    keys = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    factors = [key for key in keys if ".lora_" in key]
    assert factors and all(".language_model." in key for key in factors)
