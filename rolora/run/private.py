"""Differential privacy as a run's options say it (`rolora.federated.privacy`)."""

from __future__ import annotations

from rolora.config import Config, settled
from rolora.errors import BadInput
from rolora.federated.privacy import Privacy, smallest_noise


def with_noise(config: Config) -> Config:
    """The configuration with the noise multiplier that --dp-epsilon asks for; as it is without.

    Raises BadInput for an ε that no noise has. Needs the number of clients to be settled.
    """
    p, rounds = config.privacy, config.federation.rounds
    if p.dp_epsilon is None:
        return config
    try:
        noise = smallest_noise(p.dp_epsilon, _probability(config), rounds, p.dp_delta)
    except ValueError as error:
        raise BadInput(f"--dp-epsilon {p.dp_epsilon:g}: {error}") from None
    return config.with_values(dp_noise=noise)


def mechanism(config: Config) -> Privacy | None:
    """The privacy mechanism that the options name; None where they name none."""
    p = config.privacy
    if p.dp_clip is None:
        return None
    return Privacy(p.dp_clip, settled(p.dp_noise), p.dp_delta, _probability(config))


def most_releases(config: Config) -> int | None:
    """How often a run may release; None where nothing bounds it but its rounds."""
    return None if config.privacy.dp_epsilon is None else config.federation.rounds


def last_round(config: Config, releases: int, done: int) -> int:
    """The round that a run of `releases` so far, which stands after round `done`, ends with.

    With --dp-epsilon a run releases as often as it has rounds and no more: one that ran again
    takes the place of the last.
    """
    rounds = config.federation.rounds
    if config.privacy.dp_epsilon is None:
        return rounds
    return min(rounds, done + max(0, rounds - releases))


def text(config: Config, rounds: int, releases: int | None = None) -> str:
    """What a run promises after so many rounds, in words. `releases`: how many there are by then,
    where rounds that ran again have been charged.
    """
    privacy = settled(mechanism(config))
    sampled = "no amplification by sampling"
    if privacy.probability < 1:
        sampled = f"Poisson sampling at {privacy.probability:g}"
    computed = ""
    if config.privacy.dp_epsilon is not None:
        computed = (
            f" (the least that keeps --dp-epsilon {config.privacy.dp_epsilon:g}; a round that "
            "runs again is charged again and takes the place of the last)"
        )
    epsilon = privacy.epsilon(rounds if releases is None else releases)
    return (
        f"client-level (ε {epsilon:.3g}, δ {privacy.delta:g}) after {rounds} rounds: clip "
        f"{privacy.clip:g}, noise multiplier {privacy.noise:.6g}{computed}, {sampled}"
    )


def _probability(config: Config) -> float:
    """A client's probability of being asked in a round; 1 where sampling amplifies nothing."""
    f = config.federation
    return settled(f.clients_per_round) / f.clients if f.sampling == "poisson" else 1.0
