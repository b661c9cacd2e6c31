"""Control variates against SCAFFOLD in NumPy, which sends them."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from rolora import LoRAConfig, attach
from rolora.federated import control_variates
from rolora.federated.client import LocalTrainer
from rolora.federated.layout import Layout, fingerprint
from rolora.federated.local import LocalConfig, Start
from rolora.federated.wire import Task
from rolora.recipes import Batch
from rolora.run import defaults
from tests.rolora.cohorts import compare, prepared, started
from tests.rolora.commands import bits, small
from tests.rolora.federated import toy

CLIENTS, RANK, IN, OUT, ROWS, RATE = 3, 2, 5, 4, 6, 0.05
STEPS = 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(IN, OUT, bias=False).requires_grad_(False)

    def forward(self, x):
        return self.linear(x)


@dataclass
class Squares:
    """½ ‖Y − model(X)‖² of whole clients."""

    def collate(self, examples):
        x, y = (torch.stack(part) for part in zip(*examples, strict=True))
        return Batch({"x": x}, y, 1, len(x), len(x))

    def loss(self, model, batch):
        return 0.5 * (model(**batch.inputs) - batch.labels).square().sum()


def problem(seed=0):
    rng = np.random.default_rng(seed)
    X = 0.4 * rng.standard_normal((CLIENTS, ROWS, IN))
    Y = rng.standard_normal((CLIENTS, ROWS, OUT))  # each client wants something else
    return X, Y, rng.standard_normal((OUT, IN)), rng


def ours(X, Y, W, start, phases, **options):
    """The published factors after rounds of all clients, and the states that these keep."""
    net = Net()
    attach(net, LoRAConfig(rank=RANK, alpha=RANK, target_modules=["linear"]))
    net.linear.weight.data = torch.tensor(W, dtype=torch.float32)
    layout = Layout.of(net, [])
    pairs = [(x, y) for x, y in zip(X.reshape(-1, IN), Y.reshape(-1, OUT), strict=True)]
    examples = [tuple(torch.tensor(part, dtype=torch.float32) for part in pair) for pair in pairs]
    parts = np.arange(CLIENTS * ROWS).reshape(CLIENTS, ROWS)
    local = LocalConfig(STEPS, None, ROWS, 1, "sgd", 0.0, 0.0, 0, control_variates=True, **options)
    trainer = LocalTrainer(net, layout, Squares(), examples, parts, local)
    flat = {
        kind: torch.tensor(value, dtype=torch.float32).flatten() for kind, value in start.items()
    }
    versions, states = {"A": 0, "B": 0}, [{} for _ in range(CLIENTS)]
    for number, phase in enumerate(phases, 1):
        prints = {kind: fingerprint(value) for kind, value in flat.items()}
        changes = []
        for client in range(CLIENTS):
            task = Task(
                "r",
                number,
                phase,
                client,
                layout.hash,
                dict(versions),
                prints,
                "fp32",
                RATE,
                {},
                {},
            )
            update, states[client] = trainer.train(task, flat, states[client])
            changes.append(update.change)
        moved = layout.part(torch.stack(changes).mean(0), phase)
        flat = {k: v + moved[k] if k in moved else v for k, v in flat.items()}
        for kind in moved:
            versions[kind] += 1
    shapes = {"A": (RANK, IN), "B": (OUT, RANK)}
    return {k: v.double().numpy().reshape(shapes[k]) for k, v in flat.items()}, states


def scaffold(X, Y, W, start, phases, local_coordinates=False):
    """The same by the paper's algorithm with its second option, in fp64: server and clients have a
    variate of each factor. In local coordinates a gradient of B is multiplied by c² (A Aᵀ)⁻¹ with
    c² the mean eigenvalue of A Aᵀ, that of A by the mirror image.
    """
    factors = dict(start)
    own = {k: np.zeros((CLIENTS, *v.shape)) for k, v in factors.items()}
    mean = {k: np.zeros(v.shape) for k, v in factors.items()}

    def gradient(i, f, kind):
        E = X[i] @ (W + f["B"] @ f["A"]).T - Y[i]
        G = E.T @ X[i]
        F = f["A"] @ f["A"].T if kind == "B" else f["B"].T @ f["B"]
        P = np.eye(RANK)
        if local_coordinates:
            P = np.trace(F) / RANK * np.linalg.inv(F)
        return G @ f["A"].T @ P if kind == "B" else P @ f["B"].T @ G

    for phase in phases:
        kinds = ("A", "B") if phase == "BOTH" else (phase,)
        ends, fresh = [], {k: own[k].copy() for k in kinds}
        for i in range(CLIENTS):
            f = dict(factors)
            for _ in range(STEPS):
                steps = {k: gradient(i, f, k) - own[k][i] + mean[k] for k in kinds}
                f = f | {k: f[k] - RATE * step for k, step in steps.items()}
            for k in kinds:
                fresh[k][i] = own[k][i] - mean[k] + (factors[k] - f[k]) / (STEPS * RATE)
            ends.append(f)
        for k in kinds:
            own[k], mean[k] = fresh[k], fresh[k].mean(0)
            factors[k] = np.mean([f[k] for f in ends], 0)
    return factors


def begun(rng):
    return {"A": rng.standard_normal((RANK, IN)), "B": 0.3 * rng.standard_normal((OUT, RANK))}


@pytest.mark.parametrize(
    "phases, local",
    [
        (["B", "A"] * 4, False),
        (["B", "A"] * 4, True),
        (["B", "B", "A"] * 2, False),
        (["B", "B", "A"] * 2, True),
        (["BOTH"] * 5, False),
    ],
    ids=["BA", "BA, local coordinates", "BBA", "BBA, local coordinates", "both factors"],
)
def test_they_are_scaffolds(phases, local):
    X, Y, W, rng = problem()
    start = begun(rng)
    made, _ = ours(X, Y, W, start, phases, local_coordinates=local)
    wanted = scaffold(X, Y, W, start, phases, local)
    for kind in ("A", "B"):
        moved = np.linalg.norm(wanted[kind] - start[kind])
        assert moved > 0.1 and np.linalg.norm(made[kind] - wanted[kind]) < 1e-4 * moved, kind


def test_what_is_kept_is_two_values_for_one_that_travels():
    X, Y, W, rng = problem()
    _, states = ours(X, Y, W, begun(rng), ["B", "A", "B", "A"])
    assert torch.stack([state["own.B"] for state in states]).std(0).min() > 0  # clients differ
    assert set(states[0]) == {f"{what}.{kind}" for what in ("own", "then", "at") for kind in "AB"}
    kept = sum(value.numel() * value.element_size() for value in states[0].values())
    assert kept == 8 * RANK * (IN + OUT) + 2 * 16


def test_drift_leaves_the_least_loss_and_they_do_not():
    """B trains to its end on clients that disagree: with corrections it is the least squares
    solution of all data, without it is another one.
    """
    X, Y, W, rng = problem()
    start = begun(rng)
    A = start["A"]
    left = np.concatenate([y - x @ W.T for x, y in zip(X, Y, strict=True)])
    best = np.linalg.lstsq(np.concatenate(X) @ A.T, left, rcond=None)[0].T
    made, _ = ours(X, Y, W, start, ["B"] * 400)
    drifted = start["B"]
    for _ in range(400):
        ends = []
        for x, y in zip(X, Y, strict=True):
            B = drifted
            for _ in range(STEPS):
                B = B - RATE * (x @ (W + B @ A).T - y).T @ x @ A.T
            ends.append(B)
        drifted = np.mean(ends, 0)
    assert np.linalg.norm(made["B"] - best) < 1e-3 * np.linalg.norm(best)
    assert np.linalg.norm(drifted - best) > 0.05 * np.linalg.norm(best)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("phase", ["B", "A"])
def test_a_cohort_corrects_as_its_clients_would_alone(phase, optimizer, files):
    made = prepared(files, control_variates=True, optimizer=optimizer)
    trainer = made.trainer()
    before = [trainer.train(*order)[1] for order in started(made, phase, seed=1)]
    compare(made, phase, 3, states=before)


def test_a_client_that_was_away_divides_by_what_it_missed():
    """Two publications later, everybody's mean step is half of what moved."""
    _, layout = toy.model()
    flat = {kind: torch.randn(size) for kind, size in layout.sizes.items()}
    prints = {kind: fingerprint(value) for kind, value in flat.items()}
    state = {
        "own.B": torch.zeros_like(flat["B"]),
        "then.B": flat["B"] - 1.0,
        "at.B": torch.tensor([0.5, 3.0]).double(),
    }
    for version, wanted in ((4, 2.0), (5, 1.0), (7, 0.5)):
        task = Task("r", 9, "B", 0, layout.hash, {"B": version}, prints, "fp32", RATE, {}, {})
        found = control_variates.corrections(layout, task, Start(flat, flat), state)
        assert set(found) == {"B"}
        torch.testing.assert_close(found["B"], torch.full_like(flat["B"], wanted))


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_bits(files, tmp_path, call):
    """Clients that are asked every other round of a kind, and whose states are on the disk."""
    usual = {"clients": 4, "clients-per-round": 3, "exchange-dtype": "int8"}
    usual |= {"no-equal-factors": True}  # so that "plain" differs by them alone
    for name, rounds in (("whole", 6), ("cut", 3), ("plain", 6)):
        asked = {"control-variates": True} if name != "plain" else {}
        run = small(files, rounds=rounds, **usual, **asked, **{"output-dir": tmp_path / name})
        assert call(*run)[0] == 0
    resumed = "--resume", "--output-dir", tmp_path / "cut", "--rounds", 6
    assert call(*resumed)[0] == 0
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole") != bits(tmp_path / "plain")


