"""From a configuration to what a run works with: model, recipe, examples, clients."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rolora import atomic
from rolora.adapter.attach import AttachReport
from rolora.adapter.files import save_adapter
from rolora.adapter.frozen import speed_up
from rolora.config import Config, parse_ranks, settled
from rolora.errors import BadInput
from rolora.federated import compatibility, methods
from rolora.federated.backward import Backward
from rolora.federated.client import LocalTrainer
from rolora.federated.layout import Layout
from rolora.federated.local import LocalConfig
from rolora.hf import architecture, digest, models
from rolora.hf.shelf import Shelf
from rolora.recipes import Recipe, choosing
from rolora.recipes.packing import require_apart
from rolora.recipes.padding import Lengths
from rolora.run import adapter_folder, base_model, clients, defaults, examples, rows, sharded, spans
from rolora.run.card import Facts
from rolora.run.examples import Tally
from rolora.run.gradients import require_gradients


@dataclass
class Job:
    """A model with factors, and data cut into clients.

    `evaluation` is looked at during the run, `test` once at its end (None where they are the same).
    `tallies`: what was cut and dropped of each of them, by the plan's name for it. `weights`: a
    digest of the base model as it was read, empty for a plan.
    """

    config: Config
    model: nn.Module
    tokenizer: Any
    recipe: Recipe
    layout: Layout
    report: AttachReport
    saved_heads: list[str]
    train: Sequence[Any]
    evaluation: Sequence[Any]
    test: Sequence[Any] | None
    clients: Sequence[np.ndarray]  # by client
    device: torch.device
    tallies: dict[str, Tally] = field(default_factory=dict)
    weights: str = ""

    def evaluate(
        self, published: dict[str, Tensor], examples: Sequence[Any] | None = None
    ) -> dict[str, float]:
        """Metrics of the published factors."""
        self.layout.scatter(self.model, published)
        self.model.eval()
        if examples is None:
            examples = self.evaluation
        return self.recipe.evaluate(self.model, examples, self.config.data.eval_batch_size)

    def trainer(self, backward: Backward | None = None) -> LocalTrainer:
        """What trains this job's clients; `backward` makes their gradients."""
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
            error_feedback=self.config.exchange.error_feedback,
            handed_over=federation.hand_over is not None,
            realign_moments=bool(optimisation.realign_moments),
            beta2=optimisation.beta2,
            local_coordinates=bool(optimisation.local_coordinates),
            local_phase=method.local_phase,
            control_variates=bool(optimisation.control_variates),
            rates=method.rates,
        )
        return LocalTrainer(
            self.model,
            self.layout,
            self.recipe,
            self.train,
            self.clients,
            local,
            self._lengths(),
            backward,
        )

    def _lengths(self) -> Lengths | None:
        """The lengths of batches to train on; None: the longest example's."""
        if (multiple := self.config.federation.pad_to_multiple_of or 1) == 1:
            return None
        return Lengths(multiple, self.config.task.max_length, self.tokenizer.pad_token_id)

    @property
    def headline(self) -> str:
        """The metric that is shown first."""
        return settled(self.config.task.metric)

    def initial_factors(self) -> dict[str, Tensor]:
        """What every peer starts from: the attached model's values."""
        return self.layout.gather(self.model, tuple(self.layout.sizes))

    def save_adapter(
        self, published: dict[str, Tensor], folder: Path, facts: Facts | None = None
    ) -> None:
        """The published factors in PEFT's files, and beside them the tokenizer, how they are to be
        evaluated, and a card with the `facts` of the run.
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
        kept = adapter_folder.Kept(options, self.recipe.labels, facts)
        adapter_folder.write(folder, kept, base)
        with tempfile.TemporaryDirectory() as place:
            self.tokenizer.save_pretrained(place)
            adapter_folder.copy(Path(place), folder)
        # After the tokenizer's own files: a chat template of one's own takes the place of its.
        beside = self.recipe.beside() if hasattr(self.recipe, "beside") else {}
        for name, text in beside.items():
            atomic.write_text(folder / name, text)


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
    train, train_rows, held, test, tallies = _encoded(config, recipe, found)
    parts, config = clients.split(config, recipe, train, train_rows)
    how = models.load_model
    if not weights:
        how = models.sketch
    elif shelf is not None:
        how = shelf.take
    loaded = base_model.load(config, hf_config, tokenizer, recipe.labels, how)
    model: Any = loaded.model
    # Keys and values are for generation: a forward would copy and keep them for nothing.
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False
    weights_digest = digest.of_weights(model) if weights else ""  # before factors change them
    report, config = base_model.attach_factors(config, loaded)
    if methods.load(config.federation.method).narrows:
        f, seed = config.federation, config.run.seed
        spans.narrow(loaded.model, recipe, train, parts, f.batch_size, seed)
    if config.system.gradient_checkpointing:
        models.checkpoint_activations(model)
    layout = Layout.of(loaded.model, report.heads)
    saved_heads = _saved_heads(loaded, recipe, report)
    if config.system.base_sharding and weights:
        sharded.divide(loaded.model, device, layout, saved_heads)
    if weights and config.task.metric is not None:
        _require_metric(config.task.metric, recipe, loaded.model, held)
    config = defaults.fill(config, recipe, layout, report, len(parts))
    if weights:
        speed_up(loaded.model)
        require_gradients(loaded.model, recipe, recipe.collate(train[:1]), report)
        _settle_groups(loaded.model, recipe, train)
        if config.task.packing:
            require_apart(loaded.model)
    return Job(
        config,
        loaded.model,
        tokenizer,
        recipe,
        layout,
        report,
        saved_heads,
        train,
        held,
        test,
        parts,
        device,
        tallies,
        weights_digest,
    )


def _encoded(
    config: Config, recipe: Recipe, found: rows.Rows
) -> tuple[Sequence[Any], Sequence[dict], Sequence[Any], Sequence[Any] | None, dict[str, Tally]]:
    """(training examples, the rows that they are of, held-out and test examples, what was counted
    of each).
    """
    names = rows.training_name(config), rows.evaluation_name(config)
    unlearnable = config.task.unlearnable
    train, train_rows, tally = examples.encode(recipe, found.train, unlearnable, names[0])
    held_name = names[0] if found.held_out else names[1]
    part = " held out of it" if found.held_out else ""
    held, _, held_tally = examples.encode(recipe, found.held, unlearnable, held_name, part)
    tallies, test = {"examples": tally, "held-out examples": held_tally}, None
    if found.test is not None:
        test, _, tallies["test examples"] = examples.encode(
            recipe, found.test, unlearnable, names[1]
        )
    return train, train_rows, held, test, tallies


def _require_metric(name: str, recipe: Recipe, model: nn.Module, examples: Sequence[Any]) -> None:
    """Raises BadInput for a metric that the task is not evaluated by."""
    # One example tells, but for the metrics of a part ("accuracy/part"), which it may not be of.
    known = recipe.evaluate(model, examples if "/" in name else examples[:1], 1)
    if name not in known:
        raise BadInput(f"--metric {name}: this task is evaluated by {', '.join(known)}")


def _saved_heads(loaded: models.Loaded, recipe: Recipe, report: AttachReport) -> list[str]:
    """The modules that go along whole: what trains beside the factors, new heads that do not, and a
    classifier's own, which PEFT asks for.
    """
    found = dict.fromkeys([*report.heads, *loaded.new_heads])
    if not found and recipe.labels is not None:
        return architecture.heads(loaded.model)
    return list(found)


@torch.no_grad()
def _settle_groups(model: nn.Module, recipe: Recipe, train: Sequence[Any]) -> None:
    """Two forwards of one example: siblings that turn out to share no input disband now, in a new
    run and in a resumed one alike, so that both compute every step the same way.
    """
    batch = recipe.collate(train[:1])
    for _ in range(2):
        model(**batch.inputs)
