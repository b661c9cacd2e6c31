"""The names that options take: methods, kinds of task, benchmarks, and their like."""

# A task type is the name of a file in rolora/recipes, where its recipe says what it needs.
TASK_TYPES = ("classification", "multiple-choice", "causal-lm", "preference", "chat")
SCHEDULES = ("constant", "linear", "cosine")
METHODS = (
    "rolora",
    "fedavg",
    "ffa",
    "flexlora",
    "fedsvd",
    "flora",
    "fedex",
    "fedsa",
    "lora-a2",
    "fedrot",
    "la-lora",
    "fed-sb",
)
BENCHMARKS = (
    *("sst2", "qnli", "mnli", "qqp", "rte", "commonsense", "alpaca", "codealpaca"),
    *("flowertune-general", "flowertune-finance", "flowertune-medical", "flowertune-code"),
)
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
# Options that may name a folder or a file.
PLACES = (
    "model",
    "dataset",
    "train_file",
    "eval_file",
    "init_adapter",
    "output_dir",
    "secure_roster",
)
# How the speeds of simulated clients are drawn: see rolora/federated/buffered/clock.py.
SPEEDS = ("equal", "uniform", "lognormal", "tail")
INITS = ("kaiming", "gaussian", "orthogonal", "pissa")
# How a change is written in a message: each is a codec of rolora_kernels/codecs.py.
WIRES = ("fp32", "bf16", "fp16", "int8", "int4")