@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_after_a_round_at_a_rate_of_zero_a_run_goes_on(engine, files, tmp_path, call):
    ends = {"lr-schedule": "linear", "lr-end": 0, "optimizer": "sgd", "engine": engine}
    run = small(files, rounds=2, **ends, **{"output-dir": tmp_path / "run"})
    assert call(*run, "--control-variates")[0] == 0
    assert call("--resume", "--output-dir", tmp_path / "run", "--rounds", 5)[0] == 0


EVERYBODY = {"optimizer": "sgd", "clients": 4}
BY_ROWS = {"optimizer": "sgd", "partition": "column", "client_column": "label"}


@pytest.mark.parametrize(
    "options, wanted",
    [
        (EVERYBODY, True),
        (EVERYBODY | {"clients_per_round": 4}, True),
        (EVERYBODY | {"schedule": "BBA"}, True),
        (EVERYBODY | {"exchange_dtype": "int8", "error_feedback": True}, True),
        (EVERYBODY | {"clients_per_round": 3}, False),
        (EVERYBODY | {"clients_per_round": 4, "sampling": "poisson"}, False),
        (EVERYBODY | {"membership": "2:-0"}, False),
        (BY_ROWS, True),
        (BY_ROWS | {"clients_per_round": 3, "clients": 10}, True),
        (BY_ROWS | {"clients_per_round": 2, "clients": 2}, False),
        (EVERYBODY | {"optimizer": "adamw"}, False),
        (EVERYBODY | {"method": "ffa"}, False),
        (EVERYBODY | {"method": "fedavg"}, False),
        (EVERYBODY | {"method": "lora-a2"}, False),
        (EVERYBODY | {"aggregation": "median"}, False),
        (EVERYBODY | {"balance": True}, False),
        (EVERYBODY | {"server_momentum": 0.5}, False),
        (EVERYBODY | {"dp_clip": 1.0, "dp_noise": 1.0}, False),
        (EVERYBODY | {"buffer": 2}, False),
        (EVERYBODY | {"control_variates": False}, False),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_who_has_them_unasked(options, wanted, files):
    made = prepared(files, **options)
    assert made.config.optimisation.control_variates is wanted


def test_what_would_be_too_much_is_not_kept_unasked(files, monkeypatch):
    monkeypatch.setattr(defaults, "_CARRIED", 1000)
    assert prepared(files, **EVERYBODY).config.optimisation.control_variates is False
    asked = prepared(files, **EVERYBODY, control_variates=True)
    assert asked.config.optimisation.control_variates is True


def test_a_run_from_before_they_were_there_goes_on_without(files, tmp_path, call):
    flags = small(files, rounds=2, **{"optimizer": "sgd", "lr": 0.1})
    longer = ("--resume", "--rounds", 4, "--output-dir")
    ends = {}
    for name, own in (("without", ("--no-control-variates",)), ("before", ())):
        folder = tmp_path / name
        assert call(*flags, *(own or ("--no-control-variates",)), "--output-dir", folder)[0] == 0
        if name == "before":  # as a version that did not know the option wrote it
            text = (folder / "config.toml").read_text()
            assert "control_variates = false\n" in text
            (folder / "config.toml").write_text(text.replace("control_variates = false\n", ""))
        assert call(*longer, folder)[0] == 0
        ends[name] = bits(folder)
    assert ends["before"] == ends["without"]
