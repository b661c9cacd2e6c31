"""Clipping, noise and the accountant, against statistics, quadrature and dp-accounting."""

import math
import stat

import numpy as np
import pytest
import torch

from rolora.errors import BadInput
from rolora.federated import sampling
from rolora.federated.layout import Entry, Layout
from rolora.federated.ledger import Ledger
from rolora.federated.privacy import Privacy, PrivateMean, clipped, epsilon, normals, renyi
from tests.rolora.federated import toy


@pytest.mark.parametrize("norm", [0.1, 1.0, 50.0])
def test_a_change_is_clipped_to_the_norm_and_no_further(norm):
    change = torch.randn(1000) * 0.1
    length = change.double().norm().item()
    cut = clipped(change, norm).double()
    assert cut.norm() <= norm and torch.allclose(
        cut / cut.norm(), change.double() / length, atol=1e-6
    )
    assert abs(cut.norm().item() / min(norm, length) - 1) < 1e-5


def test_one_client_moves_the_sum_by_no_more_than_the_clip():
    """The sensitivity that the noise is scaled to, over the fixed-point sum as it is released."""
    _, layout = toy.model()
    size = layout.travelling_size("B")
    privacy = Privacy(clip=0.7, noise=0.0, delta=1e-5, probability=1.0)
    sums = []
    for clients in (range(5), range(4)):
        mean = PrivateMean(privacy, 5, 10, layout, "B")
        for client in clients:
            mean.add(
                client, torch.randn(size, generator=torch.Generator().manual_seed(client)) * 30, 1
            )
        sums.append(layout.join(mean.finish(), "B").double() * 5)
    assert 0.69 < (sums[0] - sums[1]).norm() <= 0.7


@pytest.mark.parametrize("noise", [0.5, 1.0, 8.0])
def test_the_noise_has_the_declared_deviation_and_is_never_the_same(noise):
    layout = Layout((Entry("layer", "B", (400, 50), 0),))
    size, planned, clip = layout.travelling_size("B"), 4, 0.3

    def released(clients):
        mean = PrivateMean(Privacy(clip, noise, 1e-5, 1.0), planned, 6, layout, "B")
        for client in range(clients):
            mean.add(client, torch.zeros(size), 30)
        mean.add_noise()
        return layout.join(mean.finish(), "B").double()

    drawn = released(3)
    deviation = noise * clip / planned
    assert abs(drawn.std().item() / deviation - 1) < 5 / math.sqrt(2 * size)
    assert abs(drawn.mean().item()) < 5 * deviation / math.sqrt(size)
    fourth = (drawn / deviation).pow(4).mean().item()
    assert abs(fourth - 3) < 5 * math.sqrt(96 / size), "a Gaussian's fourth moment"
    for again in (released(3), released(0)):
        correlation = np.corrcoef(drawn.numpy(), again.numpy())[0, 1]
        assert abs(correlation) < 5 / math.sqrt(size)


def test_the_same_round_released_twice_does_not_tell_what_one_client_sent():
    """What a resumed run does: the round again, one client late. The difference of both releases
    was that client's change, cosine 1.0, while noise was keyed by the round.
    """
    layout = Layout((Entry("layer", "B", (400, 50), 0),))
    size = layout.travelling_size("B")
    changes = [torch.randn(size, generator=torch.Generator().manual_seed(c)) for c in range(4)]

    def released(clients):
        mean = PrivateMean(Privacy(1.0, 1.0, 1e-5, 1.0), 4, 4, layout, "B")
        for client in clients:
            mean.add(client, changes[client], 1)
        mean.add_noise()
        return layout.join(mean.finish(), "B").double()

    difference = released(range(4)) - released(range(3))
    cosine = torch.cosine_similarity(difference, changes[3].double(), dim=0).item()
    # The clipped change has length 1, the difference of two noises sqrt(2 · 20,000).
    assert abs(cosine) < 5 / math.sqrt(size)


