"""A plain script with Hugging Face's Trainer on an attached model: every way it is commonly run, and the alternating callback."""

import json

import pytest
import torch
import transformers as hf
from torch import nn

from rolora import LoRAConfig, attach, detach, set_phase
from rolora.adapter.model import adapted_layers
from rolora.trainer import AlternatePhases
from tests.rolora.hf_trainer import factors, model, moved, rows, trainer
from tests.rolora.rank_jobs import ranks


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"torch_compile": True},
    ],
    ids=[
        "plain",
        "accumulated",
        "autocast",
        "checkpointing",
        "reentrant checkpointing",
        "compiled",
    ],
)
def test_the_trainer_trains_the_factors_and_nothing_else(options, files, tmp_path):
    made = model(files)
    base = {k: v.clone() for k, v in made.state_dict().items() if "lora_" not in k}
    if options.get("gradient_checkpointing_kwargs", {}).get("use_reentrant"):
        made.enable_input_require_grads()
    before = factors(made)
    if options.get("torch_compile"):
        options = options | {"torch_compile_backend": "eager"}
    losses = trainer(made, tmp_path, **options).train()
    assert moved(before, factors(made)) == {"A", "B"} and losses.training_loss > 0
    assert all(torch.equal(made.state_dict()[key], value) for key, value in base.items())


def test_checkpointing_and_accumulation_change_nothing(files, tmp_path):
    ends = []
    for name, options in {
        "plain": {},
        "checkpointed": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
    }.items():
        made = model(files)
        trainer(made, tmp_path / name, **options).train()
        ends.append(factors(made))
    for key in ends[0]:
        torch.testing.assert_close(ends[0][key], ends[1][key], rtol=1e-4, atol=1e-6)


def test_the_callback_alternates_and_the_frozen_factor_rests(files, tmp_path):
    made, seen = model(files), []

    class Watch(hf.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.before = factors(model)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append("".join(sorted(moved(self.before, factors(model)))))

    trainer(
        made, tmp_path, steps=8, weight_decay=0.5, callbacks=[AlternatePhases(every=2), Watch()]
    ).train()
    assert seen == ["B", "B", "A", "A", "B", "B", "A", "A"]
    assert all(layer.phase == "BOTH" for _, layer in adapted_layers(made))


def test_what_cannot_alternate_says_so(files, tmp_path):
    with pytest.raises(ValueError, match="attach"):
        trainer(
            hf.AutoModelForCausalLM.from_pretrained(files["llama"]),
            tmp_path,
            callbacks=[AlternatePhases()],
        ).train()
    made = model(files)
    set_phase(made, "B")
    with pytest.raises(ValueError, match="missing from the optimizer"):
        trainer(made, tmp_path, callbacks=[AlternatePhases()]).train()
    for wrong in (dict(every=0), dict(schedule="AC"), dict(schedule="")):
        with pytest.raises(ValueError, match="at least 1"):
            AlternatePhases(**wrong)


SCRIPT = """
import json, os, sys, time, torch, transformers as hf
from pathlib import Path
from rolora import LoRAConfig, attach
from rolora.adapter.model import adapted_layers
from rolora.trainer import AlternatePhases
sys.path.insert(0, {root!r})
from tests.rolora.hf_trainer import model, trainer, factors
made = model({{"llama": {llama!r}}})
run = trainer(made, {out!r}, steps=4, ddp_find_unused_parameters=True, callbacks=[AlternatePhases(every=2)])
run.train()
flat = torch.cat([value.flatten() for value in factors(made).values()]).double()
if run.args.process_index == 0:
    json.dump([run.args.world_size, flat.sum().item(), flat.norm().item()], open({out!r} + "/end.json", "w"))
# A process that leaves while the other's gloo still talks to it may abort that one: they meet by
# files, and end without taking the group apart, which is PyTorch's to test.
here = Path({out!r})
(here / f"done-{{run.args.process_index}}").touch()
while not all((here / f"done-{{rank}}").exists() for rank in range(2)):
    time.sleep(0.05)
os._exit(0)
"""


def test_two_processes_alternate_together(files, tmp_path, python):
    from pathlib import Path

    root = str(Path(__file__).parents[2])
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=root, llama=str(files["llama"]), out=str(tmp_path)))
    code, _, err = ranks(python, 2, program=(script,))
    assert code == 0, err[-2000:]
    world, _, norm = json.loads((tmp_path / "end.json").read_text())
    assert world == 2 and norm > 0


def test_accelerate_alone(files):
    from accelerate import Accelerator

    made = model(files)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(rows(8), batch_size=4)
    wrapped, optimizer, loader = accelerator.prepare(made, optimizer, loader)
    before = factors(made)
    for batch in loader:
        accelerator.backward(wrapped(**batch).loss)
        nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()
    assert moved(before, factors(made)) == {"A", "B"}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_trainer_takes_a_quantised_base(kind, files, tmp_path):
    """Without our mark it says "You cannot perform fine-tuning on purely quantized models"."""
    asked = hf.BitsAndBytesConfig(
        load_in_4bit=kind == "nf4", load_in_8bit=kind == "int8", bnb_4bit_quant_type="nf4"
    )
    config = hf.LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    made = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=asked, device_map="cpu", dtype=torch.float32
    )
    attach(made, LoRAConfig(rank=4, alpha=8, target_modules=["q_proj", "v_proj"]), seed=0)
    base, before = (
        {k: v.clone() for k, v in made.state_dict().items() if "lora_" not in k},
        factors(made),
    )
    trainer(made, tmp_path / "out", gradient_accumulation_steps=2).train()
    assert moved(before, factors(made)) == {"A", "B"}
    assert all(torch.equal(made.state_dict()[key], value) for key, value in base.items())
    assert detach(made).is_quantized
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(made, tmp_path / "again")
