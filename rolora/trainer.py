"""LoRA without a federation: callbacks for Hugging Face's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rolora.adapter.files import save_adapter
from rolora.adapter.model import adapted_layers, set_phase
from rolora.adapter.pretrained import SavePretrained


class AlternatePhases(TrainerCallback):
    """Trains B for `every` optimizer steps, then A for as many, and so on: `Trainer(…,
    callbacks=[AlternatePhases(every=50)])` on an attached model.

    The frozen factor has no gradient, so that the optimizer passes it over: neither weight decay
    nor momentum moves it, and its moments wait. The phase follows the Trainer's global step and is
    therefore right after a resume. `schedule`: "BA", "BBA", …

    Raises ValueError at the start of training where factors are missing from the optimizer (attach
    before the Trainer is made, with the phase "BOTH"), or under DistributedDataParallel without
    `ddp_find_unused_parameters=True`, which would wait for the frozen factor.
    """

    def __init__(self, every: int = 50, schedule: str = "BA"):
        if every < 1 or set(schedule) - {"A", "B"} or not schedule:
            raise ValueError(
                f"every must be at least 1 and schedule of letters A and B, got {every} and "
                f"{schedule!r}"
            )
        self.every, self.schedule = every, schedule

    def phase(self, step: int) -> str:
        """The phase of an optimizer step, the first being 0."""
        return self.schedule[step // self.every % len(self.schedule)]

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        factors = [p for _, layer in adapted_layers(model) for p in (layer.lora_A, layer.lora_B)]
        if not factors:
            raise ValueError(
                "AlternatePhases needs a model with factors: attach(model, LoRAConfig(…)) first"
            )
        if optimizer is not None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if any(id(p) not in held for p in factors):
                raise ValueError(
                    "AlternatePhases: factors are missing from the optimizer: "
                    'set_phase(model, "BOTH") before Trainer(…)'
                )
        if args.world_size > 1 and args.n_gpu <= 1 and not args.ddp_find_unused_parameters:
            raise ValueError(
                "AlternatePhases under DistributedDataParallel needs "
                "TrainingArguments(ddp_find_unused_parameters=True)"
            )
        set_phase(model, self.phase(state.global_step))

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        set_phase(model, self.phase(state.global_step))

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        set_phase(model, "BOTH")  # as attach leaves it


class SaveAdapter(TrainerCallback):
    """Writes PEFT's files into every checkpoint of the Trainer, for models of one's own: those of
    Hugging Face write them by themselves. The Trainer resumes from the checkpoint as always.
    """

    def on_save(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        itself = isinstance(getattr(model, "save_pretrained", None), SavePretrained)
        if state.is_world_process_zero and not itself:
            save_adapter(model, Path(args.output_dir) / f"checkpoint-{state.global_step}")
