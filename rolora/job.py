"""From a configuration to everything a run works with: model, recipe, examples, clients.

Used by every command.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rolora import atomic
from rolora.adapter.attach import AttachReport, LoRAConfig, attach
from rolora.adapter.checkpoint import load_adapter, lora_config, read_adapter, save_adapter
from rolora.adapter.frozen import speed_up
from rolora.config import Config, parse_layers, parse_ranks, parse_targets
from rolora.data import files as data
from rolora.errors import BadInput
from rolora.federated import compatibility, methods, partition, sampling
from rolora.federated.client import LocalConfig, LocalTrainer
from rolora.federated.layout import Layout
from rolora.hf import models
from rolora.recipes import Recipe
from rolora.recipes.benchmarks import BENCHMARKS, Benchmark
from rolora.recipes.causal_lm import CausalLM
from rolora.recipes.classification import Classification, label_set
from rolora.recipes.multiple_choice import MultipleChoice, columns
from rolora_kernels import BackendUnavailable, use_backend

BUILTIN = Path(__file__).parent / "builtin"
_PEFT_TASKS = {
    "classification": "SEQ_CLS",
    "multiple-choice": "CAUSAL_LM",
    "causal-lm": "CAUSAL_LM",
}
SIDECAR = "rolora.json"  # beside PEFT's files: how the adapter is to be evaluated
_CARRIED = 1 << 30  # bytes of all clients' moments that are kept without being asked for
EVALUATION_OPTIONS = (
    "benchmark",
    "quantize",
    "task_type",
    "text_column",
    "text_pair_column",
    "label_column",
    "prompt_column",
    "response_column",
    "choices_column",
    "prompt_template",
    "max_length",
)


@dataclass
class Job:
    """A model with factors, and data cut into clients.

    `evaluation` is looked at during the run, `test` once at its end (None where they are the same).
    """

    config: Config
    model: nn.Module
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
        return self.recipe.evaluate(
            self.model,
            self.evaluation if examples is None else examples,
            self.config.data.eval_batch_size,
        )

    def trainer(self) -> LocalTrainer:
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
            carry_moments=optimisation.carry_moments,
            local_coordinates=optimisation.local_coordinates,
        )
        return LocalTrainer(self.model, self.layout, self.recipe, self.train, self.clients, local)

    def learning_rate(self, phase: str, round: int) -> float:
        return learning_rate(self.config, phase, round)

    def save_adapter(self, published: dict[str, Tensor], folder: Path) -> None:
        """The published factors in PEFT's files."""
        d = self.config.data
        self.layout.scatter(self.model, published)
        save_adapter(
            self.model,
            folder,
            base_model=d.model,
            task_type=_PEFT_TASKS[d.task_type],
            heads=self.saved_heads,
        )
        values = self.config.values()
        kept = {name: values[name] for name in EVALUATION_OPTIONS}
        labels = getattr(self.recipe, "labels", None)
        atomic.write_text(
            folder / SIDECAR, json.dumps({"options": kept, "labels": labels}, indent=2) + "\n"
        )


def refuse_wasted_rank(report: AttachReport) -> None:
    """Raises ValueError for a rank above a linear's smaller side, which only costs messages."""
    for layer in report.layers.values():
        smaller = min(layer.in_features, layer.out_features)
        if layer.rank > smaller:
            raise ValueError(
                f"rank {layer.rank} does not fit a {layer.out_features}x{layer.in_features} "
                f"linear: give 1 to {smaller}"
            )


def learning_rate(config: Config, phase: str, round: int) -> float:
    """Of a round's tasks: per phase, and scheduled over the rounds down to a tenth."""
    o, rounds = config.optimisation, config.federation.rounds
    base = {"A": o.lr_a, "B": o.lr_b}.get(phase) or o.lr
    schedule = {"A": o.lr_schedule_a, "B": o.lr_schedule_b}.get(phase) or o.lr_schedule
    progress = (round - 1) / max(rounds - 1, 1)
    if schedule == "linear":
        return base * (1 - 0.9 * progress)
    if schedule == "cosine":
        return base * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
    return base


