"""Options of who trains what, how, and what of it travels."""

from __future__ import annotations

from dataclasses import dataclass

from rolora.config.options.declared import option
from rolora.config.options.names import INITS, METHODS, SCHEDULES, WIRES


@dataclass(frozen=True)
class Federation:
    """Federation"""

    method: str = option(
        "rolora",
        "how factors are trained and combined, or FILE.py: a method of your own",
        choices=METHODS,
    )
    schedule: str = option(
        "BA", "rolora, lora-a2: the factors of successive rounds, repeated", metavar="BA|BBA|…"
    )
    balance: bool = option(
        False, "rolora, lora-a2: make a factor orthonormal, up to a scalar, before it is frozen"
    )
    equal_factors: bool | None = option(
        None,
        "rolora, lora-a2: give both factors the same size before one is frozen, B = U √S and "
        "A = √S Vᵀ of the product's SVD (rolora does with --optimizer adamw. Where all clients "
        "take part in every round: if their moments may follow, and fit in 1 GiB with the factors "
        "that rest. Where clients are drawn: if they are asked to keep nothing. Not with "
        "--balance, --buffer, --dp-clip, --control-variates or --local-coordinates)",
    )
    client_ranks: str | None = option(
        None, "flexlora, flora, lora-a2: ranks of clients 0, 1, …, repeated", metavar="2,4,8"
    )
    clients: int = option(10, "how many there are", least=1, most=10**9)
    clients_per_round: int | None = option(
        None, "how many take part in a round; all if not given", least=1
    )
    membership: str | None = option(
        None,
        "who comes and goes: 3:+8-9,5:-0 has clients 8 and 9 come before round 3 and client 0 "
        "leave before round 5; open, over Flower: whoever is there",
        metavar="EVENTS|FILE|open",
    )
    rounds: int = option(
        20, "communication rounds; two make one iteration of RoLoRA", least=1, most=10**9
    )
    local_steps: int = option(10, "optimizer steps of a client in a round", least=1, most=10**9)
    local_epochs: int | None = option(
        None, "passes over the client's data instead of --local-steps", least=1
    )
    batch_size: int = option(16, "examples a batch", least=1, most=10**9)
    pad_to_multiple_of: int | None = option(
        None,
        "tokens: batches to train on are padded to a multiple of so many; to the longest example "
        "if not given, with --cuda-graphs to one of eight lengths at most",
        least=1,
        most=1 << 20,
    )
    gradient_accumulation: int = option(1, "batches an optimizer step", least=1, most=10**9)
    partition: str = option(
        "iid",
        "how examples are split over clients",
        choices=("iid", "dirichlet", "shards", "column"),
    )
    dirichlet_alpha: float = option(
        0.5, "label skew of --partition dirichlet; small is skewed", above=0
    )
    shards_per_client: int = option(
        2, "labels a client sees, about, with --partition shards", least=1
    )
    sampling: str = option(
        "fixed",
        "who takes part: so many, or each by itself with that probability",
        choices=("fixed", "poisson"),
    )
    quorum: int = option(
        1, "accepted updates that a round needs; one without them is repeated", least=0
    )
    deadline: float | None = option(
        None, "seconds after which a round waits for nobody", above=0, metavar="SECONDS"
    )
    aggregation: str = option(
        "mean",
        "how changes become one; median and trimmed-mean bear a few wrong clients",
        choices=("mean", "median", "trimmed-mean"),
    )
    trim_fraction: float = option(
        0.1, "trimmed-mean: part of the clients dropped at either end", least=0, most=0.49
    )
    weighting: str | None = option(
        None,
        "a client's share in the mean; examples, but uniform with --dp-clip",
        choices=("examples", "uniform"),
    )
    max_weight: int | None = option(
        None, "examples that a client's weight counts at most", least=1, most=2**31 - 1
    )
    server_momentum: float = option(
        0.0,
        "FedAvgM: a moment for each factor, which rests while the factor does",
        least=0,
        most=0.999,
    )
    server_lr: float = option(1.0, "what the mean change is multiplied by", above=0, most=1e6)

    @property
    def hand_over(self) -> str | None:
        """The option by which factors turn before one is frozen; None where they stay."""
        return next((name for name in ("balance", "equal_factors") if getattr(self, name)), None)

    @property
    def turning(self) -> str:
        """That option as a flag; empty where factors stay."""
        return "" if self.hand_over is None else "--" + self.hand_over.replace("_", "-")


@dataclass(frozen=True)
class Adapter:
    """LoRA"""

    rank: int = option(8, "r", least=1, most=65_536)
    alpha: float = option(16.0, "the path is scaled by alpha / rank", above=0, most=1e6)
    rslora: bool = option(False, "scale by alpha / sqrt(rank)")
    dropout: float = option(0.0, "on the input of the LoRA path", least=0, most=1)
    init: str = option(
        "kaiming", "of A, with B zero; pissa: both from the singular vectors of W", choices=INITS
    )
    init_adapter: str | None = option(None, "start from this PEFT folder", metavar="DIR")
    target_modules: str = option(
        "auto",
        "names, a regular expression, all-linear, none, or auto: query and value",
        metavar="q_proj,v_proj",
    )
    target_parameters: str | None = option(
        None,
        "parameters that no linear owns, such as a mixture's experts, by the ends of their paths",
        metavar="experts.gate_up_proj,experts.down_proj",
    )
    layers: str | None = option(
        None,
        "blocks to adapt, or such a part of them as 'last 6 of 24'; all if not given",
        metavar="18-23",
    )
    train_head: bool | None = option(
        None, "train and send the classification head (if the checkpoint lacks one)"
    )


