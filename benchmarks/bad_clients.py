"""What one bad client among five does to a round: our server beside the stock aggregators of Flower
and NVFlare.

    python -m benchmarks.bad_clients ours              # in this environment
    # in an environment with `pip install flwr nvflare`: neither needs torch
    python benchmarks/bad_clients.py flower nvflare
    python -m benchmarks.bad_clients table

Five clients send a 4 × 2 array each, weights 10 to 50; client 2 is bad. Stock aggregators are
called as their servers call them, and the outcome is told from what comes back: the honest clients'
mean lies in a box, and so should the result. Outcomes go to benchmarks/results/bad_clients.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "bad_clients.json"
HONEST = [np.random.default_rng(n).normal(size=(4, 2)).astype(np.float32) for n in range(5)]
WEIGHTS = [10, 20, 30, 40, 50]
CASES = {
    "NaN in the update": (np.full((4, 2), np.nan, np.float32), 30),
    "Inf in the update": (np.full((4, 2), np.inf, np.float32), 30),
    "shape (1,) for (4, 2)": (np.ones(1, np.float32), 30),
    "shape (3, 2) for (4, 2)": (np.ones((3, 2), np.float32), 30),
    "a change of 1000 everywhere": (np.full((4, 2), 1e3, np.float32), 30),
    "weight 1e9": (HONEST[2], 10**9),
    "weight NaN": (HONEST[2], float("nan")),
    "weight -30": (HONEST[2], -30),
    "the last round's update again": (None, 30),
}


def judged(result: np.ndarray | None) -> str:
    """The outcome of an aggregation, in a few words."""
    if result is None:
        return "no result"
    if not np.isfinite(result).all():
        return "NaN model"
    if result.shape != (4, 2):
        return f"model of shape {result.shape}"
    honest = np.stack([h for n, h in enumerate(HONEST) if n != 2])
    if np.abs(result - HONEST[2]).max() < 1e-3:
        return "owns the model"
    if (result < honest.min(0) - 1.0).any() or (result > honest.max(0) + 1.0).any():
        return "model thrown off"
    return "ok"


def outcome(aggregate, name: str) -> str:
    """`aggregate(updates, weights)` with client 2's update replaced."""
    value, weight = CASES[name]
    updates, weights = list(HONEST), list(WEIGHTS)
    updates[2], weights[2] = HONEST[0] if value is None else value, weight
    try:
        told = judged(aggregate(updates, weights))
    except Exception as error:
        return f"run dies ({type(error).__name__})"
    if told == "ok" and value is None:
        return "counted as new"
    if told == "ok" and np.shape(value) == (1,):
        return "silently broadcast"
    if (
        told == "ok"
        and weight == -30
        and not np.allclose(aggregate(HONEST, weights), aggregate(HONEST, WEIGHTS))
    ):
        return "counted as -30"
    return told


def flower() -> dict[str, dict[str, str]]:
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import strategy
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = (
        1  # as inside a ServerApp's process
    )

    def by(name):
        def aggregate(updates, weights):
            made = getattr(strategy, name)()
            replies = []
            for node, (update, weight) in enumerate(zip(updates, weights, strict=True)):
                content = RecordDict(
                    {
                        "arrays": ArrayRecord({"w": Array(update)}),
                        "metrics": MetricRecord({"num-examples": weight}),
                    }
                )
                asked = Message(content=RecordDict(), message_type="train", dst_node_id=node + 1)
                replies.append(Message(content, reply_to=asked))
            arrays, _ = made.aggregate_train(1, replies)
            return None if arrays is None else arrays["w"].numpy()

        return aggregate

    names = {
        "Flower FedAvg": "FedAvg",
        "Flower FedMedian": "FedMedian",
        "Flower FedTrimmedAvg": "FedTrimmedAvg",
        "Flower Krum": "Krum",
    }
    return {
        title: {case: outcome(by(name), case) for case in CASES} for title, name in names.items()
    }


def nvflare() -> dict[str, dict[str, str]]:
    from nvflare.app_common.abstract.fl_model import FLModel
    from nvflare.app_common.workflows.base_fedavg import BaseFedAvg

    def aggregate(updates, weights):
        models = [
            FLModel(
                params={"w": update},
                meta={"client_name": f"site-{n}", "NUM_STEPS_CURRENT_ROUND": weight},
                current_round=1,
            )
            for n, (update, weight) in enumerate(zip(updates, weights, strict=True))
        ]
        return BaseFedAvg.aggregate_fn(models).params["w"]

    return {"NVFlare FedAvg": {case: outcome(aggregate, case) for case in CASES}}


