"""Named sets of options. Flags and TOML keys given beside a preset win over it.

Layers are parts of a model's depth, so that a preset does for models of any. What says how to train
and not on what (`WAYS`) can be added to another: `qnli-50-r4,paper`.
"""

from __future__ import annotations

from typing import Any

from rolora.config.parsing import nearest
from rolora.errors import BadInput

# Ways to train, on whatever.
WAYS: dict[str, dict[str, Any]] = {
    # Algorithm 1 as it is printed: the plain mean of one factor, B first, in published coordinates;
    # clients weigh alike, optimizers are new in every round, and nothing on the wire is rounded.
    "paper": dict(
        method="rolora",
        schedule="BA",
        balance=False,
        equal_factors=False,
        weighting="uniform",
        init="kaiming",
        carry_moments=False,
        realign_moments=False,
        local_coordinates=False,
        control_variates=False,
        server_momentum=0.0,
        server_lr=1.0,
        exchange_dtype="fp32",
    ),
}

PRESETS: dict[str, dict[str, Any]] = {
    # The embedded model and text: 12 packages over 10 label-skewed clients. The learning rate was
    # chosen on a validation slice (benchmarks/results/study/methods.md).
    "builtin": dict(
        task_type="classification",
        clients=10,
        rounds=20,
        local_steps=4,
        batch_size=8,
        partition="dirichlet",
        dirichlet_alpha=0.3,
        rank=4,
        alpha=16.0,
        target_modules="q_proj,v_proj",
        layers="last 3 of 6",
        lr=2e-2,
        max_length=48,
        lr_schedule="linear",
    ),
    # The paper, section 5: Llama-2-7B on eight merged commonsense sets, split evenly.
    "commonsense": dict(
        model="meta-llama/Llama-2-7b-hf",
        benchmark="commonsense",
        clients=50,
        rounds=10,
        local_steps=30,
        batch_size=1,
        partition="iid",
        rank=8,
        alpha=32.0,
        target_modules="q_proj,k_proj,v_proj,o_proj",
        layers="last 6 of 32",
        lr=5e-4,
        max_length=512,
        eval_max_examples=2000,
        eval_batch_size=8,
        eval_every=2,
    ),
}

# RoBERTa-large on GLUE: adapters on query and value of the last layers, 20 batches a round, rounds
# x clients constant. AdamW at 5e-4: the released SGD recipe did not learn in a reproduction. New
# heads train, as in several reproductions; --no-train-head is the released code's way.
_GLUE = {
    "sst2": ("last 6 of 24", 64),
    "qnli": ("last 9 of 24", 32),
    "mnli": ("last 9 of 24", 32),
    "qqp": ("last 9 of 24", 32),
    "rte": ("last 8 of 24", 32),
}
_ROUNDS = {3: (500, 200), 20: (75, 30), 50: (30, 12)}  # clients -> rounds; RTE's
for _task, (_layers, _batch) in _GLUE.items():
    for _clients, _rounds in _ROUNDS.items():
        for _rank in (4, 8):
            PRESETS[f"{_task}-{_clients}-r{_rank}"] = dict(
                model="FacebookAI/roberta-large",
                benchmark=_task,
                clients=_clients,
                rounds=_rounds[_task == "rte"],
                local_steps=20,
                batch_size=_batch,
                partition="iid",
                rank=_rank,
                alpha=4.0 * _rank,
                dropout=0.1,
                target_modules="query,value",
                layers=_layers,
                lr=5e-4,
                max_length=128,
                eval_every=max(1, _rounds[_task == "rte"] // 10),
            )

# Llama-2-7B on instructions; the number of clients and the rank are not given there: those of the
# commonsense recipe.
for _name in ("alpaca", "codealpaca"):
    PRESETS[_name] = PRESETS["commonsense"] | dict(
        model="meta-llama/Llama-2-7b-hf",
        benchmark=_name,
        rounds=100,
        layers="last 8 of 32",
        validation_fraction=0.02,
        eval_max_examples=500,
        eval_every=20,
    )

# FlowerTune's leaderboard as its template has it: (clients, of a round). Its programs train both
# factors; the rate is theirs, from 5e-5 to 1e-6, and AdamW starts anew in every round.
_FLOWERTUNE = {"general": (20, 2), "finance": (50, 5), "medical": (20, 2), "code": (10, 2)}
for _name, (_clients, _drawn) in _FLOWERTUNE.items():
    PRESETS[f"flowertune-{_name}"] = dict(
        model="mistralai/Mistral-7B-v0.3",
        quantize="nf4",
        gradient_checkpointing=True,
        benchmark=f"flowertune-{_name}",
        clients=_clients,
        clients_per_round=_drawn,
        rounds=200,
        local_steps=10,
        batch_size=16,
        partition="iid",
        rank=32,
        alpha=64.0,
        dropout=0.075,
        target_modules="q_proj,v_proj",
        lr=5e-5,
        lr_schedule="cosine",
        lr_end=0.02,
        carry_moments=False,
        max_length=512,
        validation_fraction=0.01,
        eval_max_examples=200,
        eval_every=20,
    )


def parts(names: str | None) -> list[str]:
    """The presets that a list separated by commas names, each known; raises BadInput."""
    known = [*PRESETS, *WAYS]
    found = [] if names is None else [name.strip() for name in names.split(",")]
    for name in found:
        if name not in known:
            raise BadInput(
                f"preset {name!r} is not one of {', '.join(known)}{nearest(name, known)}"
            )
    if len([name for name in found if name in PRESETS]) > 1 or len(set(found)) < len(found):
        raise BadInput(
            f"--preset {names}: expected one preset, and ways to train beside it: {', '.join(WAYS)}"
        )
    return found


def values(names: str | None) -> dict[str, Any]:
    """The options of the presets named; a way to train wins over what is trained."""
    found = parts(names)
    result: dict[str, Any] = {}
    for name in sorted(found, key=lambda name: name in WAYS):
        result |= PRESETS[name] if name in PRESETS else WAYS[name]
    return result


def names_data(names: str | None) -> bool:
    """Whether one of the presets named says what is trained."""
    return any(name in PRESETS for name in parts(names))


def added(name: str, names: str | None) -> str:
    """A preset beside those that were named."""
    return ",".join([name, *parts(names)])
