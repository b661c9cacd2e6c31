"""The study of spread over seeds: what a seed decides, what is recorded, the lines of the table."""

import json

import numpy as np
import pytest
import torch

from benchmarks import spread, spread_text
from rolora.experiments import digits

DATA = digits.load(None)
CELL = ("method", "clients", "rounds", "rate", "varies", "steps", "rank")


def parts(run):
    """What a run begins with, and who has which rows."""
    job = spread.prepared(run, DATA)
    named = dict(job.model.named_parameters())
    factors = [named["hidden.lora_A"].detach().clone(), named["hidden.lora_B"].detach().clone()]
    return factors, named["out.weight"].detach().clone(), job.clients


@pytest.mark.parametrize("varies", ["A and B", "head", "batches", "all"])
def test_a_seed_decides_what_is_said_and_nothing_else(varies):
    first, second = (parts(spread.Run("rolora", 50, 12, 1.0, s, varies)) for s in (0, 1))
    same = {
        "A and B": all(map(torch.equal, first[0], second[0])),
        "head": torch.equal(first[1], second[1]),
        "batches": all(map(np.array_equal, first[2], second[2])),
    }
    assert same == {name: varies not in (name, "all") for name in same}
    assert sorted(np.concatenate(first[2])) == list(range(len(DATA.train[1])))  # each row once


def test_a_run_records_what_the_published_factors_do():
    run = spread.measured(spread.Run("rolora", 3, 2, 1.0, 0, steps=10), DATA)
    assert len(run["curve"]) == len(run["norms"]) == 3  # before training, and two rounds
    factors, head, _ = parts(spread.Run("rolora", 3, 2, 1.0, 0))
    A, B, W = (part.double().numpy() for part in (*factors, head))
    hidden = np.maximum(DATA.test[0] @ A.T @ B.T, 0)
    accuracy = ((hidden @ W.T).argmax(1) == DATA.test[1]).mean()
    assert run["curve"][0] == pytest.approx(accuracy, abs=6e-5)
    expected = [np.linalg.norm(A), np.linalg.norm(B), *np.linalg.svd(B @ A)[1][:4]]
    expected.append((np.maximum(DATA.train[0] @ A.T @ B.T, 0) == 0).all(0).mean())
    assert run["norms"][0] == pytest.approx(expected, rel=6e-3)
    # Round 1 trains B and round 2 trains A: neither moves the other.
    assert run["norms"][0][0] == run["norms"][1][0] and run["norms"][1][1] == run["norms"][2][1]
    assert run["norms"][0][1] != run["norms"][1][1] and run["norms"][1][0] != run["norms"][2][0]


def test_b_s_rate_is_a_quarter_where_it_is_said():
    from rolora.federated.rates import learning_rate

    config = spread.prepared(spread.Run(spread.QUARTER, 3, 2, 4.0, 0), DATA).config
    rates = {phase: learning_rate(config.optimisation, 2, phase, 1) for phase in "AB"}
    assert rates == {"A": 4.0, "B": 1.0}


def test_a_line_is_what_its_seeds_reached(tmp_path, monkeypatch, capsys):
    cell = dict(clients=50, rounds=12, rate=2.0, varies="all", steps=20, rank=4)

    def planted(method, seed, end):
        norms = [[1, 1, 1, 0, 0, 0, 0.25]] * 13
        own = dict(method=method, seed=seed, curve=[0.1] * 12 + [end], held=0.5, norms=norms)
        return cell | own | {"stamp": 0}

    runs = [planted("rolora", 0, 0.7), planted("rolora", 1, 0.9), planted("rolora", 1000, 0.0)]
    runs += [planted("fedavg", 0, 0.8), planted("fedavg", 1, 0.9)]
    path = tmp_path / "spread.json"
    path.write_text(json.dumps({"stamps": [], "runs": runs}))
    monkeypatch.setattr(spread, "RESULTS", path)
    spread.table()
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines == [  # differences of -0.1 and 0: their error is 0.0707 / sqrt(2)
        "| rolora | 50 | 12 x 20 | 4 | 2 | all | 0.800 ± 0.141 | 0.700, 0.900 | -0.050 ± 0.050, "
        "+1.00 | 25.0 % | 2 |",
        "| fedavg | 50 | 12 x 20 | 4 | 2 | all | 0.850 ± 0.071 | 0.800, 0.900 |  | 25.0 % | 2 |",
    ]


def test_every_recorded_cell_has_all_its_seeds():
    stored = json.loads(spread.RESULTS.read_text(encoding="utf-8"))
    seeds = {}
    for run in stored["runs"]:
        key = tuple((k, run[k]) for k in CELL)
        seeds.setdefault(key, set()).add(run["seed"])
    whole = [found for found in seeds.values() if found >= set(spread.SEEDS)]
    tried = [found for found in seeds.values() if found == set(spread.TUNING)]
    assert whole and len(whole) + len(tried) == len(seeds)


def test_a_line_on_the_text_is_the_mean_of_its_seeds(tmp_path, monkeypatch, capsys):
    def planted(way, seed, loss, accuracy):
        return {"way": way, "seed": seed, "loss": loss, "accuracy": accuracy}

    runs = [planted("fedavg", 0, [2.0, 1.0], [0.1, 0.3])]
    runs += [planted("fedavg", 1, [2.2, 1.4], [0.1, 0.5]), planted("rolora", 0, [2.0, 1.5], [0, 1])]
    path = tmp_path / "text.json"
    path.write_text(json.dumps({"stamp": {}, "runs": runs}))
    monkeypatch.setattr(spread_text, "RESULTS", path)
    spread_text.table()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| fedavg | 0.005 | 2.100 | 1.200 | 0.400 ± 0.141 | 2 |")
    assert lines[3].startswith("| rolora | 0.005 | 2.000 | 1.500 | 1.000 | 1 |") and len(lines) == 4
