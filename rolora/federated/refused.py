"""What one option asks of a method and of the other options: a function an option, which gives the
refusals. `compatibility` calls them where the option is given; none knows a method by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rolora.config import Config
from rolora.federated import methods
from rolora.federated.methods import Method


@dataclass(frozen=True)
class Refusal:
    """An option that a method cannot bear: why, and what to do instead."""

    flag: str
    why: str
    mend: str = "use rolora, ffa or fedavg"


def robust(method: Method, flag: str) -> Iterator[Refusal]:
    if method.collects:
        yield Refusal(flag, "a coordinate of a factor means nothing there")
    if method.selects:
        yield Refusal(flag, "clients send different ranks")


def private(method: Method) -> Iterator[Refusal]:
    """Privacy protects the noisy mean alone: nothing else that is made of one client's data may
    leave.
    """
    if method.collects:
        yield Refusal("--dp-clip", "it needs every client's own product")
    if method.selects:
        yield Refusal("--dp-clip", "which ranks a client sends is not private")
    if method.narrows:
        yield Refusal("--dp-clip", "its factors come from a gradient that nothing protects")
    if method.kept:
        yield Refusal("--dp-clip", "the run saves every client's own factors, unprotected")


def secure(method: Method) -> Iterator[Refusal]:
    """Under masks the server has the sum of changes as clients sent them, and nothing else."""
    if method.collects:
        yield Refusal("--secure-aggregation", "it needs every client's own change")
    if method.transforms:
        yield Refusal("--secure-aggregation", "it alters every client's change on the server")
    if method.selects:
        yield Refusal("--secure-aggregation", "which ranks a client sends tells it apart")


def handed_over(method: Method, flag: str) -> Iterator[Refusal]:
    """`flag`: the option that turns the factors."""
    if not method.alternates:
        able = " or ".join(name for name in methods.NAMES if methods.load(name).alternates)
        yield Refusal(flag, "it hands no factor over", f"use {able}")
    if method.turns:
        yield Refusal(flag, "it turns its factors itself", "leave it out")


def buffered(method: Method, config: Config) -> Iterator[Refusal]:
    """A late change is counted in a state that it was not computed from."""
    mend = "use rolora, ffa, fedavg or lora-a2"
    if method.turns or config.federation.hand_over:
        mend = f"leave {config.federation.turning} out" if config.federation.hand_over else mend
        yield Refusal("--buffer", "factors turn between rounds, and a late change does not", mend)
    elif method.collects or method.changes_base:
        yield Refusal("--buffer", "it needs every client's own product", mend)
    elif method.transforms:
        yield Refusal("--buffer", "it compares a change with what is published now", mend)
    elif method.kept:
        yield Refusal("--buffer", "clients are judged by factors that are still in training", mend)


def realigned(method: Method, config: Config) -> Iterator[Refusal]:
    """Moments are carried over from one factor that rests to another, or they are not."""
    if method.trains_both:
        yield Refusal(
            "--realign-moments", "no factor rests while the other one trains", "use rolora"
        )
    elif config.optimisation.carry_moments is False:
        yield Refusal(
            "--realign-moments", "--no-carry-moments leaves none", "leave one of them out"
        )
    elif config.optimisation.optimizer != "adamw":
        optimizer = f"--optimizer {config.optimisation.optimizer}"
        yield Refusal("--realign-moments", f"{optimizer} carries no moments", "use adamw")


def controlled(method: Method, config: Config) -> Iterator[Refusal]:
    """A client reads everybody's mean change from what is published."""
    flag, f, mend = "--control-variates", config.federation, "use rolora, ffa or fedavg"
    if method.turns or method.collects or method.transforms or method.changes_base:
        yield Refusal(flag, "what it publishes is not the mean of what clients did", mend)
    elif method.selects or f.client_ranks is not None:
        yield Refusal(flag, "clients send some ranks only", mend)
    for other, given, why in (
        (f.turning, f.hand_over is not None, "turns the factors between rounds"),
        ("--buffer", config.asynchrony.buffer is not None, "counts late changes"),
        ("--server-momentum", f.server_momentum > 0, "adds earlier changes to the mean"),
        ("--server-lr", f.server_lr != 1.0, "scales the mean"),
        ("--dp-clip", config.privacy.dp_clip is not None, "publishes a noisy mean"),
    ):
        if given:
            yield Refusal(flag, f"{other} {why}", "leave one of them out")


def fed_back(method: Method, config: Config) -> Iterator[Refusal]:
    """What was left of one change must mean something in the next."""
    if method.selects:
        yield Refusal("--error-feedback", "clients send some ranks of a change only")
    elif method.turns or (method.collects and not method.keeps_coordinates):
        yield Refusal("--error-feedback", "its factors turn from round to round")
    elif config.federation.hand_over and config.optimisation.local_coordinates:
        why = f"under {config.federation.turning} it follows the published factors, not others"
        yield Refusal("--error-feedback", why, "leave --local-coordinates out")


def narrowed(config: Config) -> Iterator[Refusal]:
    """Its factors are singular vectors of the first gradient, and no others."""
    a, why = config.adapter, "its factors come from the first gradient"
    if a.init == "pissa":
        yield Refusal("--init pissa", why, "leave it out")
    if a.init_adapter is not None:
        yield Refusal("--init-adapter", why, "leave it out")