def model_name(config: Config) -> str:
    return config.data.model or str(BUILTIN / "model")


def prepare(config: Config, shelf: models.Shelf | None = None, weights: bool = True) -> Job:
    """Reads the data and the model and attaches the factors; raises BadInput for what does not fit.

    `config` comes back in the job with everything resolved: task type, number of clients, dtype,
    device. Jobs made with one `shelf` share base weights. Without `weights` the model is on the
    meta device: enough for a plan.
    """
    config = compatibility.settle(config)
    system = config.system
    models.quieten()
    if system.threads is not None:
        torch.set_num_threads(system.threads)
    device = models.pick_device(system.device)
    dtype = models.pick_dtype(system.dtype, device)
    attention = models.pick_attention(system.attn, device, dtype, config.data.max_length)
    hf_config = models.read_config(model_name(config), config.data.revision)
    train_rows, held_rows, test_rows, config = _rows(config)
    tokenizer = models.load_tokenizer(model_name(config), config.data.revision)
    check_length(config, hf_config)
    labels = _labels(config, train_rows)
    if labels is not None and len(labels) < 2:
        raise BadInput(
            f"column {config.data.label_column!r} holds only the label {labels[0]!r}: two classes "
            "or more are needed"
        )
    if labels is None and not models.is_causal_lm(hf_config):
        raise BadInput(
            f"--model {model_name(config)} is a {(hf_config.architectures or ['model'])[0]}, no "
            "causal LM: it can be "
            "trained with --task-type classification, --train-file, --text-column and "
            "--label-column"
        )
    recipe = make_recipe(config, tokenizer, labels, device)
    train, held = recipe.encode(train_rows), recipe.encode(held_rows)
    test = recipe.encode(test_rows) if test_rows is not None else None
    clients, config = _clients(config, recipe, train, train_rows)
    load = models.load_model
    if not weights:
        load = models.sketch
    elif shelf is not None:
        load = shelf.take
    loaded = load(
        model_name(config),
        hf_config,
        tokenizer,
        labels=labels,
        dtype=dtype,
        device=device,
        attn=attention,
        seed=config.run.seed,
        revision=config.data.revision,
        quantize=system.quantize,
        liger=system.liger,
    )
    # Keys and values are for generation: a forward would copy and keep them for nothing.
    loaded.model.config.use_cache = False
    report, config = _attach(config, loaded)
    if system.gradient_checkpointing:
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    layout = Layout.of(loaded.model, report.heads)
    if config.optimisation.carry_moments is None:
        config = config.with_values(carry_moments=carried_bytes(layout, len(clients)) <= _CARRIED)
    if weights:
        speed_up(loaded.model)
        _settle_groups(loaded.model, recipe, train)
    config = config.with_values(
        dtype=next(k for k, v in models.DTYPES.items() if v == dtype),
        device=str(device),
        attn=attention,
        threads=torch.get_num_threads(),
    )
    return Job(
        config,
        loaded.model,
        recipe,
        layout,
        report,
        loaded.new_heads,
        train,
        held,
        test,
        clients,
        device,
    )


def carried_bytes(layout: Layout, clients: int) -> int:
    """What clients keep between rounds with --carry-moments: both of AdamW's fp32 moments of every
    value that travels, for all of them.
    """
    return clients * 8 * sum(layout.sizes.values())


def evaluate_adapter(
    config: Config, adapter: str | None, labels: list[str] | None
) -> dict[str, float]:
    """Metrics of a saved adapter (or of the bare model) on the evaluation file or data set;
    `labels` are those it was trained on, those of the file where they are not known.
    """
    d = config.data
    if d.eval_file is not None:
        rows = data.read_file(d.eval_file)
    elif (known := benchmark(config)) is not None:
        rows = known.load(d.dataset)[1]
    else:
        rows = data.read_hub(d.dataset, d.dataset_config, ["validation", "test"]) or []
    if not rows:
        raise BadInput(
            f"data set {d.dataset or d.benchmark!r} has no split 'validation' or 'test': give "
            "--eval-file"
        )
    config = task_type(config, rows[0])
    require_columns(config, rows, d.eval_file or d.dataset)
    rows = limit(config, rows)
    labels = (
        (labels or _labels(config, rows)) if config.data.task_type == "classification" else None
    )
    model, tokenizer, device = with_adapter(config, adapter, labels)
    recipe = make_recipe(config, tokenizer, labels, device)
    backend = config.system.backend
    try:
        with use_backend(backend) if backend != "auto" else nullcontext():
            return recipe.evaluate(model, recipe.encode(rows), d.eval_batch_size)
    except BackendUnavailable as error:
        raise BadInput(f"--backend: {error}") from None


