"""Hugging Face's Trainer on a small attached model."""

import torch
import transformers as hf

from rolora import LoRAConfig, attach
from rolora.adapter.model import adapted_layers


def rows(count=32, length=12):
    ids = torch.randint(5, 100, (count, length), generator=torch.Generator().manual_seed(0))
    return [
        {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids
    ]


def model(files, seed=0):
    made = hf.AutoModelForCausalLM.from_pretrained(files["llama"])
    attach(
        made, LoRAConfig(rank=4, alpha=8, target_modules=["q_proj", "k_proj", "v_proj"]), seed=seed
    )
    return made


def trainer(made, folder, steps=6, callbacks=(), **options):
    args = hf.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
        data_seed=0,
        **options,
    )
    return hf.Trainer(model=made, args=args, train_dataset=rows(), callbacks=list(callbacks))


def factors(made):
    return {
        f"{name}.{kind}": getattr(layer, f"lora_{kind}").detach().clone()
        for name, layer in adapted_layers(made)
        for kind in "AB"
    }


def stopped(made, folder, at=3, **options):
    """A run of six steps that was cut after `at`, with a checkpoint there."""

    class Stop(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == at

    run = trainer(made, folder, **options)
    run.args.save_strategy, run.args.save_steps = hf.trainer_utils.SaveStrategy.STEPS, at
    run.add_callback(Stop())
    run.train()
    return folder / f"checkpoint-{at}"


def moved(before, after):
    return {key.rpartition(".")[2] for key in before if not torch.equal(before[key], after[key])}