def test_the_released_sum_lies_on_a_grid_that_hides_its_low_bits():
    layout = Layout((Entry("layer", "B", (40, 50), 0),))
    size, clip, noise = layout.travelling_size("B"), 0.5, 1.3
    mean = PrivateMean(Privacy(clip, noise, 1e-5, 1.0), 3, 3, layout, "B")
    mean.add(0, torch.randn(size, generator=torch.Generator().manual_seed(0)), 1)
    before = mean.sum.total.clone()
    mean.add_noise()
    mean.finish()
    quantum = mean.grid * 2.0**mean.sum.exponent
    assert noise * clip * 2.0**-32 < quantum <= noise * clip * 2.0**-30
    assert (mean.sum.total % mean.grid == 0).all() and (before % mean.grid != 0).any()


def test_normals_follow_the_normal_distribution():
    drawn = np.sort(normals(200_001))
    cumulative = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in drawn])
    distance = np.abs(cumulative - (np.arange(len(drawn)) + 0.5) / len(drawn)).max()
    assert distance < 2.2 / math.sqrt(len(drawn)), "Kolmogorov and Smirnov, one in 10,000"
    least, most = normals(2, lambda n: bytes(n)), normals(2, lambda n: b"\xff" * n)
    assert np.isfinite(least).all() and np.isfinite(most).all()
    assert 8.5 < least[0] < 8.6


def test_a_release_is_charged_before_its_noise_exists_and_again_when_it_is_repeated(tmp_path):
    path = tmp_path / "privacy.json"
    ledger = Ledger(path)
    ledger.begin()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and Ledger.read(path).releases == 0
    rows = []
    options = dict(privacy=Privacy(0.5, 1.0, 1e-5, 1.0), quorum=0)
    server = toy.server(rounds=3, on_round=rows.append, options=options)
    server.ledger = ledger

    class Full(OSError):
        pass

    def crash(collector):
        raise Full

    combine = server.transport.combine
    server.run()
    assert Ledger.read(path).releases == 3
    again = toy.server(rounds=4, on_round=rows.append, options=options)
    again.ledger = Ledger.read(path)
    again.state, again.held = server.state, server.held
    again.transport = server.transport
    server.transport.combine = lambda collector, tally: crash(collector)
    with pytest.raises(Full):
        again.run()
    assert Ledger.read(path).releases == 4, "it was charged before it could be released"
    server.transport.combine = combine
    again.run()
    assert Ledger.read(path).releases == 5
    assert rows[-1]["round"] == 4 and rows[-1]["epsilon"] == epsilon(1.0, 1.0, 5, 1e-5)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"releases": -1}', '{"releases": 1.0}', "\xff"])
def test_a_ledger_that_cannot_be_read_ends_the_run(text, tmp_path):
    path = tmp_path / "privacy.json"
    with pytest.raises(BadInput, match="is missing"):
        Ledger.read(path)
    path.write_text(text, encoding="latin-1")
    with pytest.raises(BadInput, match="start a new run"):
        Ledger.read(path)


def test_a_private_round_is_divided_by_the_plan_and_told_with_its_epsilon():
    rows = []
    privacy = Privacy(clip=1e3, noise=0.0, delta=1e-5, probability=1.0)
    private = toy.server(rounds=2, options=dict(privacy=privacy, quorum=0), on_round=rows.append)
    plain = toy.server(rounds=2, options=dict(max_weight=1))
    private.run(), plain.run()
    for kind in ("A", "B", "head"):
        torch.testing.assert_close(
            private.state.master[kind], plain.state.master[kind], rtol=0, atol=1e-6
        )
    assert rows[1]["epsilon"] == math.inf
    rows.clear()
    server = toy.server(
        rounds=3,
        per_round=3,
        on_round=rows.append,
        options=dict(privacy=Privacy(0.5, 1.0, 1e-5, 0.5), poisson=True, quorum=0),
    )
    server.run()
    assert [row["epsilon"] for row in rows[1:]] == [epsilon(1.0, 0.5, n, 1e-5) for n in (1, 2, 3)]


