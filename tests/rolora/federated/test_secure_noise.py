"""Noise that clients add before they mask: exactly the distribution that the accountant charges."""

import math

import numpy as np
import pytest
import torch

from rolora.federated.privacy import Privacy, epsilon
from rolora.federated.secure import messages
from rolora.federated.secure.noise import ClientNoise, discrete_gaussian
from rolora.federated.secure.settings import MARK, Secure
from rolora.federated.server import QuorumMissed
from rolora.transport.local import LocalTransport
from tests.rolora.federated import toy
from tests.rolora.federated.test_secure import step_of


def keyed(seed):
    """Bytes that are the same in every run of a test."""
    drawn = np.random.Generator(np.random.Philox(seed))
    return lambda count: drawn.bytes(count)


def pmf(sigma, values):
    """By its definition."""
    wide = np.arange(-60 * sigma, 60 * sigma + 1, dtype=float)
    return (
        np.exp(-(values.astype(float) ** 2) / (2 * sigma**2))
        / np.exp(-(wide**2) / (2 * sigma**2)).sum()
    )


@pytest.mark.parametrize("sigma", [1, 2, 5])
def test_the_discrete_gaussian_has_its_probabilities(sigma):
    count = 200_000
    drawn = discrete_gaussian(sigma, count, keyed(sigma))
    values = np.arange(-3 * sigma, 3 * sigma + 1)
    expected = count * pmf(sigma, values)
    observed = np.array([(drawn == value).sum() for value in values])
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(values)
    assert statistic < freedom + 6 * math.sqrt(2 * freedom)
    assert (np.abs(drawn) > 3 * sigma).mean() < 0.02


