"""The default command on small models of many families: each starts, trains and says what it adapts."""

import pytest
import torch
import transformers as hf

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
