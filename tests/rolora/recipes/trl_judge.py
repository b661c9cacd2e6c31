"""What TRL's trainer makes of rows, and our examples told in its way."""

import transformers as hf
import trl
from datasets import Dataset


def labels(example):
    """Token ids, -100 where there is no loss, as TRL has them."""
    found = [-100] * len(example.ids)
    for start, end in example.spans:
        found[start:end] = example.ids[start:end]
    return found


def trl_examples(words, rows, tmp_path, **options):
    """What TRL's SFTTrainer makes of the rows: (ids, labels) each."""
    size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=len(words), **size))
    options = dict(max_length=256, report_to=[], use_cpu=True, bf16=False) | options
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(tmp_path), **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=words,
    )
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]
