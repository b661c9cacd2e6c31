"""A prepared job, tasks for its clients, and what they answer together and alone."""

from dataclasses import replace

import torch

from rolora import config
from rolora.cohort.batched import Batched
from rolora.cohort.sequential import Sequential
from rolora.federated.layout import fingerprint
from rolora.federated.wire import Task
from rolora.run import job


def prepared(files, family="llama", **extra):
    flags = {
        "model": str(files[family]),
        "train_file": str(files["train"]),
        "eval_file": str(files["eval"]),
        "clients": 5,
        "rounds": 4,
        "local_steps": 3,
        "batch_size": 4,
        "rank": 3,
        "max_length": 32,
        "lr": 1e-2,
        "engine": "sequential",
        "device": "cpu",
        "eval_max_examples": 8,
    } | extra
    return job.prepare(config.resolve(flags))


def started(made, phase, seed=3):
    """Published factors away from B = 0, and a task for every client.

    SGD takes large steps: the change is a difference of fp32 values, and a small one would be
    mostly their rounding.
    """
    lr = 0.1 if made.config.optimisation.optimizer == "sgd" else 1e-2
    published = made.initial_factors()
    published = {
        k: v + 0.05 * torch.randn(v.shape, generator=torch.Generator().manual_seed(seed))
        for k, v in published.items()
    }
    prints = {k: fingerprint(v) for k, v in published.items()}
    tasks = [
        Task("r", 3, phase, client, made.layout.hash, {}, prints, "fp32", lr, {}, {})
        for client in range(len(made.clients))
    ]
    return [(task, published, {}) for task in tasks]


def compare(made, phase, chunk, gate=2e-4, states=None):
    """`states`: what each client has kept of an earlier round."""
    orders, trainer = started(made, phase), made.trainer()
    if states is not None:
        pairs = zip(orders, states, strict=True)
        orders = [(task, published, state) for (task, published, _), state in pairs]
    alone = {client: update for client, update, _ in Sequential(trainer).train(orders)}
    together = {
        client: update
        for client, update, _ in Batched(trainer, made.report.heads, chunk).train(orders)
    }
    assert list(together) == list(alone)
    for client, update in alone.items():
        ours = together[client]
        assert replace(ours, change=None, ranks=None, loss=0.0) == replace(
            update, change=None, ranks=None, loss=0.0
        )
        assert (ours.ranks is None) == (update.ranks is None) and (
            ours.ranks is None or torch.equal(ours.ranks, update.ranks)
        )
        assert abs(ours.loss - update.loss) <= 1e-4 * abs(update.loss)
        gap = (ours.change - update.change).norm() / update.change.norm()
        assert update.change.norm() > 0 and gap <= gate, (client, gap)
