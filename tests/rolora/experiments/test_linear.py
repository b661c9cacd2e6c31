"""The theory's claims, by simulation and by independent statements."""

import sys

import numpy as np
import pytest

from rolora import cli
from rolora.experiments import linear


@pytest.mark.parametrize(
    "clients, m, value", [(1, 8, 0.5600), (3, 8, 0.6193), (5, 10, 0.6298), (10, 20, 0.6371)]
)
def test_proposition_4_6(clients, m, value):
    assert abs(linear.proposition(clients, m, 0.8) - value) < 5e-5
    mean, error = linear.simulated(clients, m, 0.8, 60_000, np.random.default_rng(clients))
    assert abs(mean - value) < 3 * error + 5e-5 and error < 2e-3


def test_one_client_loses_what_least_squares_leaves():
    """N = 1: the residual of a regression on one column keeps m − 1 of m degrees of freedom."""
    for m in (3, 10, 50):
        assert abs(linear.proposition(1, m, 0.6) - 0.36 * (m - 1) / m) < 1e-12


def test_the_simulation_is_the_regression_itself():
    """The loss of `simulated`, drawn in the whole space with an explicit least-squares solver."""
    rng = np.random.default_rng(4)
    p, losses = linear.problem(7, 3, 0.8, 0.0, rng), []
    for _ in range(4000):
        inputs = rng.normal(size=(3, 8, 7))
        outputs = [np.outer(x @ p.a, own) for x, own in zip(inputs, p.b, strict=True)]
        b = np.mean(
            [
                np.linalg.lstsq((x @ p.start)[:, None], y, rcond=None)[0][0]
                for x, y in zip(inputs, outputs, strict=True)
            ],
            axis=0,
        )
        np.testing.assert_allclose(b, linear.solved(p, p.start, inputs), atol=1e-12)
        losses.append(
            np.mean(
                [
                    ((y - np.outer(x @ p.start, b)) ** 2).sum() / 8
                    for x, y in zip(inputs, outputs, strict=True)
                ]
            )
        )
    assert (
        abs(np.mean(losses) - linear.proposition(3, 8, 0.8))
        < 3 * np.std(losses) / len(losses) ** 0.5
    )


@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("delta", [0.3, 0.8, 0.95])
def test_the_angle_stays_under_the_lemmas_bound_and_ffas_does_not_move(eta, delta):
    rng = np.random.default_rng(1)
    p = linear.problem(10, 4, delta, 0.0, rng)
    assert (
        abs(linear.distance(p, p.start) - delta) < 1e-12
        and abs(np.linalg.norm(p.start) - 1) < 1e-12
    )
    path = list(linear.rolora(p, 4000, eta, 25, rng))
    angles = [delta, *(linear.distance(p, a) for a, _ in path)]
    assert (np.array(angles) <= linear.bound(delta, eta, 1.0, 25)).all()
    assert (
        linear.best_loss(p, path[-1][0])
        < linear.best_loss(p, p.start) * (angles[-1] / delta) ** 2 * 1.0001 + 1e-28
    )


def test_the_gradient_is_that_of_half_the_loss():
    """One iteration with hardly a sampling error, against finite differences of the population
    loss.
    """
    rng = np.random.default_rng(2)
    p = linear.problem(5, 2, 0.7, 0.5, rng)
    ((a, b),) = linear.rolora(p, 400_000, 0.3, 1, rng)
    step = 1e-6 * np.eye(5)
    gradient = np.array(
        [
            (linear.population_loss(p, p.start + e, b) - linear.population_loss(p, p.start - e, b))
            / 4e-6
            for e in step
        ]
    )
    wanted = p.start - 0.3 * gradient
    np.testing.assert_allclose(a, wanted / np.linalg.norm(wanted), atol=5e-3)


def test_heterogeneous_clients():
    """The best that FFA reaches is γ² + ‖b̄*‖² δ_0²; RoLoRA comes down to γ²."""
    rng = np.random.default_rng(3)
    p = linear.problem(8, 6, 0.8, 0.7, rng)
    assert abs(p.gamma_squared - 0.49) < 1e-12 and abs(np.linalg.norm(p.mean_b) - 1) < 1e-12
    assert abs(linear.best_loss(p, p.start) - (0.49 + 0.64)) < 1e-12
    *_, (a, b) = linear.rolora(p, 4000, 0.5, 60, rng)
    assert (
        0.49 - 1e-12 <= linear.best_loss(p, a) < 0.49 + 1e-3
        and linear.population_loss(p, a, b) < 0.49 + 5e-3
    )


def call(capsys, *args):
    sys.argv = ["linear", *map(str, args)]
    with pytest.raises(SystemExit) as stop:
        cli.run(linear.command)
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    code, out, _ = call(capsys, "--iterations", 20, "--output-dir", tmp_path / "out")
    assert (
        code == 0
        and "Lemma 4.3's bound holds in every iteration" in out
        and "Proposition 4.6 at N 5, m 400" in out
    )
    assert (tmp_path / "out" / "linear.png").stat().st_size > 1000 and len(
        (tmp_path / "out" / "linear.csv").read_text().splitlines()
    ) == 22
    code, _, err = call(capsys, "--delta", 1.5)
    assert code == 2 and err == "error: --delta 1.5: expected a number between 0 and 1\n"
    assert call(capsys, "--gamma", 1, "--clients", 1)[0] == 2


def test_the_bound_is_judged_up_to_rounding_and_no_further():
    """δ_0 = .8 is .8000000000000002 where the arithmetic is vectorised otherwise."""
    assert linear.stays_under([0.8000000000000002, 0.5], [0.8, 0.5])
    assert not linear.stays_under([0.8, 0.5000001], [0.8, 0.5])