@dataclass(frozen=True)
class Optimisation:
    """Optimisation"""

    optimizer: str = option("adamw", "of every client", choices=("adamw", "sgd"))
    lr: float | None = option(
        None,
        "learning rate; if not given one that fits the optimizer, the width of the adapted linears "
        "and alpha / rank, which --dry-run shows",
        above=0,
        most=1e30,
    )
    lr_a: float | None = option(
        None, "learning rate of rounds that train A; --lr if not given", above=0, most=1e30
    )
    lr_b: float | None = option(
        None, "learning rate of rounds that train B; --lr if not given", above=0, most=1e30
    )
    lr_schedule: str = option(
        "constant", "over the rounds; linear and cosine end at --lr-end", choices=SCHEDULES
    )
    lr_end: float = option(
        0.1, "part of the rate at which linear and cosine schedules end", least=0, most=1
    )
    lr_schedule_a: str | None = option(
        None, "of rounds that train A; --lr-schedule if not given", choices=SCHEDULES
    )
    lr_schedule_b: str | None = option(
        None, "of rounds that train B; --lr-schedule if not given", choices=SCHEDULES
    )
    weight_decay: float = option(0.0, "on what trains only", least=0, most=1e6)
    max_grad_norm: float = option(1.0, "gradient clipping; 0 for none", least=0)
    carry_moments: bool | None = option(
        None,
        "adamw: clients keep the moments of a factor from its last round to its next (rolora does, "
        "up to 1 GiB for all clients, unless factors turn and moments do not follow, as where "
        "clients are drawn)",
    )
    realign_moments: bool | None = option(
        None,
        "one factor trains: moments that are carried follow what the resting factor became, also "
        "with --balance and --local-coordinates (they do with --equal-factors where all clients "
        "take part)",
    )
    beta2: float = option(
        0.999,
        "adamw: how slowly second moments forget; 1 / (1 - it) is about how many steps they "
        "remember",
        least=0,
        most=0.999999,
    )
    control_variates: bool | None = option(
        None,
        "a client's local steps are corrected by where its own went in its last round, beside "
        "everybody's (SCAFFOLD); nothing more is sent, and clients keep twice what they send "
        "(rolora does with --optimizer sgd where all clients take part in every round, up to 1 GiB "
        "for all of them)",
    )
    local_coordinates: bool | None = option(
        None,
        "one factor trains: clients do so in orthonormal coordinates of the frozen one (rolora "
        "and lora-a2 do with --optimizer sgd, unless with --balance or --equal-factors)",
    )


@dataclass(frozen=True)
class Exchange:
    """Exchange"""

    exchange_dtype: str = option(
        "int8",
        "of the changes on the wire, both ways; int8 has a scale for every 256 values",
        choices=WIRES,
    )
    error_feedback: bool = option(
        False, "clients send what rounding left of a change with their next one of that factor"
    )
    max_update_norm: float | None = option(
        None,
        "reject a change whose norm is over so many times the running median of its phase, after "
        "two rounds of it; 0 never "
        "(10; 0 with --dp-clip)",
        least=0,
    )


@dataclass(frozen=True)
class Privacy:
    """Privacy"""

    dp_clip: float | None = option(
        None,
        "clip every change to this L2 norm on the server; switches it on",
        above=0,
        most=1e6,
    )
    dp_noise: float | None = option(
        None,
        "noise multiplier: standard deviation of the sum's noise over --dp-clip",
        least=0,
        most=1e6,
    )
    dp_epsilon: float | None = option(
        None,
        "the ε at --dp-delta that all rounds together may spend, in the place of --dp-noise, which "
        "is computed from it, the rounds and the sampling",
        above=0,
        most=1e6,
    )
    dp_delta: float = option(1e-5, "δ, for which ε is told each round", above=0, most=0.5)
    secure_aggregation: bool = option(
        False, "clients mask their changes, so that the server learns the sum alone"
    )
    secure_threshold: int | None = option(
        None,
        "clients that must stay to the end of a masked round; more than half of those asked (two "
        "thirds of --clients-per-round)",
        least=2,
    )
    secure_neighbours: int | None = option(
        None,
        "how many others a client shares its secrets with, an even number, for large rounds; all "
        "if not given",
        least=4,
    )
    secure_roster: str | None = option(
        None,
        "clients elsewhere sign their keys of masked rounds: a line a client, its number and its "
        "public key as ssh-keygen writes it",
        metavar="FILE",
    )