def test_nobody_may_come_and_the_round_is_released_all_the_same():
    rows = []
    server = toy.server(
        rounds=30,
        per_round=1,
        on_round=rows.append,
        options=dict(privacy=Privacy(0.5, 1.0, 1e-5, 1 / 6), poisson=True, quorum=0),
    )
    server.run()
    counts = [row["clients"] for row in rows[1:]]
    assert min(counts) == 0 and max(counts) > 1
    assert rows[1 + counts.index(0)]["train_loss"] is None and all(
        torch.isfinite(v).all() for v in server.state.master.values()
    )


@pytest.mark.parametrize("secret", [False, True])
def test_poisson_sampling_takes_each_client_by_itself(secret):
    draws = np.zeros((4000, 8))
    for number in range(4000):
        keyed = sampling.cohort("s", number, 8, 2, poisson=True)
        draws[number, sampling.secret_cohort(8, 2) if secret else keyed] = 1
    assert np.abs(draws.mean(0) - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / 4000)
    assert abs(draws.sum(1).var() - 8 * 0.25 * 0.75) < 0.2, "a fixed number would have no variance"
    correlation = np.corrcoef(draws.T) - np.eye(8)
    assert np.abs(correlation).max() < 5 / math.sqrt(4000)


@pytest.mark.parametrize("noise", [0.6, 1.0, 4.0])
@pytest.mark.parametrize("probability", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("order", [2, 5, 16])
def test_the_divergence_against_quadrature(noise, probability, order):
    """D_α of (1 − q) N(0, z²) + q N(1, z²) from N(0, z²), by its definition."""
    x = np.linspace(-15 * noise, order + 15 * noise, 400_001)
    base = -(x**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    moved = base + (2 * x - 1) / (2 * noise**2)
    mixed = (
        np.logaddexp(math.log1p(-probability) + base, math.log(probability) + moved)
        if probability < 1
        else moved
    )
    integrand = order * mixed - (order - 1) * base
    largest = integrand.max()
    truth = (largest + math.log(np.trapezoid(np.exp(integrand - largest), x))) / (order - 1)
    assert abs(renyi(noise, probability, order) - truth) < 1e-6 * max(truth, 1e-3)


def test_epsilon_grows_with_rounds_and_falls_with_noise():
    assert epsilon(1.0, 0.1, 0, 1e-5) == 0.0 and epsilon(0.0, 1.0, 3, 1e-5) == math.inf
    assert epsilon(1.0, 0.1, 10, 1e-5) < epsilon(1.0, 0.1, 20, 1e-5) < epsilon(1.0, 1.0, 20, 1e-5)
    assert epsilon(2.0, 1.0, 10, 1e-5) < epsilon(1.0, 1.0, 10, 1e-5)

    # one Gaussian release: the exact curve (Balle and Wang 2018, Theorem 8) lies below, and not far
    def exact_delta(eps, noise):
        def phi(v):
            return 0.5 * math.erfc(-v / math.sqrt(2))

        return phi(0.5 / noise - eps * noise) - math.exp(eps) * phi(-0.5 / noise - eps * noise)

    for noise in (0.8, 2.0, 5.0):
        ours = epsilon(noise, 1.0, 1, 1e-5)
        assert exact_delta(ours, noise) <= 1e-5 <= exact_delta(0.8 * ours, noise)


@pytest.mark.parametrize(
    "noise, probability, rounds", [(1.0, 0.1, 50), (0.7, 0.02, 500), (3.0, 1.0, 20), (1.1, 0.5, 10)]
)
def test_epsilon_against_dp_accounting(noise, probability, rounds):
    accounting = pytest.importorskip("dp_accounting")
    event = (
        accounting.PoissonSampledDpEvent(probability, accounting.GaussianDpEvent(noise))
        if probability < 1
        else accounting.GaussianDpEvent(noise)
    )
    judge = accounting.rdp.RdpAccountant()
    judge.compose(event, rounds)
    truth = judge.get_epsilon(1e-5)
    assert truth * 0.999 <= epsilon(noise, probability, rounds, 1e-5) <= truth * 1.03, (
        "fractional orders can only be a little tighter"
    )
