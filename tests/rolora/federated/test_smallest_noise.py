"""The noise that an ε asks for, against the closed form of Gaussian releases and dp-accounting."""

import numpy as np
import pytest

from rolora.federated.privacy import epsilon, smallest_noise


def least_of_gaussians(epsilon, rounds, delta):
    """The least z whose `rounds` Gaussian releases keep ε at δ, by their Rényi divergence
    α·rounds / (2 z²) at every integer order, in closed form: for an order, the conversion leaves
    room for a divergence of ε + log(α δ) / (α − 1) − log(1 − 1/α).
    """
    orders = np.arange(2, 1025, dtype=np.float64)
    room = epsilon + np.log(delta * orders) / (orders - 1) - np.log1p(-1 / orders)
    with np.errstate(invalid="ignore"):
        noise = np.sqrt(orders * rounds / (2 * room))
    return np.nanmin(noise)


@pytest.mark.parametrize("target", [0.1, 1.0, 3.0, 8.0, 50.0])
@pytest.mark.parametrize("rounds, delta", [(1, 1e-5), (60, 1e-5), (500, 1e-3)])
def test_the_least_noise_of_an_epsilon_against_its_closed_form(target, rounds, delta):
    """Ours looks at some of the orders, so it may ask for a little more noise and never for less."""
    found = smallest_noise(target, 1.0, rounds, delta)
    truth = least_of_gaussians(target, rounds, delta)
    assert truth * (1 - 1e-9) <= found <= truth * 1.001
    assert epsilon(found, 1.0, rounds, delta) <= target


@pytest.mark.parametrize("target, probability, rounds", [(1.0, 0.2, 60), (8.0, 0.01, 300)])
def test_the_least_noise_under_sampling_keeps_epsilon_and_less_does_not(
    target, probability, rounds
):
    found = smallest_noise(target, probability, rounds, 1e-5)
    assert epsilon(found, probability, rounds, 1e-5) <= target
    assert epsilon(found * (1 - 2e-6), probability, rounds, 1e-5) > target
    assert found < 0.8 * smallest_noise(target, 1.0, rounds, 1e-5), "sampling amplifies"


def test_an_epsilon_below_what_the_orders_reach_is_refused():
    for delta in (1e-5, 1e-9, 2e-7):
        with pytest.raises(ValueError, match=rf"at least 0\.0\d+ at --dp-delta {delta:g}") as told:
            smallest_noise(1e-4, 1.0, 10, delta)
        least = float(str(told.value).split()[3])
        assert smallest_noise(least, 1.0, 10, delta) > 0, "what is told will do"


def test_the_least_noise_against_dp_accounting():
    accounting = pytest.importorskip("dp_accounting")
    for target in (1.0, 3.0, 8.0):
        judge = accounting.rdp.RdpAccountant()
        event = accounting.GaussianDpEvent(smallest_noise(target, 0.2, 60, 1e-5))
        judge.compose(accounting.PoissonSampledDpEvent(0.2, event), 60)
        assert target * 0.97 <= judge.get_epsilon(1e-5) <= target * 1.001
