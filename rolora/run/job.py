"""From a configuration to what a run works with: model, recipe, examples, clients."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rolora.adapter.attach import AttachReport
from rolora.adapter.checkpoint import save_adapter
from rolora.adapter.frozen import speed_up
from rolora.config import Config, parse_ranks
from rolora.errors import BadInput
from rolora.federated import compatibility, methods
from rolora.federated.client import LocalConfig, LocalTrainer
from rolora.federated.layout import Layout
from rolora.hf import architecture, models
from rolora.hf.shelf import Shelf
from rolora.recipes import Recipe, choosing
from rolora.run import adapter_folder, base_model, clients, rows

_CARRIED = 1 << 30  # bytes of all clients' moments that are kept without being asked for


@dataclass
class Job:
    """A model with factors, and data cut into clients.

    `evaluation` is looked at during the run, `test` once at its end (None where they are the same).
    """

    config: Config
    model: nn.Module
    tokenizer: Any
    recipe: Recipe
    layout: Layout
    report: AttachReport
    saved_heads: list[str]
    train: list[Any]
    evaluation: list[Any]
    test: list[Any] | None
    clients: list[np.ndarray]
    device: torch.device

    def evaluate(
        self, published: dict[str, Tensor], examples: Sequence[Any] | None = None
    ) -> dict[str, float]:
        """Metrics of the published factors."""
        self.layout.scatter(self.model, published)
        self.model.eval()
        if examples is None:
            examples = self.evaluation
        return self.recipe.evaluate(self.model, examples, self.config.data.eval_batch_size)

    def trainer(self) -> LocalTrainer:
        """What trains this job's clients."""
        federation, optimisation = self.config.federation, self.config.optimisation
        method = methods.load(federation.method)
        local = LocalConfig(
            steps=federation.local_steps,
            epochs=federation.local_epochs,
            batch_size=federation.batch_size,
            accumulation=federation.gradient_accumulation,
            optimizer=optimisation.optimizer,
            weight_decay=optimisation.weight_decay,
            max_grad_norm=optimisation.max_grad_norm,
            seed=self.config.run.seed,
            kept=method.kept,
            selects=method.selects,
            client_ranks=parse_ranks(federation.client_ranks),
            carry_moments=bool(optimisation.carry_moments),
            local_coordinates=bool(optimisation.local_coordinates),
        )
        return LocalTrainer(self.model, self.layout, self.recipe, self.train, self.clients, local)

    def initial_factors(self) -> dict[str, Tensor]:
        """What every peer starts from: the attached model's values."""
        return self.layout.gather(self.model, tuple(self.layout.sizes))

    def save_adapter(self, published: dict[str, Tensor], folder: Path) -> None:
        """The published factors in PEFT's files, and beside them the tokenizer, a card and how
        they are to be evaluated.
        """
        base = adapter_folder.to_record(self.config.data.model)
        self.layout.scatter(self.model, published)
        save_adapter(
            self.model,
            folder,
            base_model=base,
            task_type=self.recipe.peft_task_type,
            heads=self.saved_heads,
        )
        options = asdict(self.config.task) | {
            "benchmark": self.config.data.benchmark,
            "quantize": self.config.system.quantize,
        }
        adapter_folder.write(folder, adapter_folder.Kept(options, self.recipe.labels), base)
        with tempfile.TemporaryDirectory() as place:
            self.tokenizer.save_pretrained(place)
            adapter_folder.copy(Path(place), folder)


def prepare(config: Config, shelf: Shelf | None = None, weights: bool = True) -> Job:
    """Reads the data and the model and attaches the factors; raises BadInput for what does not fit.

    `config` comes back in the job with everything resolved: task type, number of clients, dtype,
    device. Jobs made with one `shelf` share base weights. Without `weights` the model is on the
    meta device: enough for a plan.
    """
    config = compatibility.settle(config)
    hf_config = base_model.read_config(config)
    config = base_model.settle(config, hf_config)
    found, config = rows.read(config)
    base_model.require_positions(config, hf_config)
    tokenizer = base_model.load_tokenizer(config, hf_config)
    device = torch.device(config.system.device)
    recipe = choosing.build(config, tokenizer, found.train, device)
    if recipe.labels is None and not architecture.is_causal_lm(hf_config):
        kind = (hf_config.architectures or ["model"])[0]
        raise BadInput(
            f"--model {base_model.name_of(config)} is a {kind}, no causal LM: it can be trained "
            "with --task-type classification, --train-file, --text-column and --label-column"
        )
    train, held = recipe.encode(found.train), recipe.encode(found.held)
    test = None if found.test is None else recipe.encode(found.test)
    parts, config = clients.split(config, recipe, train, found.train)
    how = models.load_model
    if not weights:
        how = models.sketch
    elif shelf is not None:
        how = shelf.take
    loaded = base_model.load(config, hf_config, tokenizer, recipe.labels, how)
    model: Any = loaded.model
    # Keys and values are for generation: a forward would copy and keep them for nothing.
    model.config.use_cache = False
    report, config = base_model.attach_factors(config, loaded)
    if config.system.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layout = Layout.of(loaded.model, report.heads)
    if config.optimisation.carry_moments is None:
        config = config.with_values(carry_moments=carried_bytes(layout, len(parts)) <= _CARRIED)
    if weights:
        speed_up(loaded.model)
        _settle_groups(loaded.model, recipe, train)
    return Job(
        config,
        loaded.model,
        tokenizer,
        recipe,
        layout,
        report,
        _saved_heads(loaded, recipe, report),
        train,
        held,
        test,
        parts,
        device,
    )


def _saved_heads(loaded: models.Loaded, recipe: Recipe, report: AttachReport) -> list[str]:
    """The modules that go along whole: what trains beside the factors, new heads that do not, and a
    classifier's own, which PEFT asks for.
    """
    found = dict.fromkeys([*report.heads, *loaded.new_heads])
    if not found and recipe.labels is not None:
        return architecture.heads(loaded.model)
    return list(found)


def carried_bytes(layout: Layout, clients: int) -> int:
    """What clients keep between rounds with --carry-moments: both of AdamW's fp32 moments of every
    value that travels, for all of them.
    """
    return clients * 8 * sum(layout.sizes.values())


@torch.no_grad()
def _settle_groups(model: nn.Module, recipe: Recipe, train: Sequence[Any]) -> None:
    """Two forwards of one example: siblings that turn out to share no input disband now, in a new
    run and in a resumed one alike, so that both compute every step the same way.
    """
    batch = recipe.collate(train[:1])
    for _ in range(2):
        model(**batch.inputs)