def test_at_the_size_that_is_used_it_is_gaussian():
    sigma, count = 5_000_001, 100_000
    drawn = discrete_gaussian(sigma, count, keyed(9)) / sigma
    assert abs(drawn.mean()) < 5 / math.sqrt(count)
    assert abs(drawn.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((drawn**4).mean() - 3) < 5 * math.sqrt(96 / count)
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 5 / math.sqrt(count)
    inside = np.mean(np.abs(drawn) < 1)
    assert abs(inside - 0.682689) < 5 * math.sqrt(0.2166 / count)
    low = discrete_gaussian(sigma, 64_000, keyed(4)) & 7
    counts = np.bincount(low, minlength=8)
    assert np.abs(counts - 8000).max() < 5 * math.sqrt(8000), "the low bits are noise too"


def test_no_noise_is_no_noise_and_a_step_is_bounded():
    assert not discrete_gaussian(0, 5).any() and len(discrete_gaussian(3, 0)) == 0
    with pytest.raises(ValueError):
        discrete_gaussian(1 << 24, 1)


@pytest.mark.parametrize("clip", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("noise", [0.3, 1.0, 8.0])
@pytest.mark.parametrize("threshold", [2, 7, 700])
def test_a_thresholds_clients_make_up_the_noise_and_hardly_more(clip, noise, threshold):
    own = ClientNoise.of(clip, noise, threshold)
    together = math.ldexp(own.sigma, own.exponent) * math.sqrt(threshold)
    assert noise * clip <= together <= noise * clip * (1 + 2**-21)


@pytest.mark.parametrize("size", [0.0, 0.4, 1.0, 50.0])
def test_a_change_leaves_clipped_whatever_rounding_adds(size):
    own, count = ClientNoise.of(1.0, 0.0, 3), 10_000
    change = torch.randn(count, generator=torch.Generator().manual_seed(3))
    change *= size / max(float(change.norm()), 1e-9)
    steps = own.protected(change).double()
    norm = float(steps.norm()) * 2.0**own.exponent
    assert norm <= 1.0, "the sensitivity that is charged"
    assert abs(norm - min(size, 1.0)) < 1e-3
    if size <= 0.4:
        assert float((steps * 2.0**own.exponent - change.double()).abs().max()) <= 2.0**own.exponent


def private(noise, threshold=4, transport=None, clip=0.5, rounds=2, **given):
    """A masked, private federation of six, and the ledger that it charges."""
    own = ClientNoise.of(clip, noise, threshold)
    settings = {
        "secure": Secure(threshold, None, own),
        "privacy": Privacy(clip, noise, 1e-5, 1.0),
        "quorum": threshold,
        "max_weight": 1,
    }
    transport = transport or LocalTransport
    made = toy.server(
        options=settings,
        rounds=rounds,
        dtype="fp32",
        transport=lambda cohort, limit: transport(cohort, limit, own),
        **given,
    )
    return made


def changes(number, phase_size):
    """What toy.Drift makes every client send in a round, fp64 by NumPy."""
    found = []
    for client in range(6):
        generator = torch.Generator().manual_seed(1000 * number + client)
        found.append((torch.randn(phase_size, generator=generator) * 0.1).double().numpy())
    return np.stack(found)


def test_without_noise_a_round_is_the_mean_of_clipped_changes():
    server = private(0.0, rounds=1)
    before = {k: v.clone() for k, v in server.state.master.items()}
    server.run()
    size = server.layout.travelling_size("B")
    sent = changes(1, size)
    norms = np.linalg.norm(sent, axis=1, keepdims=True)
    assert (norms > 0.5).all(), "all of them are clipped"
    wanted = (sent * (0.5 / norms)).sum(0) / 6
    moved = np.concatenate(
        [(server.state.master[k] - before[k]).double().numpy() for k in ("B", "head")]
    )
    assert np.abs(moved - wanted).max() < 1e-5


def test_the_noise_of_a_round_is_what_was_asked_whoever_leaves():
    """The deviation of what a round adds, over many values: z·C/6 with the threshold's clients."""

    class Fewer(LocalTransport):
        def run_round(self, tasks, deadline=None):
            for arrival in super().run_round(tasks, deadline):
                if arrival.client not in (1, 4):
                    yield arrival

    noise, clip = 2.0, 0.5
    server = private(noise, 4, Fewer, clip, rounds=1, rank=3)
    quiet = private(0.0, 4, Fewer, clip, rounds=1, rank=3)
    server.run()
    quiet.run()
    drawn = np.concatenate(
        [(server.state.master[k] - quiet.state.master[k]).double().numpy() for k in ("B", "head")]
    )
    deviation = noise * clip / 6
    spread = drawn.std() / deviation
    assert abs(spread - 1) < 5 / math.sqrt(2 * len(drawn))


def test_a_release_is_charged_once_and_only_when_something_is_released():
    server = private(1.0, rounds=3)
    rows = []
    server.on_round = rows.append
    server.run()
    assert server.ledger.releases == 3
    wanted = epsilon(1.0, 1.0, 3, 1e-5)
    assert rows[-1]["epsilon"] == pytest.approx(wanted)

    class Nobody(LocalTransport):
        def run_round(self, tasks, deadline=None):
            yield from list(super().run_round(tasks, deadline))[:3]

    server = private(1.0, 4, Nobody)
    with pytest.raises(QuorumMissed):
        server.run()
    assert server.ledger.releases == 0, "nothing was unmasked"


@pytest.mark.parametrize("failing, ends", [({(2, 0)}, 2), ({(3, 0)}, 2), ({(1, 0), (1, 1)}, 1)])
def test_an_attempt_that_fails_once_charged_takes_the_place_of_a_later_round(failing, ends):
    """`failing`: (round, attempt) whose sum is not opened."""

    class Silent(LocalTransport):
        def ask(self, requests, deadline):
            first = next(iter(requests.values()))
            if step_of(first) == "unmask":
                kind = messages.requested(first.removeprefix(MARK), 1 << 20)
                if (kind.round, kind.attempt) in failing:
                    return
            yield from super().ask(requests, deadline)

    server, rows, saved = private(1.0, 4, Silent, rounds=3), [], []
    server.ledger.most = 3
    server.on_round, server.on_checkpoint = rows.append, saved.append
    if (ends + 1, 0) in failing:
        with pytest.raises(QuorumMissed):
            server.run()
    else:
        server.run()
        assert rows[-1]["eval"] is not None and rows[-1]["epsilon"] == epsilon(1.0, 1.0, 3, 1e-5)
        assert saved[-1].state.round == ends
    assert server.ledger.releases == 3 and server.state.round == ends
