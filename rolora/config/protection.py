"""What differential privacy and masked rounds decide of other options, and what they exclude."""

from __future__ import annotations

from rolora.config.tree import Config
from rolora.errors import BadInput


def settle(config: Config) -> Config:
    """The configuration with the defaults that depend on both; raises BadInput."""
    return _settle_secure(_settle_privacy(config))


def _settle_privacy(config: Config) -> Config:
    """Defaults that depend on privacy, and what it excludes."""
    f, private = config.federation, config.privacy.dp_clip is not None
    noise, epsilon = config.privacy.dp_noise, config.privacy.dp_epsilon
    if noise is not None and epsilon is not None:
        raise BadInput(
            f"--dp-epsilon {epsilon:g} and --dp-noise {noise:g} exclude each other: the noise is "
            "computed from ε; leave one of them out"
        )
    if private != (noise is not None or epsilon is not None):
        raise BadInput(
            "--dp-clip and --dp-noise are given together or not at all, or --dp-epsilon in the "
            "place of --dp-noise; --dp-noise 0 clips only"
        )
    if private:
        for flag, used, mend in (
            (f"--aggregation {f.aggregation}", f.aggregation != "mean", "use mean"),
            (
                "--weighting examples",
                f.weighting == "examples",
                "leave it out: weights are uniform",
            ),
            (
                f"--max-weight {f.max_weight}",
                f.max_weight is not None,
                "leave it out: weights are uniform",
            ),
            (
                f"--max-update-norm {config.exchange.max_update_norm}",
                (config.exchange.max_update_norm or 0) > 0,
                "leave it out: every change is clipped, and a bound made from others' changes "
                "would leak",
            ),
            (
                f"--quorum {f.quorum}",
                f.quorum > 1,
                "leave it out: who answers must not decide what is released",
            ),
        ):
            if used:
                raise BadInput(f"{flag} does not go with --dp-clip: {mend}")
    if f.sampling == "poisson" and f.clients_per_round is None:
        raise BadInput(
            "--sampling poisson needs --clients-per-round: how many take part on average"
        )
    if f.aggregation == "trimmed-mean" and f.trim_fraction == 0.0:
        raise BadInput(
            "--trim-fraction 0 trims nothing: give a part above 0, or --aggregation mean"
        )
    bound = config.exchange.max_update_norm
    if bound is None:
        bound = 0.0 if private or config.privacy.secure_aggregation else 10.0
    return config.with_values(
        weighting=f.weighting or ("uniform" if private else "examples"),
        quorum=0 if private else f.quorum,
        max_update_norm=bound,
    )


def _settle_secure(config: Config) -> Config:
    """What masked rounds exclude: whatever looks at one client's change."""
    f, p = config.federation, config.privacy
    if not p.secure_aggregation:
        for flag, value in (
            ("--secure-threshold", p.secure_threshold),
            ("--secure-neighbours", p.secure_neighbours),
            ("--secure-roster", p.secure_roster),
        ):
            if value is not None:
                raise BadInput(f"{flag} {value} needs --secure-aggregation")
        return config
    for flag, used, why in (
        (
            f"--aggregation {f.aggregation}",
            f.aggregation != "mean",
            "it compares changes: use mean",
        ),
        (
            f"--max-update-norm {config.exchange.max_update_norm}",
            (config.exchange.max_update_norm or 0) > 0,
            "the server sees no norm: leave it out",
        ),
        (
            f"--client-ranks {f.client_ranks}",
            f.client_ranks is not None,
            "the ranks that a client sends tell it apart: leave it out",
        ),
        (
            "--sampling poisson",
            f.sampling == "poisson",
            "a round of few clients could not be masked: use fixed",
        ),
        (
            f"--secure-neighbours {p.secure_neighbours}",
            (p.secure_neighbours or 0) % 2 == 1,
            "half of them are on either side: give an even number",
        ),
    ):
        if used:
            raise BadInput(f"{flag} does not go with --secure-aggregation: {why}")
    return config
