"""Hugging Face's Trainer with factors that take turns, on the built-in model and text.

    python examples/hf_trainer.py [FOLDER]

Prints the loss before and after; the adapter in FOLDER (default: adapter) is in PEFT's files.
"""

import json
import sys

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from rolora import LoRAConfig, attach, builtin, save_adapter
from rolora.trainer import AlternatePhases

folder = sys.argv[1] if len(sys.argv) > 1 else "adapter"
tokenizer = AutoTokenizer.from_pretrained(builtin.MODEL)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
# Its weights are bf16, in which many CPUs are slow.
model = AutoModelForCausalLM.from_pretrained(builtin.MODEL, dtype="float32")
attach(model, LoRAConfig(rank=8, alpha=16, target_modules=["q_proj", "v_proj"]))

lines = (builtin.TEXT / "train.jsonl").read_text(encoding="utf-8").splitlines()[:256]
texts = [json.loads(line)["text"] for line in lines]
examples = [tokenizer(text, truncation=True, max_length=64) for text in texts]

trainer = Trainer(
    model,
    TrainingArguments(
        folder + "-checkpoints",
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    ),
    train_dataset=examples,
    eval_dataset=examples[:64],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[AlternatePhases(every=10)],
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
save_adapter(model, folder, base_model=str(builtin.MODEL), task_type="CAUSAL_LM")
print(f"loss {before:.3f} -> {after:.3f}; adapter in {folder}")
assert after < before
