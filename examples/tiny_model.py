"""A tiny Llama with random weights, and a tokenizer of its own, for the examples beside.

    python examples/tiny_model.py FOLDER FILE.jsonl [--experts 4]

Prints the folder, which `--model` takes. With --experts it is a mixture, as Qwen3's are.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def make(folder: Path, texts: list[str], experts: int = 0) -> None:
    """Writes model and tokenizer; the words are those of the texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(0)
    size = dict(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    config = transformers.LlamaConfig(**size)
    if experts:
        routing = dict(num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=64)
        config = transformers.Qwen3MoeConfig(head_dim=16, num_key_value_heads=2, **routing, **size)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("folder", type=Path)
    flags.add_argument("file", type=Path)
    flags.add_argument("--experts", type=int, default=0)
    given = flags.parse_args()
    rows = given.file.read_text().splitlines()
    make(given.folder, [json.dumps(json.loads(row)) for row in rows], given.experts)
    print(f"a tiny model -> {given.folder}")