def with_adapter(
    config: Config, adapter: str | None, labels: list[str] | None
) -> tuple[nn.Module, Any, torch.device]:
    """(model with a saved adapter, or bare, its tokenizer, its device), ready to evaluate."""
    models.quieten()
    if config.system.threads is not None:
        torch.set_num_threads(config.system.threads)
    device = models.pick_device(config.system.device)
    dtype = models.pick_dtype(config.system.dtype, device)
    hf_config = models.read_config(model_name(config), config.data.revision)
    tokenizer = models.load_tokenizer(model_name(config), config.data.revision)
    check_length(config, hf_config)
    loaded = models.load_model(
        model_name(config),
        hf_config,
        tokenizer,
        labels=labels,
        dtype=dtype,
        device=device,
        attn=models.pick_attention(config.system.attn, device, dtype, config.data.max_length),
        seed=config.run.seed,
        revision=config.data.revision,
        quantize=config.system.quantize,
        liger=config.system.liger,
    )
    if adapter is not None:
        try:
            models.keep_in_fp32(loaded.model, loaded.new_heads)
            load_adapter(loaded.model, adapter)
        except ValueError as error:
            raise BadInput(str(error)) from None
    speed_up(loaded.model)
    return loaded.model.eval(), tokenizer, device


def initial_factors(job: Job) -> dict[str, Tensor]:
    """What every peer starts from: the attached model's values."""
    return job.layout.gather(job.model, tuple(job.layout.sizes))


@torch.no_grad()
def _settle_groups(model: nn.Module, recipe: Recipe, train: Sequence[Any]) -> None:
    """Two forwards of one example: siblings that turn out to share no input disband now, in a new
    run and in a resumed one alike, so that both compute every step the same way.
    """
    batch = recipe.collate(train[:1])
    for _ in range(2):
        model(**batch.inputs)


def _rows(config: Config) -> tuple[list[dict], list[dict], list[dict] | None, Config]:
    """(training, evaluation during the run, test at its end, config with the task type): columns
    checked.
    """
    d = config.data
    evaluation = None
    if d.train_file is not None:
        train = data.read_file(d.train_file)
    elif (known := benchmark(config)) is not None:
        train, evaluation = known.load(d.dataset)
    elif d.dataset is not None:
        train = data.read_hub(d.dataset, d.dataset_config, ["train"])
        if train is None:
            raise BadInput(f"data set {d.dataset!r} has no split 'train': give --train-file")
        evaluation = data.read_hub(d.dataset, d.dataset_config, ["validation", "test"])
    elif d.model is None:
        train, evaluation = (
            data.read_file(BUILTIN / "text" / "train.jsonl"),
            data.read_file(BUILTIN / "text" / "eval.jsonl"),
        )
    else:
        raise BadInput(
            f"--model {d.model} is given without data: give --train-file (and --eval-file), or "
            "--dataset"
        )
    if d.eval_file is not None:
        evaluation = data.read_file(d.eval_file)
    config = task_type(config, train[0])
    for rows, where in (
        (train, d.train_file or d.dataset or "the data"),
        (evaluation, d.eval_file or "the evaluation data"),
    ):
        if rows is not None:
            require_columns(config, rows, str(where))
    fraction = d.validation_fraction
    if fraction is None:
        fraction = 0.1 if evaluation is None else 0.0
    if fraction == 0.0 and evaluation is None:
        raise BadInput(
            "nothing to evaluate on: give --eval-file, or a --validation-fraction above 0"
        )
    if fraction > 0.0:
        order = sampling.generator(config.run.seed, "validation").permutation(len(train))
        cut = max(1, round(fraction * len(train)))
        if cut >= len(train):
            raise BadInput(
                f"--validation-fraction {fraction} of {len(train)} examples leaves none to train on"
            )
        held = [train[i] for i in np.sort(order[:cut])]
        train = [train[i] for i in np.sort(order[cut:])]
        return (
            train,
            limit(config, held),
            evaluation if evaluation is None else limit(config, evaluation),
            config,
        )
    return train, limit(config, evaluation), None, config


