"""Small model folders with real tokenizers, and data files, made once a session."""

import json
import random

import pytest
import torch
import transformers as hf

from tests.models import tokenizer

PLACES = {"sea": ["ship", "wave", "harbour", "sailor", "tide"], "hill": ["goat", "stone", "path", "summit", "snow"],
          "town": ["street", "market", "baker", "tram", "clock"]}


def sentences(count, seed):
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        label = rng.choice(sorted(PLACES))
        words = [rng.choice(PLACES[label]), rng.choice(PLACES[label]), rng.choice(["old", "new", "far", "near"])]
        rows.append({"text": f"the {words[2]} {words[0]} and the {words[1]} are here", "label": label, "owner": f"u{number % 4}",
                     "prompt": f"Where is the {words[0]}?", "response": f" in the {label}",
                     "choices": ["the sea", "the hill", "the town"], "answer": ["sea", "hill", "town"].index(label)})
    return rows


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """{"train", "eval": JSONL paths, "llama", "roberta", "encoder": model folders}."""
    root = tmp_path_factory.mktemp("shared")
    train, held = sentences(160, 0), sentences(60, 1)
    for name, rows in (("train", train), ("eval", held)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [f"{r['text']} {r['prompt']}{r['response']}" for r in train]
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    for name in ("llama", "roberta"):
        words = tokenizer(texts, name)
        torch.manual_seed(0)
        if name == "llama":
            model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=len(words), max_position_embeddings=128, **size))
        else:
            model = hf.RobertaForMaskedLM(hf.RobertaConfig(
                vocab_size=len(words), max_position_embeddings=66, pad_token_id=1, bos_token_id=0, eos_token_id=2, **size))
        model.save_pretrained(root / name)
        words.save_pretrained(root / name)
    return {"train": root / "train.jsonl", "eval": root / "eval.jsonl", "llama": root / "llama", "roberta": root / "roberta",
            "root": root}