def ours() -> dict[str, dict[str, str]]:
    """Whole rounds of our server: the messages are built and tampered with as a client could."""
    from dataclasses import replace

    import torch

    from rolora.cohort.sequential import Sequential
    from rolora.federated import guard, methods, wire
    from rolora.federated.layout import Entry, Layout
    from rolora.federated.round_config import RoundConfig
    from rolora.federated.server import Server
    from rolora.federated.state import GlobalState
    from rolora.transport.local import Arrival, LocalTransport

    layout = Layout((Entry("w", "A", (4, 2), 0), Entry("w", "B", (4, 2), 0)))

    class Trainer:
        def __init__(self):
            self.layout = layout

        def train(self, task, published, client_state):
            return wire.Update(
                task.run,
                task.round,
                task.phase,
                task.client,
                task.layout,
                task.versions,
                WEIGHTS[task.client],
                1.0,
                1,
                1,
                torch.from_numpy(HONEST[task.client]).flatten(),
            ), client_state

    class Transport(LocalTransport):
        case, previous = None, None

        def run_round(self, tasks, deadline=None):
            for arrival in super().run_round(tasks, deadline):
                update = wire.decode_update(arrival.message, 1 << 20)
                if arrival.client == 2 and update.round == 7:
                    value, weight = CASES[self.case]
                    if value is None:
                        yield Arrival(2, self.previous)
                        continue
                    yield Arrival(
                        2,
                        wire.encode_update(
                            replace(update, change=torch.from_numpy(value).flatten(), weight=weight)
                        ),
                    )
                    continue
                if arrival.client == 2:
                    self.previous = arrival.message
                yield arrival

    found = {}
    for case in CASES:
        rows, states = [], []
        config = RoundConfig(
            run="r",
            rounds=7,
            clients=5,
            clients_per_round=5,
            quorum=1,
            exchange_dtype="fp32",
            eval_every=1,
            checkpoint_every=1,
            seed=0,
            max_abs=64.0,
            max_examples=max(WEIGHTS),
            examples_of=lambda client: WEIGHTS[client],
            lr=lambda phase, number: 0.1,
        )
        transport = Transport(Sequential(Trainer()), 1 << 20)
        transport.case = case
        server = Server(
            config,
            methods.load("rolora"),
            layout,
            transport,
            GlobalState.initial({"A": torch.zeros(8), "B": torch.zeros(8)}),
            lambda published: {},
            rows.append,
            lambda snapshot, states=states: states.append(snapshot.state),
            norms=guard.Norms(10.0),
        )
        server.run()
        result = (server.state.published["B"] - states[-2].published["B"]).view(4, 2).numpy()
        mean = np.average(
            [h for n, h in enumerate(HONEST) if n != 2],
            axis=0,
            weights=[w for n, w in enumerate(WEIGHTS) if n != 2],
        )
        exact = (
            np.abs(result - mean).max() < 1e-5
        )  # the mean of the four others, but for fp32's rounding
        reasons = ", ".join(rows[-1]["rejected"])
        found[case] = f"rejected: {reasons}" if exact and reasons else judged(result)
    return {"RoLoRA": found}


def table() -> None:
    results = json.loads(RESULTS.read_text())
    names = list(results["outcomes"])
    print(f"| one bad client of five | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for case in CASES:
        print(f"| {case} | " + " | ".join(results["outcomes"][name][case] for name in names) + " |")


def main() -> None:
    if sys.argv[1:] == ["table"]:
        return table()
    from importlib.metadata import version

    results = (
        json.loads(RESULTS.read_text()) if RESULTS.exists() else {"versions": {}, "outcomes": {}}
    )
    for which in sys.argv[1:]:
        results["outcomes"] |= {"ours": ours, "flower": flower, "nvflare": nvflare}[which]()
        package = {"ours": "rolora", "flower": "flwr", "nvflare": "nvflare"}[which]
        results["versions"][package] = version(package)
    order = ["RoLoRA", *sorted(name for name in results["outcomes"] if name != "RoLoRA")]
    results["outcomes"] = {
        name: results["outcomes"][name] for name in order if name in results["outcomes"]
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
