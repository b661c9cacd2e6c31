"""`python -m rolora.experiments.linear`: the linear regressor of the paper's theory, RoLoRA beside
FFA-LoRA.

    Y_i = X_i a* b_i*ᵀ,  X_i [m, d] standard Gaussian, drawn anew in every iteration,  ‖a‖ = ‖a*‖ =
    1          (section 4)
    loss of client i: (1/m) ‖Y_i − X_i a bᵀ‖²

RoLoRA (Algorithm 2): clients solve for b exactly and the server averages b; clients take one step
of gradient descent in a (η times the gradient of half the loss, as the analysis' η ≤ 1/L² has it),
the server averages and normalises a. FFA-LoRA leaves a where it starts. δ_t = ‖(I − a* a*ᵀ) a_t‖ is
the sine of the angle between a_t and a*. NumPy float64.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rolora import cli
from rolora.errors import BadInput

_CROSSED = "is crossed: m is too small for it"
_ROUNDING = 1e-12  # δ_0 = .8 comes out as .8000000000000002 on some processors

HELP = """The linear regressor of RoLoRA's theory: how fast the angle closes, against Lemma 4.3's
bound, and where FFA-LoRA stays; and Proposition 4.6 by simulation."""
FLAGS = [
    cli.Flag(["--dimension", "d"], type=int, default=20, help="d  [20]"),
    cli.Flag(
        ["--samples", "m"], type=int, default=400, help="m, of every client and iteration  [400]"
    ),
    cli.Flag(["--clients", "N"], type=int, default=5, help="N  [5]"),
    cli.Flag(["--eta"], type=float, default=0.5, help="step in a, at most 1 / ‖b*‖²  [0.5]"),
    cli.Flag(["--delta", "delta"], type=float, default=0.8, help="δ_0, in (0, 1)  [0.8]"),
    cli.Flag(
        ["--gamma"],
        type=float,
        default=0.0,
        help="heterogeneity: γ² is the mean of ‖b_i* − b̄*‖²  [0]",
    ),
    cli.Flag(["--iterations"], type=int, default=40, help="[40]"),
    cli.Flag(
        ["--repetitions"], type=int, default=20_000, help="draws for Proposition 4.6  [20000]"
    ),
    cli.Flag(["--seed"], type=int, default=0, help="[0]"),
    cli.Flag(["--output-dir"], metavar="DIR", help="write linear.png and linear.csv there"),
]


@dataclass(frozen=True)
class Problem:
    """a* `[d]` and b* `[N, d]`, one row a client; `start` is a_0, δ_0 away from a*."""

    a: np.ndarray
    b: np.ndarray
    start: np.ndarray

    @property
    def mean_b(self) -> np.ndarray:
        return self.b.mean(0)

    @property
    def gamma_squared(self) -> float:
        return float(((self.b - self.mean_b) ** 2).sum(1).mean())


def problem(d: int, clients: int, delta: float, gamma: float, rng: np.random.Generator) -> Problem:
    """A random problem with ‖b̄*‖ = 1, the given γ and δ_0."""
    a = _unit(rng.normal(size=d))
    aside = rng.normal(size=d)
    start = math.sqrt(1 - delta**2) * a + delta * _unit(aside - (aside @ a) * a)
    spread = rng.normal(size=(clients, d))
    spread -= spread.mean(0)
    scale = math.sqrt((spread**2).sum(1).mean())
    if gamma > 0 and scale > 0:
        spread *= gamma / scale
    else:
        spread[:] = 0.0
    return Problem(a, _unit(rng.normal(size=d)) + spread, start)


def rolora(
    p: Problem, m: int, eta: float, iterations: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(a_t, b_t) after each iteration of Algorithm 2."""
    a = p.start
    for _ in range(iterations):
        inputs = rng.normal(size=(len(p.b), m, len(a)))
        b = solved(p, a, inputs)
        inputs = rng.normal(size=inputs.shape)
        residuals = (inputs @ a)[:, :, None] * b - (inputs @ p.a)[:, :, None] * p.b[
            :, None, :
        ]  # [N, m, d]
        gradient = np.einsum("nmk,nmd,d->k", inputs, residuals, b) / (m * len(p.b))
        a = _unit(a - eta * gradient)
        yield a, b