def limit(config: Config, rows: list[dict]) -> list[dict]:
    most = config.data.eval_max_examples
    if most is None or most >= len(rows):
        return rows
    return [
        rows[i]
        for i in np.sort(sampling.generator(config.run.seed, "eval").permutation(len(rows))[:most])
    ]


def task_type(config: Config, row: dict) -> Config:
    """The task type, told from the columns where it is not given."""
    d = config.data
    if (known := benchmark(config)) is not None:
        return config.with_values(task_type=known.task_type)
    if d.task_type is not None:
        return config
    if d.choices_column is not None:
        kind = "multiple-choice"
    elif (
        d.response_column is not None
        or d.prompt_column is not None
        or d.prompt_template is not None
    ):
        kind = "causal-lm"
    elif d.label_column in row:
        kind = "classification"
    elif d.text_column in row:
        kind = "causal-lm"
    else:
        raise BadInput(
            f"cannot tell the task from the columns {', '.join(row)}: give --task-type, and the "
            "columns with "
            "--text-column and --label-column, --prompt-column and --response-column, or "
            "--choices-column"
        )
    return config.with_values(task_type=kind)


def require_columns(config: Config, rows: list[dict], where: str) -> None:
    d, f = config.data, config.federation
    if benchmark(config) is not None:
        wanted = {}  # the benchmark has seen to its own
    elif d.task_type == "classification":
        wanted = {
            "--text-column": d.text_column,
            "--text-pair-column": d.text_pair_column,
            "--label-column": d.label_column,
        }
    elif d.task_type == "multiple-choice":
        wanted = {
            "--prompt-column": None if d.prompt_template else d.prompt_column or "prompt",
            "--choices-column": d.choices_column or "choices",
            "--label-column": d.label_column,
        }
    else:
        wanted = {
            "--prompt-column": d.prompt_column,
            "--response-column": d.response_column or d.text_column,
        }
    if f.partition == "column":
        if d.client_column is None:
            raise BadInput("--partition column needs --client-column: whose example a row is")
        wanted["--client-column"] = d.client_column
    data.require_columns(rows, wanted, where)


def benchmark(config: Config) -> Benchmark | None:
    """The benchmark that the data are of; a folder or the name "commonsense" alone is that one."""
    d = config.data
    if (
        d.benchmark is None
        and d.train_file is None
        and d.dataset is not None
        and (d.dataset == "commonsense" or Path(d.dataset).is_dir())
    ):
        return BENCHMARKS["commonsense"]
    return BENCHMARKS[d.benchmark] if d.benchmark is not None else None


def _labels(config: Config, rows: list[dict]) -> list[str] | None:
    """The classes of a classification: a benchmark's own, else those of the rows."""
    if config.data.task_type != "classification":
        return None
    known = benchmark(config)
    return list(known.labels) if known is not None else label_set(rows, config.data.label_column)


def make_recipe(
    config: Config, tokenizer, labels: list[str] | None, device: torch.device
) -> Recipe:
    d = config.data
    if (known := benchmark(config)) is not None:
        return known.make(tokenizer, d.max_length, device)
    if d.task_type == "classification":
        return Classification(
            tokenizer,
            labels,
            d.max_length,
            d.text_column,
            d.label_column,
            d.text_pair_column,
            device,
        )
    if d.task_type == "multiple-choice":
        read = columns(
            d.prompt_column or "prompt",
            d.choices_column or "choices",
            d.label_column,
            d.prompt_template,
        )
        return MultipleChoice(tokenizer, d.max_length, read, device)
    return CausalLM(
        tokenizer,
        d.max_length,
        d.response_column or d.text_column,
        d.prompt_column,
        d.prompt_template,
        device,
    )


