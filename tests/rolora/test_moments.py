"""Moments that clients carry from round to round: those of one AdamW that never stopped."""

import tomllib

import pytest
import torch

from rolora import config
from rolora.federated.wire import Task
from rolora.run import defaults, job
from tests.rolora.commands import bits, small


def test_two_rounds_with_moments_are_one_round_twice_as_long(files):
    """One client, one factor, no averaging in between.

    The moments are all that a round would lose.
    """
    ends = {}
    for carry in (True, False):
        made = job.prepare(
            config.resolve(
                {
                    "model": str(files["llama"]),
                    "train_file": str(files["train"]),
                    "eval_file": str(files["eval"]),
                    "clients": 2,
                    "rank": 3,
                    "local_steps": 3,
                    "batch_size": 4,
                    "max_length": 32,
                    "device": "cpu",
                    "train_head": False,
                    "carry_moments": carry,
                    "equal_factors": False,
                }
            )
        )
        trainer, layout = made.trainer(), made.layout
        published, state, judge = layout.gather(made.model, tuple(layout.sizes)), {}, None
        starts, batches = dict(published), []
        loss = made.recipe.loss
        made.recipe.loss = lambda model, batch, loss=loss, batches=batches: (
            batches.append(batch) or loss(model, batch)
        )
        for number in (1, 2):
            task = Task(
                "r", number, "B", 0, layout.hash, {}, {"round": str(number)}, "fp32", 1e-2, {}, {}
            )
            update, state = trainer.train(task, published, state)
            published = published | {"B": published["B"] + update.change}
        assert set(state) == ({"exp_avg.B", "exp_avg_sq.B", "step.B"} if carry else set())
        layout.scatter(made.model, starts)
        parameters = layout.parameters(made.model, "B")
        for p in parameters:
            p.requires_grad_(True)
        judge = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        for batch in list(batches):  # the same six batches by one optimizer
            (loss(made.model, batch) / batch.weight).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            judge.step(), judge.zero_grad()
        wanted = layout.gather(made.model, ("B",))["B"]
        ends[carry] = ((published["B"] - wanted).norm() / wanted.norm()).item()
    assert ends[True] < 1e-5 < 1e-2 < ends[False]


def test_beta2_is_that_of_every_group():
    from rolora.federated.client import build_optimizer
    from rolora.federated.local import LocalConfig

    settings = LocalConfig(1, None, 1, 1, "adamw", 0.0, 0.0, 0, beta2=0.95)
    by_kind = {kind: [torch.zeros(1, requires_grad=True)] for kind in ("B", "head")}
    made = build_optimizer(settings, by_kind, 1e-2)
    assert [group["betas"] for group in made.param_groups] == [(0.9, 0.95)] * 2


@pytest.mark.parametrize(
    "flags, carried",
    [
        ({}, True),
        ({"carry-moments": True}, True),
        ({"no-carry-moments": True}, False),
        ({"method": "fedavg"}, False),
        ({"balance": True}, False),
        ({"optimizer": "sgd"}, False),
        ({"local-coordinates": True}, False),
    ],
    ids=lambda value: " ".join(value) or "default" if isinstance(value, dict) else "",
)
def test_who_carries_moments_unasked(flags, carried, files, tmp_path, call):
    code, out, _ = call(*small(files, rounds=2, **flags), "--output-dir", tmp_path / "run")
    assert code == 0 and ("stay with the clients" in out) == carried
    assert (
        tomllib.loads((tmp_path / "run" / "config.toml").read_text())["optimisation"][
            "carry_moments"
        ]
        == carried
    )


def test_what_would_be_too_much_is_not_carried_unasked(files, tmp_path, call, monkeypatch):
    monkeypatch.setattr(defaults, "_CARRIED", 1000)
    code, out, _ = call(*small(files), "--output-dir", tmp_path / "much")
    assert code == 0 and "moments: AdamW starts anew in every round" in out
    assert (
        call(*small(files, **{"no-carry-moments": True}), "--output-dir", tmp_path / "none")[0] == 0
    )
    assert (
        call(*small(files, **{"carry-moments": True}), "--output-dir", tmp_path / "asked")[0] == 0
    )
    assert bits(tmp_path / "much") == bits(tmp_path / "none") != bits(tmp_path / "asked")