def solved(p: Problem, a: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """The mean over clients of each client's exact least-squares b for this a; inputs `[N, m,
    d]`.
    """
    along, wanted = inputs @ a, inputs @ p.a
    return (((along * wanted).sum(1) / (along**2).sum(1))[:, None] * p.b).mean(0)


def distance(p: Problem, a: np.ndarray) -> float:
    """δ: the sine of the angle between a and a*."""
    return float(np.linalg.norm(a - (a @ p.a) * p.a))


def population_loss(p: Problem, a: np.ndarray, b: np.ndarray) -> float:
    """The mean over clients of E ‖X a* b_i*ᵀ − X a bᵀ‖² / m = ‖a* b_i*ᵀ − a bᵀ‖²."""
    return float(np.mean([((np.outer(p.a, own) - np.outer(a, b)) ** 2).sum() for own in p.b]))


def best_loss(p: Problem, a: np.ndarray) -> float:
    """The population loss at the best b for this a: γ² + ‖b̄*‖² δ²."""
    return population_loss(p, a, (a @ p.a) * p.mean_b)


def stays_under(angles: Sequence[float], limits: Sequence[float]) -> bool:
    """Whether no angle passes its limit, but for what fp64 arithmetic rounds."""
    pairs = zip(angles, limits, strict=True)
    return all(angle <= limit * (1 + _ROUNDING) + _ROUNDING for angle, limit in pairs)


def bound(delta: float, eta: float, norm: float, iterations: int) -> np.ndarray:
    """Lemma 4.3, applied t times: δ_0 (1 − η (1 − δ_0²) ‖b*‖²)^{t/2}, `[iterations + 1]`."""
    return delta * np.sqrt(1 - eta * (1 - delta**2) * norm**2) ** np.arange(iterations + 1)


def proposition(clients: int, m: int, delta: float, norm: float = 1.0) -> float:
    """Proposition 4.6: FFA-LoRA's expected loss on the samples it solved on, (1 + c̃) ‖b*‖²
    δ_0².
    """
    if m < 3:
        raise ValueError(f"the proposition needs m of 3 or more, got {m}")
    return (1 + (clients * (4 - m) - 2) / (clients**2 * m * (m - 2))) * norm**2 * delta**2


def simulated(
    clients: int, m: int, delta: float, repetitions: int, rng: np.random.Generator
) -> tuple[float, float]:
    """(mean, its standard error) of that loss over fresh draws: a_0 and a* span a plane, so two
    dimensions suffice.
    """
    losses = np.empty(repetitions)
    for start in range(0, repetitions, 4096):
        count = min(4096, repetitions - start)
        along, aside = rng.normal(size=(2, count, clients, m))
        wanted = math.sqrt(1 - delta**2) * along + delta * aside  # X a*, where `along` is X a_0
        share = ((along * wanted).sum(2) / (along**2).sum(2)).mean(1)  # b = share · b*
        losses[start : start + count] = ((wanted - share[:, None, None] * along) ** 2).mean((1, 2))
    return float(losses.mean()), float(losses.std(ddof=1) / math.sqrt(repetitions))


def linear(
    d: int,
    m: int,
    N: int,
    eta: float,
    delta: float,
    gamma: float,
    iterations: int,
    repetitions: int,
    seed: int,
    output_dir: str | None,
) -> int:
    for flag, value, fits, wanted in (
        ("--dimension", d, d >= 2, "2 or more"),
        ("--samples", m, m >= 3, "3 or more"),
        ("--clients", N, N >= 1, "1 or more"),
        ("--delta", delta, 0 < delta < 1, "a number between 0 and 1"),
        ("--eta", eta, 0 < eta <= 1, "more than 0 and at most 1"),
        (
            "--gamma",
            gamma,
            gamma >= 0 and (gamma == 0 or N > 1),
            "0, or more than 0 with two clients or more",
        ),
        ("--iterations", iterations, iterations >= 1, "1 or more"),
        ("--repetitions", repetitions, repetitions >= 2, "2 or more"),
    ):
        if not fits:
            raise BadInput(f"{flag} {value}: expected {wanted}")
    rng = np.random.default_rng(seed)
    p = problem(d, N, delta, gamma, rng)
    steps = [(p.start, p.mean_b), *rolora(p, m, eta, iterations, rng)]
    angles = [distance(p, a) for a, _ in steps]
    losses = [best_loss(p, a) for a, _ in steps]
    limits = bound(delta, eta, float(np.linalg.norm(p.mean_b)), iterations)
    print(f"d {d}, m {m}, N {N}, η {eta:g}, δ_0 {delta:g}, γ² {p.gamma_squared:.4f}\n")
    print("  t   δ_t          Lemma 4.3    loss of RoLoRA  loss of FFA")
    for t in sorted({*range(0, iterations + 1, max(1, iterations // 10)), iterations}):
        print(f"{t:>3}   {angles[t]:.4e}   {limits[t]:.4e}   {losses[t]:.4e}      {losses[0]:.4e}")
    if gamma == 0:
        says = "holds in every iteration" if stays_under(angles, list(limits)) else _CROSSED
        print(f"Lemma 4.3's bound {says}")
    mean, error = simulated(N, m, delta, repetitions, rng)
    exact = proposition(N, m, delta)
    print(
        f"Proposition 4.6 at N {N}, m {m}: {exact:.4f}, simulated {mean:.4f} ± {error:.4f} "
        f"({(mean - exact) / error:+.1f} standard errors)"
    )
    if output_dir is not None:
        _write(Path(output_dir), angles, limits, losses)
    return 0


def _write(folder: Path, angles, limits, losses) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "linear.csv", "w", encoding="utf-8") as file:
        file.write("t,delta,bound,rolora_loss,ffa_loss\n")
        for t, values in enumerate(zip(angles, limits, losses, strict=True)):
            file.write(f"{t}," + ",".join(repr(float(v)) for v in values) + f",{losses[0]!r}\n")
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install '.[report]' in your clone", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    left.semilogy(angles, label="δ_t, RoLoRA")
    left.semilogy(limits, "--", label="Lemma 4.3")
    right.semilogy(losses, label="RoLoRA")
    right.semilogy([losses[0]] * len(losses), label="FFA-LoRA")
    left.set(xlabel="iteration", ylabel="sine of the angle to a*")
    right.set(xlabel="iteration", ylabel="loss at the best b")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(folder / "linear.png", dpi=130)
    plt.close(figure)


def _unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v)


def run(**given: Any) -> int:
    return linear(**given)


command = cli.command("experiments.linear", HELP, FLAGS, run)

if __name__ == "__main__":
    cli.run(command)
