"""The private rounds of the study are the engine's, their noise is what it says, every method has
as many tries, and tables say what the records do.
"""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch

from benchmarks import private_front
from benchmarks.private_front import BASES, METHODS, SEEDS, TUNING_SEED, Found, planned, tries
from benchmarks.private_rounds import A_ROUND, CLIENTS, Rounds, Run, prepared
from rolora.run.federation import build_server


def few(method, base="none", rounds=4, **options):
    """A job of twenty clients that all take part, and whose changes are clipped without noise."""
    job = prepared(Run(method, "fp32", 1.0, 0.5, 0.5, 5, "test", rounds, base))
    job.clients = [np.arange(c * 5, c * 5 + 5) for c in range(20)]
    given = dict(clients=20, clients_per_round=20, sampling="fixed", batch_size=5, dp_noise=0.0)
    job.config = job.config.with_values(**(given | dict(cohort_chunk=20) | options))
    return job


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", [m for m in METHODS if "*" not in m])
def test_the_rounds_are_the_engines(method, base):
    server = build_server(few(method, base), on_round=lambda row: None)
    rounds = Rounds(few(method, base))
    server.run()
    rounds.run()
    start = few(method).initial_factors()
    moved = {k: torch.dist(rounds.state.published[k], start[k]).item() for k in ("A", "B")}
    assert max(moved.values()) > 0.1 and (moved["A"] > 0) == (method != "ffa")
    for kind in ("A", "B"):
        apart = torch.dist(rounds.state.published[kind], server.state.published[kind]).item()
        assert apart <= 2e-5 * moved[kind]


def test_a_round_has_the_noise_that_it_says():
    """Clients that do not move, so that all that moves the model is noise, of deviation z C."""
    z, clip = 1.5, 0.5
    rounds = Rounds(few("fedavg", lr=1e-30, dp_noise=z))
    before = torch.cat([rounds.state.published[kind] for kind in ("A", "B")])
    rounds.round(1)
    drawn = torch.cat([rounds.state.published[kind] for kind in ("A", "B")]) - before
    truth = z * clip / 20
    assert abs(drawn.double().std().item() / truth - 1) < 5 / math.sqrt(2 * len(drawn))


def test_clients_of_other_sizes_are_refused():
    job = few("rolora")
    job.clients = [np.arange(4)] * 20
    with pytest.raises(ValueError, match="clients have 4 examples, a batch 5"):
        Rounds(job)


@pytest.mark.parametrize("sent", ["A", "B", "BOTH"])
def test_the_noise_of_a_product_against_draws(sent):
    drawn = np.random.default_rng(0)
    A, B, deviation = drawn.normal(size=(3, 20)), 0.1 * drawn.normal(size=(30, 3)), 0.4
    norms = float(np.linalg.norm(A)), float(np.linalg.norm(B))
    squares = []
    for _ in range(4000):
        noisy_A = A + deviation * drawn.normal(size=A.shape) * (sent in ("A", "BOTH"))
        noisy_B = B + deviation * drawn.normal(size=B.shape) * (sent in ("B", "BOTH"))
        squares.append(np.sum((noisy_B @ noisy_A - B @ A) ** 2))
    truth = private_front.product_noise(deviation, 3, 30, 20, *norms, sent)
    assert abs(np.mean(squares) - truth) < 5 * np.std(squares) / np.sqrt(len(squares))


def test_every_method_has_as_many_tries_and_no_result_uses_a_tuning_seed():
    for base, first in (("none", 0), ("mirrored", 384)):  # the rest is public
        job = prepared(Run("rolora", "bf16", 1.0, 1.0, 1.0, 0, "test", base=base))
        assert sorted(np.concatenate(job.clients)) == list(range(first, 1150))
        assert len(job.clients) == CLIENTS[base]
    runs = list(planned(Found(None), BASES, METHODS, (1.0, None)))
    for key in itertools.product(BASES, METHODS, (1.0, None)):
        own = [run for run in runs if (run.base, run.method, run.epsilon) == key]
        tried = [(run.rate, run.clip) for run in own if run.on == "validation"]
        assert tried == list(tries(key[2]))
        assert {run.seed for run in own if run.on == "test"} == set(SEEDS)
    assert TUNING_SEED not in SEEDS


def test_runs_are_kept_and_tables_show_what_they_reached(tmp_path, monkeypatch, capsys):
    path = tmp_path / "front.json"
    monkeypatch.setattr(private_front, "RESULTS", path)
    monkeypatch.setattr(private_front, "METHODS", ("la-lora", "ffa"))
    monkeypatch.setattr(private_front, "IN_INT8", ())

    def planted(run):
        best = (run.rate, run.clip) == tries(run.epsilon)[-1]
        reached = 0.25 if run.method == "ffa" else 0.5 + run.seed / 500
        made = dict(accuracy=reached if best else 0.1, MB_up=2.0, values=400, noise=3.0)
        return dataclasses.asdict(run) | made | {"seconds": 1.0}

    monkeypatch.setattr(private_front, "measured", planted)
    private_front.main(["--bases", "none", "--epsilons", "1"])
    text = path.read_text()
    monkeypatch.setattr(private_front, "measured", None)  # nothing is done again
    private_front.main(["--bases", "none", "--epsilons", "1"])
    assert path.read_text() == text and len(json.loads(text)["runs"]) == 2 * (12 + len(SEEDS))
    capsys.readouterr()
    private_front.main(["--tables"])
    lines = capsys.readouterr().out.splitlines()
    error = np.std(np.arange(10) / 500, ddof=1) / np.sqrt(10)
    assert f"| none | la-lora | bf16 | 400 | 2.0 | 0.509 ± {error:.3f} | – | – | – |" in lines[2]
    # 60 clients' clip over the norm of the sum's noise, 3 clips in each of 400 values.
    assert lines[-1] == (
        f"| none | 1 | ffa | 10*, 2* | 3.00 | {A_ROUND / (3 * 20):.2f} | -0.259 ± {error:.3f} | – |"
    )
