"""What the Trainer's checkpoints hold, and that a run goes on from them."""

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from rolora import LoRAConfig, attach
from rolora.trainer import AlternatePhases, SaveAdapter
from tests.rolora.hf_trainer import factors, model, moved, rows, stopped, trainer


def test_the_phase_is_right_after_a_resume(files, tmp_path):
    whole, parts = model(files), model(files)
    options = dict(steps=6, callbacks=[AlternatePhases(every=2)])
    trainer(whole, tmp_path / "whole", **options).train()
    folder = stopped(parts, tmp_path / "parts", **options)
    again = model(files)
    trainer(again, tmp_path / "parts", **options).train(resume_from_checkpoint=str(folder))
    for key, value in factors(whole).items():
        torch.testing.assert_close(factors(again)[key], value, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_holds_the_adapter_alone_and_the_run_goes_on_from_it(files, tmp_path):
    whole, parts, again = model(files), model(files), model(files)
    whole.model.norm.weight.requires_grad_(True)  # trained beside the factors
    parts.model.norm.weight.requires_grad_(True)
    again.model.norm.weight.requires_grad_(True)
    trainer(whole, tmp_path / "whole", weight_decay=0.1).train()
    with pytest.warns(UserWarning, match="norm.weight trains"):
        folder = stopped(parts, tmp_path / "parts", weight_decay=0.1)
    assert not (folder / "config.json").exists(), "or the base would be read, without the adapter"
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size < 0.7 * sum(p.numel() * 4 for p in parts.parameters())
    run = trainer(again, tmp_path / "parts", weight_decay=0.1)
    run.train(resume_from_checkpoint=str(folder))
    assert run.state.global_step == 6
    for (name, wanted), mine in zip(
        whole.state_dict().items(), again.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_peft_reads_a_checkpoint_of_the_trainer(files, tmp_path):
    made = model(files)
    folder = stopped(made, tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        hf.AutoModelForCausalLM.from_pretrained(files["llama"]), folder
    )
    ids = rows()[0]["input_ids"][None]
    made.eval(), theirs.eval()
    torch.testing.assert_close(
        theirs(input_ids=ids).logits, made(input_ids=ids).logits, rtol=1e-4, atol=1e-5
    )


def test_the_best_checkpoint_is_loaded_at_the_end(files, tmp_path):
    made, ends = model(files), {}

    class Watch(hf.TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            ends[state.global_step] = factors(model)

    run = trainer(made, tmp_path, steps=4, callbacks=[Watch()])
    run.eval_dataset = rows(8)
    run.args.save_strategy = hf.trainer_utils.SaveStrategy.STEPS
    run.args.eval_strategy = hf.trainer_utils.IntervalStrategy.STEPS
    run.args.save_steps = run.args.eval_steps = 2
    run.args.load_best_model_at_end, run.args.metric_for_best_model = True, "loss"
    run.args.greater_is_better = True  # the worst: the last would be the best otherwise
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert moved(ends[2], ends[4]) == {"A", "B"} and not moved(ends[2], factors(made))


class Own(nn.Module):
    """A model that is none of Hugging Face's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(100, 16), nn.Linear(16, 100)

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = self.out(self.embed(input_ids))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def test_a_model_of_ones_own_is_saved_by_the_callback_and_resumed(tmp_path):
    made = [Own(), Own(), Own()]
    for own in made:
        attach(own, LoRAConfig(rank=4, target_modules=["out"]), seed=0)
    whole, parts, again = made
    trainer(whole, tmp_path / "whole").train()
    folder = stopped(parts, tmp_path / "parts", callbacks=[SaveAdapter()])
    theirs = peft.PeftModel.from_pretrained(Own(), folder).eval()
    batch = {key: value[None] for key, value in rows()[0].items()}
    torch.testing.assert_close(
        theirs(**batch)["logits"], parts.eval()(**batch)["logits"], rtol=1e-5, atol=1e-6
    )
    trainer(again, tmp_path / "parts").train(resume_from_checkpoint=str(folder))
    for key, value in factors(whole).items():
        torch.testing.assert_close(factors(again)[key], value, rtol=1e-4, atol=1e-6)
