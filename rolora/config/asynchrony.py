"""What asynchronous rounds decide of other options, and what they exclude."""

from __future__ import annotations

from rolora.config.tree import Config
from rolora.errors import BadInput

EXPONENT = 0.5  # Nguyen et al. 2022: a weight of 1 / sqrt(1 + staleness)


def settle(config: Config) -> Config:
    """The configuration with the defaults of asynchronous rounds; raises BadInput."""
    own, f = config.asynchrony, config.federation
    if own.buffer is None:
        for flag, value in (
            ("--staleness-exponent", own.staleness_exponent),
            ("--staleness-limit", own.staleness_limit),
        ):
            if value is not None:
                raise BadInput(f"{flag} {value:g} needs --buffer: rounds that wait have none")
        return config
    for flag, used, why in (
        (
            f"--aggregation {f.aggregation}",
            f.aggregation != "mean",
            "it compares changes that were made of the same factors, unweighted: use mean",
        ),
        (
            "--sampling poisson",
            f.sampling == "poisson",
            "clients are asked one by one as others answer, and no cohort is drawn: use fixed",
        ),
        (
            f"--deadline {f.deadline}",
            f.deadline is not None,
            "nobody is waited for: leave it out, or refuse old answers by --staleness-limit",
        ),
        (
            "--dp-clip",
            config.privacy.dp_clip is not None,
            "who is in a sum depends on who answers when, which the accountant does not count: "
            "leave one of them out",
        ),
        (
            "--secure-aggregation",
            config.privacy.secure_aggregation,
            "masks are agreed among the clients of one round: leave one of them out",
        ),
        (
            f"--quorum {f.quorum}",
            f.quorum > own.buffer,
            f"a round ends after {own.buffer} answers: give at most {own.buffer}",
        ),
    ):
        if used:
            raise BadInput(f"{flag} does not go with --buffer: {why}")
    exponent = EXPONENT if own.staleness_exponent is None else own.staleness_exponent
    speeds = own.client_speeds or "equal"
    return config.with_values(staleness_exponent=exponent, client_speeds=speeds)
