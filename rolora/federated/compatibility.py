"""What cannot be combined with a method, told from the facts that the method states about itself.

The one place that refuses combinations, for shipped methods and for files of one's own alike. It
knows no method by name. `settle` also fills in the options whose default depends on the method.
"""

from __future__ import annotations

from collections.abc import Iterator

from rolora.config import Config, parse_ranks
from rolora.config.options import Optimisation
from rolora.errors import BadInput
from rolora.federated import methods, refused
from rolora.federated.methods import Method
from rolora.federated.refused import Refusal

_BETA2 = Optimisation().beta2


def settle(config: Config) -> Config:
    """The configuration with what its method decides filled in; raises BadInput for what the method
    cannot do.

    Settling twice changes nothing.
    """
    method = load(config)
    f, o = config.federation, config.optimisation
    for refusal in refusals(method, config):
        raise BadInput(
            f"{refusal.flag} does not go with --method {f.method} ({refusal.why}): {refusal.mend}"
        )
    if f.balance and f.equal_factors:
        raise BadInput(
            "--balance and --equal-factors exclude each other: a hand-over turns the factors once"
        )
    if o.carry_moments and o.optimizer != "adamw":
        raise BadInput(
            f"--carry-moments does not go with --optimizer {o.optimizer}, which has none: use adamw"
        )
    if o.beta2 != _BETA2 and o.optimizer != "adamw":
        raise BadInput(
            f"--beta2 {o.beta2:g} does not go with --optimizer {o.optimizer}, which has none: use "
            "adamw"
        )
    for rank in parse_ranks(f.client_ranks) or ():
        if rank > config.adapter.rank:
            raise BadInput(
                f"--client-ranks {f.client_ranks}: {rank} is over --rank {config.adapter.rank}"
            )
    if o.local_coordinates is None:
        # With SGD worth 2 to 10 points on the digits, with AdamW nothing
        # (benchmarks/results/study/methods.md).
        wanted = method.alternates and o.optimizer == "sgd" and f.hand_over is None
        config = config.with_values(local_coordinates=wanted)
    # What may be worth having stays None: the job decides, by what clients would keep for it.
    if o.carry_moments is None and o.realign_moments:
        config = config.with_values(carry_moments=True)  # which is what it asks for
    elif o.carry_moments is None and not _may_carry(method, config):
        config = config.with_values(carry_moments=False)
    if f.equal_factors is None and not _may_equal(method, config):
        config = config.with_values(equal_factors=False)
    if o.realign_moments is None and not _may_realign(method, config):
        config = config.with_values(realign_moments=False)
    if o.control_variates is None and not _may_control(method, config):
        config = config.with_values(control_variates=False)
    return config


def load(config: Config) -> Method:
    """The method that the configuration names; raises BadInput for a file that is none."""
    f = config.federation
    try:
        return methods.load(f.method, f.schedule, f.hand_over)
    except ValueError as error:
        raise BadInput(f"--{error}") from None


def require_processes(method: Method, config: Config, ranks: bool, elsewhere: bool) -> None:
    """Raises BadInput for what needs all clients in one process, where they are on `ranks` of
    torchrun or `elsewhere`, with other owners.
    """
    f = config.federation
    if ranks and (f.aggregation != "mean" or method.collects):
        rule = f"--aggregation {f.aggregation}"
        what = rule if f.aggregation != "mean" else f"--method {f.method}"
        raise BadInput(
            f"{what} needs every client's change in one process, and ranks exchange one sum: run "
            "it without torchrun"
        )
    if ranks and config.privacy.secure_aggregation:
        raise BadInput(
            "--secure-aggregation does not go with torchrun, whose ranks see their clients' "
            "changes: run it in one process or over Flower"
        )
    if config.asynchrony.buffer is not None and (ranks or elsewhere):
        where = "ranks, which train one cohort together" if ranks else "clients elsewhere"
        raise BadInput(
            f"--buffer {config.asynchrony.buffer} does not go with {where}: its clock is simulated "
            "and all clients are asked from one process: leave it out, or run it in one process"
        )
    if config.asynchrony.client_speeds is not None and elsewhere:
        raise BadInput(
            f"--client-speeds {config.asynchrony.client_speeds} simulates a clock, and clients "
            "elsewhere have their own: leave it out"
        )
    if config.privacy.secure_roster is not None and not elsewhere:
        raise BadInput(
            "--secure-roster is for clients elsewhere (rolora.worker), who hold keys of their own: "
            "here server and clients are one process"
        )
    if method.kept and (ranks or elsewhere):
        raise BadInput(
            f"--method {f.method} keeps factors with the clients, which this run saves: run it in "
            "one process"
        )


