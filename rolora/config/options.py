"""Configuration: frozen dataclasses, one tree.

Values come from defaults, a preset, a TOML file and flags, in that order.

Every field is a flag (`batch_size` is `--batch-size`) and a TOML key in its section's table.
Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# A task type is the name of a file in rolora/recipes, where its recipe says what it needs.
TASK_TYPES = ("classification", "multiple-choice", "causal-lm", "preference", "chat")
SCHEDULES = ("constant", "linear", "cosine")
METHODS = ("rolora", "fedavg", "ffa", "flexlora", "fedsvd", "flora", "fedex", "fedsa", "lora-a2")
BENCHMARKS = ("sst2", "qnli", "mnli", "qqp", "rte", "commonsense", "alpaca", "codealpaca")
# Options that may name a folder or a file.
PLACES = ("model", "dataset", "train_file", "eval_file", "init_adapter", "output_dir")
INITS = ("kaiming", "gaussian", "orthogonal", "pissa")


def _option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    metavar: str | None = None,
) -> Any:
    return field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "least": least,
            "above": above,
            "most": most,
            "metavar": metavar,
        },
    )


@dataclass(frozen=True)
class Data:
    """Model and data"""

    model: str | None = _option(
        None, "Hugging Face id or folder; without it the built-in model and text", metavar="ID|DIR"
    )
    revision: str | None = _option(None, "branch, tag or commit of a hub model")
    dataset: str | None = _option(
        None, "hub data set, or a folder of the benchmark's files", metavar="ID|DIR"
    )
    benchmark: str | None = _option(
        None, "read the data, and judge, as this benchmark does", choices=BENCHMARKS
    )
    dataset_config: str | None = _option(None, "configuration of the hub data set")
    train_file: str | None = _option(None, "JSONL, JSON, CSV, TSV or Parquet", metavar="FILE")
    eval_file: str | None = _option(None, "held-out examples in the same columns", metavar="FILE")
    validation_fraction: float | None = _option(
        None,
        "part of the training data held out and evaluated every round (0.1 without an eval file, "
        "else 0; the eval file "
        "is then looked at once, at the end)",
        least=0,
        most=0.9,
    )
    client_column: str | None = _option(None, "whose example it is (--partition column)")
    eval_max_examples: int | None = _option(
        None, "evaluate on the first so many of a seeded shuffle", least=1
    )
    eval_batch_size: int = _option(64, "examples a batch in evaluation", least=1, most=10**9)


@dataclass(frozen=True)
class Task:
    """Task: how rows become examples"""

    task_type: str | None = _option(
        None,
        "what is trained, or FILE.py: a recipe of your own; told from the columns if not given",
        choices=TASK_TYPES,
    )
    text_column: str = _option("text", "classification: the text")
    text_pair_column: str | None = _option(None, "classification: a second text")
    label_column: str = _option("label", "the label; multiple choice: index or text of the answer")
    prompt_column: str | None = _option(None, "causal LM, multiple choice: the prompt")
    response_column: str | None = _option(None, "causal LM: what carries loss")
    choices_column: str | None = _option(None, "multiple choice: a list, or JSON text of one")
    prompt_template: str | None = _option(
        None, "fills columns in, such as '{context} Q: {question} A:'"
    )
    max_length: int = _option(256, "tokens an example is cut to", least=8, most=10**7)
    metric: str | None = _option(
        None,
        "what tables show first and rates are chosen by, of those that the task is evaluated by; "
        "accuracy, or for text the loss, and exact match where answers are short",
        metavar="NAME",
    )
    loss_on: str | None = _option(
        None,
        "chat: the assistant's turns (if not given), its last one, or every token",
        choices=("assistant", "last", "all"),
    )
    chat_template: str | None = _option(
        None,
        "chat, preference: a Jinja template, or a file with one, in place of the tokenizer's",
        metavar="FILE",
    )
    packing: bool = _option(
        False, "causal LM, chat: several examples in a row of a batch, which do not see each other"
    )
    unlearnable: str = _option(
        "drop",
        "rows with nothing to learn from, as where --max-length cuts the answer away",
        choices=("drop", "refuse"),
    )
    dpo_beta: float | None = _option(
        None, "preference: weight of the reward (0.1)", above=0, most=1e6
    )
    dpo_label_smoothing: float | None = _option(
        None, "preference: share of pairs that are the wrong way round (0)", least=0, most=0.5
    )


@dataclass(frozen=True)
class Federation:
    """Federation"""

    method: str = _option(
        "rolora",
        "how factors are trained and combined, or FILE.py: a method of your own",
        choices=METHODS,
    )
    schedule: str = _option(
        "BA", "rolora, lora-a2: the factors of successive rounds, repeated", metavar="BA|BBA|…"
    )
    balance: bool = _option(
        False, "rolora, lora-a2: make a factor orthonormal, up to a scalar, before it is frozen"
    )
    client_ranks: str | None = _option(
        None, "flexlora, flora, lora-a2: ranks of clients 0, 1, …, repeated", metavar="2,4,8"
    )
    clients: int = _option(10, "how many there are", least=1, most=10**9)
    clients_per_round: int | None = _option(
        None, "how many take part in a round; all if not given", least=1
    )
    rounds: int = _option(
        20, "communication rounds; two make one iteration of RoLoRA", least=1, most=10**9
    )
    local_steps: int = _option(10, "optimizer steps of a client in a round", least=1, most=10**9)
    local_epochs: int | None = _option(
        None, "passes over the client's data instead of --local-steps", least=1
    )
    batch_size: int = _option(16, "examples a batch", least=1, most=10**9)
    gradient_accumulation: int = _option(1, "batches an optimizer step", least=1, most=10**9)
    partition: str = _option(
        "iid",
        "how examples are split over clients",
        choices=("iid", "dirichlet", "shards", "column"),
    )
    dirichlet_alpha: float = _option(
        0.5, "label skew of --partition dirichlet; small is skewed", above=0
    )
    shards_per_client: int = _option(
        2, "labels a client sees, about, with --partition shards", least=1
    )
    sampling: str = _option(
        "fixed",
        "who takes part: so many, or each by itself with that probability",
        choices=("fixed", "poisson"),
    )
    quorum: int = _option(
        1, "accepted updates that a round needs; one without them is repeated", least=0
    )
    deadline: float | None = _option(
        None, "seconds after which a round waits for nobody", above=0, metavar="SECONDS"
    )
    aggregation: str = _option(
        "mean",
        "how changes become one; median and trimmed-mean bear a few wrong clients",
        choices=("mean", "median", "trimmed-mean"),
    )
    trim_fraction: float = _option(
        0.1, "trimmed-mean: part of the clients dropped at either end", least=0, most=0.49
    )
    weighting: str | None = _option(
        None,
        "a client's share in the mean; examples, but uniform with --dp-clip",
        choices=("examples", "uniform"),
    )
    max_weight: int | None = _option(
        None, "examples that a client's weight counts at most", least=1, most=2**31 - 1
    )
    server_momentum: float = _option(
        0.0,
        "FedAvgM: a moment for each factor, which rests while the factor does",
        least=0,
        most=0.999,
    )
    server_lr: float = _option(1.0, "what the mean change is multiplied by", above=0, most=1e6)


@dataclass(frozen=True)
class Adapter:
    """LoRA"""

    rank: int = _option(8, "r", least=1, most=65_536)
    alpha: float = _option(16.0, "the path is scaled by alpha / rank", above=0, most=1e6)
    rslora: bool = _option(False, "scale by alpha / sqrt(rank)")
    dropout: float = _option(0.0, "on the input of the LoRA path", least=0, most=1)
    init: str = _option(
        "kaiming", "of A, with B zero; pissa: both from the singular vectors of W", choices=INITS
    )
    init_adapter: str | None = _option(None, "start from this PEFT folder", metavar="DIR")
    target_modules: str = _option(
        "auto",
        "names, a regular expression, all-linear, or auto: query and value",
        metavar="q_proj,v_proj",
    )
    layers: str | None = _option(
        None,
        "blocks to adapt, or such a part of them as 'last 6 of 24'; all if not given",
        metavar="18-23",
    )
    train_head: bool | None = _option(
        None, "train and send the classification head (if the checkpoint lacks one)"
    )


@dataclass(frozen=True)
class Optimisation:
    """Optimisation"""

    optimizer: str = _option("adamw", "of every client", choices=("adamw", "sgd"))
    lr: float | None = _option(
        None,
        "learning rate; if not given one that fits the optimizer, the width of the adapted linears "
        "and alpha / rank, which --dry-run shows",
        above=0,
        most=1e30,
    )
    lr_a: float | None = _option(
        None, "learning rate of rounds that train A; --lr if not given", above=0, most=1e30
    )
    lr_b: float | None = _option(
        None, "learning rate of rounds that train B; --lr if not given", above=0, most=1e30
    )
    lr_schedule: str = _option(
        "constant", "over the rounds; linear and cosine end at a tenth", choices=SCHEDULES
    )
    lr_schedule_a: str | None = _option(
        None, "of rounds that train A; --lr-schedule if not given", choices=SCHEDULES
    )
    lr_schedule_b: str | None = _option(
        None, "of rounds that train B; --lr-schedule if not given", choices=SCHEDULES
    )
    weight_decay: float = _option(0.0, "on what trains only", least=0, most=1e6)
    max_grad_norm: float = _option(1.0, "gradient clipping; 0 for none", least=0)
    carry_moments: bool | None = _option(
        None,
        "adamw: clients keep the moments of a factor from its last round to its next (rolora does, "
        "up to 1 GiB for all clients, unless with --balance)",
    )
    local_coordinates: bool | None = _option(
        None,
        "one factor trains: clients do so in orthonormal coordinates of the frozen one (rolora "
        "and lora-a2 do with --optimizer sgd, unless with --balance)",
    )


@dataclass(frozen=True)
class Exchange:
    """Exchange"""

    exchange_dtype: str = _option(
        "bf16", "of the changes on the wire, both ways", choices=("fp32", "bf16", "fp16", "int8")
    )
    max_update_norm: float | None = _option(
        None,
        "reject a change whose norm is over so many times the running median of its phase, after "
        "two rounds of it; 0 never "
        "(10; 0 with --dp-clip)",
        least=0,
    )


@dataclass(frozen=True)
class Privacy:
    """Privacy (client-level differential privacy)"""

    dp_clip: float | None = _option(
        None,
        "clip every change to this L2 norm on the server; switches it on",
        above=0,
        most=1e6,
    )
    dp_noise: float | None = _option(
        None,
        "noise multiplier: standard deviation of the sum's noise over --dp-clip",
        least=0,
        most=1e6,
    )
    dp_delta: float = _option(1e-5, "δ, for which ε is told each round", above=0, most=0.5)


@dataclass(frozen=True)
class System:
    """System"""

    dtype: str = _option(
        "auto",
        "of the frozen base; auto: bf16 on a GPU, fp32 on a CPU",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    quantize: str = _option(
        "none",
        "store the frozen linears in 4 or 8 bits (bitsandbytes)",
        choices=("none", "nf4", "int8"),
    )
    attn: str = _option(
        "auto",
        "attention implementation; auto: sdpa, but eager where the model has no other, and in 16 "
        "bits on a CPU up to --max-length 128",
        choices=("auto", "sdpa", "eager", "flash_attention_2"),
    )
    liger: bool = _option(
        False,
        "Liger's kernels for norms, rotary embedding, gated activations and cross-entropy; GPU "
        "only",
    )
    gradient_checkpointing: bool = _option(False, "recompute activations in backward")
    engine: str = _option(
        "auto",
        "how one process trains its clients; auto: whichever a short measurement finds faster",
        choices=("auto", "sequential", "batched"),
    )
    cohort_chunk: int | None = _option(
        None,
        "clients that --engine batched trains at a time; what fits into half of the free memory "
        "if not given",
        least=1,
    )
    backend: str = _option("auto", "kernels", choices=("auto", "torch", "triton", "reference"))
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, mps", metavar="NAME")
    threads: int | None = _option(None, "CPU threads", least=1, most=1024)


@dataclass(frozen=True)
class Run:
    """Run"""

    output_dir: str | None = _option(None, "the run folder; runs/… if not given", metavar="DIR")
    eval_every: int = _option(1, "rounds between evaluations", least=1)
    samples: int = _option(
        0,
        "held-out prompts that the model continues at every evaluation, into samples.jsonl",
        least=0,
        most=10_000,
    )
    checkpoint_every: int = _option(1, "rounds between checkpoints", least=1)
    seed: int = _option(0, "of everything random", least=0, most=2**63 - 1)
