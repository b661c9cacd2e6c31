"""The suite's jobs, as data: what is trained, on what, split how, and on which side of the study.

Defaults are chosen on the jobs of one side and reported on those of the other. What the first study
had seen, the built-in classification and the digits, can only choose. `minutes` is one run on one
core, reckoned from few of them beside other work; it orders nothing and judges nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

CHOOSE, JUDGE = "choose", "judge"
SIDES = (CHOOSE, JUDGE)


@dataclass(frozen=True)
class Job:
    """One job.

    options: of `rolora.train`, beside the text's own. text: a text of `texts.TEXTS`, trained with a
    pre-trained encoder, or with the built-in model where the task is next tokens; None for what
    ships with the program. split: of images, trained with the two-layer network, or None; images:
    which (`images.load`).
    rates: every method's rate is chosen from these, so each has as many tries. tuning: runs that
    judge a rate.
    """

    name: str
    side: str
    minutes: float
    rates: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None
    split: str | None = None
    images: str = "digits"
    tuning: int = 1

    @property
    def kind(self) -> str:
        """What a default may depend on: the optimizer, and whether all clients take part."""
        optimizer = "SGD" if self.split is not None else "AdamW"
        return f"{optimizer}, {'all' if self.options.get('clients_per_round') is None else 'some'}"


_BUILTIN_RATES = (5e-3, 1e-2, 2e-2, 4e-2)
_ENCODER_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
_DIGITS_RATES = (0.03, 0.1, 0.5, 2.0, 8.0)

# What all runs have: a rate falls to a tenth.
COMMON: dict[str, Any] = dict(
    lr_schedule="linear", batch_size=8, rank=4, alpha=16.0, max_length=48, dtype="fp32"
)
# Of the jobs that ran first. A CPU that does not multiply in bf16 is several times as slow in it.
_BF16: dict[str, Any] = dict(dtype="bf16")

_ENCODER: dict[str, Any] = dict(
    layers="last 2 of 6", batch_size=4, max_length=32, eval_max_examples=800
)

# Partition, as options. A text's column says whose it is: six reviews' owner, a book.
_SKEWS: dict[str, dict[str, Any]] = {
    "d.1": dict(partition="dirichlet", dirichlet_alpha=0.1),
    "d.3": dict(partition="dirichlet", dirichlet_alpha=0.3),
    "column": dict(partition="column", client_column="owner"),
}
# Participation: all of ten clients, or a tenth of fifty.
_TAKING_PART: dict[str, dict[str, Any]] = {
    "all": dict(clients=10),
    "tenth": dict(clients=50, clients_per_round=5),
}
# Local steps, and rounds so that a run stays short.
IMAGES_ROUNDS = {"digits": 60, "mnist": 30}
_ROUNDS = {1: 60, 6: 30, 30: 10}


def _encoder(
    text: str, side: str, skew: str, part: str, steps: int, minutes: float, **own: Any
) -> Job:
    """A job of the pre-trained encoder on one text."""
    taking = dict(_TAKING_PART[part])
    if skew == "column":  # the column says how many there are
        taking = {} if part == "all" else {"clients_per_round": 5}
    options = _ENCODER | _SKEWS[skew] | taking | dict(local_steps=steps, rounds=_ROUNDS[steps])
    options |= own
    name = f"{text}-{skew}-{part}-{steps}"
    return Job(name, side, minutes, _ENCODER_RATES, options, text=text)


def _digits(split: str) -> Job:
    return Job(f"digits-{split}", CHOOSE, 0.2, _DIGITS_RATES, split=split, tuning=2)


def _mnist(split: str) -> Job:
    return Job(f"mnist-{split}", JUDGE, 0.3, _DIGITS_RATES, split=split, images="mnist")


_TOKENS: dict[str, Any] = dict(
    task_type="causal-lm", local_steps=6, rounds=20, layers="last 3 of 6"
)
_BUILTIN: dict[str, Any] = dict(
    task_type="classification", layers="last 3 of 6", target_modules="q_proj,v_proj"
)


def _text_tokens(text: str, side: str, steps: int) -> Job:
    """Next tokens of a text: every owner is a client, and five of them take part in a round."""
    options = _TOKENS | _SKEWS["column"] | dict(clients_per_round=5)
    options |= dict(local_steps=steps, rounds=_ROUNDS[steps])
    return Job(f"{text}-tokens-{steps}", side, 0.4, _BUILTIN_RATES, options, text=text)


JOBS: tuple[Job, ...] = (
    Job(
        "builtin",
        CHOOSE,
        0.3,
        _BUILTIN_RATES,
        _BUILTIN | _BF16 | _SKEWS["d.3"] | dict(clients=10, local_steps=6, rounds=20),
    ),
    Job(
        "builtin-d.1-tenth",
        CHOOSE,
        0.3,
        _BUILTIN_RATES,
        _BUILTIN | _BF16 | _SKEWS["d.1"] | _TAKING_PART["tenth"] | dict(local_steps=6, rounds=60),
    ),
    _digits("10x1"),
    _digits("5x2"),
    _digits("iid"),
    _encoder("reviews", CHOOSE, "d.1", "all", 6, 2.0, **_BF16),
    _encoder("reviews", CHOOSE, "d.3", "all", 30, 3.3),
    _encoder("reviews", CHOOSE, "column", "all", 1, 3.3),
    _encoder("reviews", CHOOSE, "d.1", "tenth", 30, 1.7),
    _encoder("reviews", CHOOSE, "d.3", "tenth", 6, 1.0, **_BF16),
    _encoder("reviews", CHOOSE, "column", "tenth", 6, 1.0, **_BF16),
    Job(
        "tokens-iid-all",
        CHOOSE,
        0.4,
        _BUILTIN_RATES,
        _TOKENS | dict(partition="iid", clients=10),
    ),
    _text_tokens("reviews", CHOOSE, 6),
    Job(
        "tokens-column-all",
        JUDGE,
        0.4,
        _BUILTIN_RATES,
        _TOKENS | dict(partition="column", client_column="label"),
    ),
    _mnist("10x1"),
    _mnist("5x2"),
    _mnist("iid"),
    _text_tokens("verses", JUDGE, 6),
    _text_tokens("verses", JUDGE, 30),
    _encoder("verses", JUDGE, "d.1", "all", 30, 3.3),
    _encoder("verses", JUDGE, "d.3", "all", 6, 2.0),
    _encoder("verses", JUDGE, "column", "all", 1, 4.3),
    _encoder("verses", JUDGE, "d.1", "tenth", 6, 1.0),
    _encoder("verses", JUDGE, "d.3", "tenth", 30, 1.7),
    _encoder("verses", JUDGE, "column", "tenth", 1, 0.5),
)


def shortened(job: Job) -> Job:
    """A job of seconds that goes the same way: one rate, two clients, one step a round, and few
    held-out examples.
    """
    own = dict(clients=2, clients_per_round=2, local_steps=1, partition="iid", client_column=None)
    own |= dict(eval_max_examples=16, max_length=16)
    options = job.options if job.split is not None else {**job.options, **own}
    return replace(job, rates=job.rates[:1], tuning=1, options=options)


def chosen(side: str | None, names: str | None) -> list[Job]:
    """The jobs of a side, or of both, whose names hold one of the comma-separated parts. A part
    that is the whole name of a job means that one alone.
    """
    parts = [part.strip() for part in (names or "").split(",") if part.strip()]
    whole = {job.name for job in JOBS}

    def asked(name: str) -> bool:
        return any(part == name if part in whole else part in name for part in parts)

    return [job for job in JOBS if side in (None, job.side) and (not parts or asked(job.name))]