def refusals(method: Method, config: Config) -> Iterator[Refusal]:
    """Every option of the configuration that the method's facts exclude."""
    f = config.federation
    if f.aggregation != "mean":
        yield from refused.robust(method, f"--aggregation {f.aggregation}")
    if config.privacy.dp_clip is not None:
        yield from refused.private(method)
    if config.privacy.secure_aggregation:
        yield from refused.secure(method)
    if (f.server_momentum > 0 or f.server_lr != 1.0) and method.collects:
        yield Refusal("--server-momentum", "its factors turn from round to round")
    if f.hand_over is not None:
        yield from refused.handed_over(method, f.turning)
    if config.asynchrony.buffer is not None:
        yield from refused.buffered(method, config)
    if config.optimisation.local_coordinates and method.trains_both:
        yield Refusal("--local-coordinates", "both factors train")
    if config.adapter.init == "pissa" and method.changes_base:
        yield Refusal("--init pissa", "it changes the base by itself", "use kaiming")
    if config.optimisation.realign_moments:
        yield from refused.realigned(method, config)
    if config.optimisation.control_variates:
        yield from refused.controlled(method, config)
    if config.optimisation.carry_moments and _turns(method, config):
        why = "under it, a hand-over or --local-coordinates factors turn from round to round"
        mend = "leave one of them out"
        if not any(refused.realigned(method, config)):
            mend += ", or have moments follow by --realign-moments"
        yield Refusal("--carry-moments", why, mend)
    if config.exchange.error_feedback:
        yield from refused.fed_back(method, config)
    if method.narrows:
        yield from refused.narrowed(config)
    if f.client_ranks is not None and not method.takes_client_ranks:
        able = ", ".join(name for name in methods.NAMES if methods.load(name).takes_client_ranks)
        yield Refusal("--client-ranks", "every client trains the whole factor", f"use {able}")


def _turns(method: Method, config: Config) -> bool:
    """Whether a moment of one round means nothing in the coordinates of the next."""
    o = config.optimisation
    if o.realign_moments or (o.realign_moments is None and config.federation.equal_factors):
        return False  # it follows them
    if config.federation.hand_over or config.optimisation.local_coordinates:
        return True
    return method.turns or (method.collects and not method.keeps_coordinates)


def _may_carry(method: Method, config: Config) -> bool:
    adamw = config.optimisation.optimizer == "adamw"
    return method.carries and adamw and not _turns(method, config)


def _may_equal(method: Method, config: Config) -> bool:
    """Whether factors of equal size are worth having: up to 13 points with AdamW
    (benchmarks/results/STUDY.md). Not beside what excludes it, nor under privacy, where it was not
    tried.
    """
    f, o = config.federation, config.optimisation
    against = (
        f.balance,
        o.carry_moments and o.realign_moments is False,
        o.local_coordinates,
        o.control_variates,
        config.privacy.dp_clip is not None,
        config.asynchrony.buffer is not None,
        len(set(f.schedule)) == 1,  # so that one factor never rests
        *refused.handed_over(method, "--equal-factors"),
        method.trains_both,
    )
    return method.carries and o.optimizer == "adamw" and not any(against)


def _may_realign(method: Method, config: Config) -> bool:
    """Whether carried moments are to follow: only factors of equal size ask for it."""
    equal = config.federation.equal_factors is not False
    return equal and not any(refused.realigned(method, config))


def _may_control(method: Method, config: Config) -> bool:
    """Whether control variates may be worth having: 0 to 12 points on images with SGD, where all
    clients take part, which the job knows; nothing with AdamW (benchmarks/results/STUDY.md).
    """
    sgd = config.optimisation.optimizer == "sgd"
    able = config.federation.aggregation == "mean"
    able = able and not any(refused.controlled(method, config))
    return method.alternates and sgd and able
