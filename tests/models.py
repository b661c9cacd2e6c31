"""Small Hugging Face models made from their configurations, and tokenizers trained on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

_COMMON = dict(
    vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
)
CAUSAL = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_COMMON, num_key_value_heads=2)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_COMMON, num_key_value_heads=2)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_COMMON, num_key_value_heads=2)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=120,
            n_embd=32,
            n_layer=3,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ),
}
ENCODERS = {
    "roberta": lambda: hf.RobertaForSequenceClassification(
        hf.RobertaConfig(**_COMMON, num_labels=3, max_position_embeddings=66)
    ),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_COMMON, num_labels=3)),
}
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"],
    "mistral": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "roberta": ["query", "value"],
    "bert": ["query", "key", "value"],
}


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """A small model of family `name`, the same for the same seed, in eval mode."""
    torch.manual_seed(seed)
    return (CAUSAL | ENCODERS)[name]().eval()


def inputs(name: str, batch: int = 3, length: int = 12) -> dict:
    """A batch with labels for `build(name)`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 115, (batch, length), generator=generator)
    labels = ids if name in CAUSAL else torch.randint(0, 3, (batch,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def tokenizer(
    texts: list[str], kind: str = "llama", vocabulary: int = 400
) -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE trained on `texts`: Llama's has no pad token, RoBERTa's has <s>, </s>,
    <pad>, <mask>.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"] if kind == "llama" else ["<s>", "<pad>", "</s>", "<mask>"]
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    end = raw.token_to_id("</s>")
    if kind == "llama":
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
        return hf.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", end)],
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        mask_token="<mask>",
    )


PLACES = {
    "sea": ["ship", "wave", "harbour", "sailor", "tide"],
    "hill": ["goat", "stone", "path", "summit", "snow"],
    "town": ["street", "market", "baker", "tram", "clock"],
}


def sentences(count, seed):
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        label = rng.choice(sorted(PLACES))
        words = [
            rng.choice(PLACES[label]),
            rng.choice(PLACES[label]),
            rng.choice(["old", "new", "far", "near"]),
        ]
        rows.append(
            {
                "text": f"the {words[2]} {words[0]} and the {words[1]} are here",
                "label": label,
                "owner": f"u{number % 4}",
                "prompt": f"Where is the {words[0]}?",
                "response": f" in the {label}",
                "choices": ["the sea", "the hill", "the town"],
                "answer": ["sea", "hill", "town"].index(label),
            }
        )
    return rows


def conversation(row: dict) -> dict:
    """A sentence's question and answer as messages."""
    turns = (("user", row["prompt"]), ("assistant", row["response"].strip()))
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"messages": messages, "owner": row["owner"]}


def preference(row: dict) -> dict:
    """A sentence's answer, preferred to another place."""
    wrong = next(place for place in sorted(PLACES) if place not in row["response"])
    return {"prompt": row["prompt"], "chosen": row["response"], "rejected": f" in the {wrong}"}


def make_files(root: Path) -> dict[str, Path]:
    """{"train", "eval", "chat", "pairs": JSONL files, "llama", "roberta": small folders with
    tokenizers of their own, "root"}.
    """
    train, held = sentences(160, 0), sentences(60, 1)
    written = {
        "train": train,
        "eval": held,
        "chat": [conversation(row) for row in train],
        "pairs": [preference(row) for row in train],
    }
    for name, rows in written.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [f"{r['text']} {r['prompt']}{r['response']}" for r in train]
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    for name in ("llama", "roberta"):
        words = tokenizer(texts, name)
        torch.manual_seed(0)
        if name == "llama":
            model = hf.LlamaForCausalLM(
                hf.LlamaConfig(vocab_size=len(words), max_position_embeddings=128, **size)
            )
        else:
            model = hf.RobertaForMaskedLM(
                hf.RobertaConfig(
                    vocab_size=len(words),
                    max_position_embeddings=66,
                    pad_token_id=1,
                    bos_token_id=0,
                    eos_token_id=2,
                    **size,
                )
            )
        model.save_pretrained(root / name)
        words.save_pretrained(root / name)
    return {
        "train": root / "train.jsonl",
        "eval": root / "eval.jsonl",
        "chat": root / "chat.jsonl",
        "pairs": root / "pairs.jsonl",
        "llama": root / "llama",
        "roberta": root / "roberta",
        "root": root,
    }