def check_length(config: Config, hf_config) -> None:
    most = getattr(hf_config, "max_position_embeddings", None) or getattr(
        hf_config, "n_positions", None
    )
    if most is not None and hf_config.model_type in ("roberta", "xlm-roberta", "camembert"):
        most -= 2  # its positions start after the padding index
    if most is not None and config.data.max_length > most:
        raise BadInput(
            f"--max-length {config.data.max_length} is over the model's {most} positions"
        )


def _clients(
    config: Config, recipe: Recipe, train: list[Any], rows: list[dict]
) -> tuple[list[np.ndarray], Config]:
    f, seed = config.federation, config.run.seed
    if f.partition == "column":
        clients = partition.column([row[config.data.client_column] for row in rows])
        config = config.with_values(clients=len(clients))
    else:
        labels = recipe.skew_labels(train)
        if f.partition != "iid" and labels is None:
            raise BadInput(
                f"--partition {f.partition} splits by label, which {config.data.task_type} data do "
                "not have: use iid or column"
            )
        try:
            if f.partition == "iid":
                clients = partition.iid(len(train), f.clients, seed)
            elif f.partition == "dirichlet":
                clients = partition.dirichlet(labels, f.clients, f.dirichlet_alpha, seed)
            else:
                clients = partition.shards(labels, f.clients, f.shards_per_client, seed)
        except ValueError as error:
            raise BadInput(str(error)) from None
    f = config.federation
    per_round = min(f.clients_per_round or f.clients, f.clients)
    if f.clients_per_round is not None and f.clients_per_round > f.clients:
        raise BadInput(f"--clients-per-round {f.clients_per_round} is over the {f.clients} clients")
    if f.quorum > per_round:
        raise BadInput(f"--quorum {f.quorum} can never be met by {per_round} clients a round")
    return clients, config.with_values(clients_per_round=per_round)


def _attach(config: Config, loaded: models.Loaded) -> tuple[AttachReport, Config]:
    """Factors on the model; the configuration comes back with what --init-adapter decides."""
    a = config.adapter
    train_head = bool(loaded.new_heads) if a.train_head is None else a.train_head
    heads = tuple(loaded.new_heads) if train_head else ()
    if a.train_head and not loaded.new_heads:
        heads = tuple(n for n in ("score", "classifier") if hasattr(loaded.model, n))
        if not heads:
            raise BadInput("--train-head: this model has no classification head")
        loaded.new_heads = list(heads)
    lora = LoRAConfig(
        rank=a.rank,
        alpha=a.alpha,
        target_modules=parse_targets(a.target_modules),
        layers=parse_layers(a.layers),
        dropout=a.dropout,
        rslora=a.rslora,
        modules_to_save=heads,
        init=a.init,
    )
    try:
        if a.init_adapter is not None:
            given, tensors = read_adapter(a.init_adapter)
            taken = lora_config(given, tensors)
            lora = LoRAConfig(
                rank=taken.rank,
                alpha=taken.alpha,
                target_modules=taken.target_modules,
                rslora=taken.rslora,
                dropout=a.dropout,
                modules_to_save=tuple(dict.fromkeys((*heads, *taken.modules_to_save))),
            )
            config = config.with_values(
                rank=taken.rank,
                alpha=float(taken.alpha),
                rslora=taken.rslora,
                layers=None,
                target_modules=",".join(taken.target_modules),
            )
        models.keep_in_fp32(loaded.model, lora.modules_to_save)
        report = attach(loaded.model, lora, seed=config.run.seed)
        if a.init_adapter is None:
            refuse_wasted_rank(report)
        if a.init_adapter is not None:
            load_adapter(loaded.model, a.init_adapter)
    except ValueError as error:
        raise BadInput(str(error)) from None
    return report, config
