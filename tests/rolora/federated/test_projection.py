"""Local alternation: what one factor can say of a change of both, judged by least squares in float64
and by a client that sends both factors.
"""

import numpy as np
import pytest
import torch

from rolora.federated import projection
from rolora.federated.client import LocalTrainer
from tests.rolora.cohorts import prepared, started
from tests.rolora.federated import toy

DAMPING = 0.1
TAKES_TURNS = """
def phase(round, schedule):
    return "BOTH"


def local_phase(step):
    return "{phase}" if step % 2 == 0 else "{other}"
"""


def best(phase, A, B, A1, B1):
    """The change of one factor that comes nearest to that of the product and to its own, by stacked
    least squares.
    """
    F, own = (A, B1 - B) if phase == "B" else (B.T, (A1 - A).T)
    D = B1 @ A1 - B @ A
    D = D if phase == "B" else D.T
    weight = np.sqrt(DAMPING * np.linalg.norm(F) ** 2 / len(F))
    rows = np.concatenate([F.T, weight * np.eye(len(F))])
    found = np.linalg.lstsq(rows, np.concatenate([D.T, weight * own.T]), rcond=None)[0].T
    return found if phase == "B" else found.T


def random_factors(layout, seed):
    rng = np.random.default_rng(seed)
    return {
        kind: torch.from_numpy(rng.normal(size=layout.sizes[kind])).float() for kind in ("A", "B")
    }


def matrices(layout, factors, kind):
    return [view.double().numpy() for view in layout.views(factors, kind).values()]


@pytest.mark.parametrize("phase", ["A", "B"])
def test_it_is_the_nearest_change_of_one_factor(phase):
    _, layout = toy.model()
    before, after = random_factors(layout, 0), random_factors(layout, 1)
    other = "A" if phase == "B" else "B"
    trained = {kind: list(layout.views(after, kind).values()) for kind in ("A", "B")}
    found = projection.projected(layout, phase, before, trained[phase], trained[other])
    pairs = zip(*(matrices(layout, f, k) for f in (before, after) for k in ("A", "B")), strict=True)
    was = matrices(layout, before, phase)
    for (A, B, A1, B1), made, start in zip(pairs, found, was, strict=True):
        wanted = best(phase, A, B, A1, B1)
        assert np.abs(made.double().numpy() - start - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("phase", ["A", "B"])
def test_where_the_partner_stays_it_is_the_plain_change(phase):
    _, layout = toy.model()
    before, after = random_factors(layout, 0), random_factors(layout, 1)
    other = "A" if phase == "B" else "B"
    mine = list(layout.views(after, phase).values())
    stays = list(layout.views(before, other).values())
    found = projection.projected(layout, phase, before, mine, stays)
    assert all(torch.equal(made, own) for made, own in zip(found, mine, strict=True))


def test_of_a_factor_of_zeros_nothing_is_asked():
    _, layout = toy.model()
    before, after = random_factors(layout, 0), random_factors(layout, 1)
    before["B"].zero_()
    mine, moved = (list(layout.views(after, kind).values()) for kind in ("A", "B"))
    found = projection.projected(layout, "A", before, mine, moved)
    assert all(torch.equal(made, own) for made, own in zip(found, mine, strict=True))


@pytest.mark.parametrize("phase", ["A", "B"])
def test_a_client_sends_that_of_what_both_factors_did(phase, files, tmp_path):
    """The judge trains the same steps and sends both factors."""
    other = "A" if phase == "B" else "B"
    own = tmp_path / "turns.py"
    own.write_text(TAKES_TURNS.format(phase=phase, other=other))
    usual = dict(optimizer="sgd", exchange_dtype="fp32")
    mine = prepared(files, local_alternation=True, **usual)
    judge = prepared(files, method=str(own), **usual)
    (task, published, _) = started(mine, phase)[1]
    update, _ = LocalTrainer.train(mine.trainer(), task, published, {})
    (whole, _, _) = started(judge, "BOTH")[1]
    sent, _ = LocalTrainer.train(judge.trainer(), whole, published, {})
    layout = mine.layout
    moved, answer = layout.part(sent.change, "BOTH"), layout.part(update.change, phase)
    after = {kind: published[kind] + moved[kind] for kind in ("A", "B")}
    parts = [matrices(layout, f, k) for f in (published, after) for k in ("A", "B")]
    for A, B, A1, B1, made in zip(*parts, matrices(layout, answer, phase), strict=True):
        wanted = best(phase, A, B, A1, B1)
        assert np.linalg.norm(A1 - A) > 0 and np.linalg.norm(B1 - B) > 0
        assert np.linalg.norm(made - wanted) < 1e-3 * np.linalg.norm(wanted)
    gap = (answer["head"] - moved["head"]).norm()
    assert gap < 1e-5 * moved["head"].norm()
