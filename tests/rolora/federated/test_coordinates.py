"""Steps in local coordinates are preconditioned ones, and the path is that of the balanced hand-over."""

import numpy as np
import pytest
import torch

from rolora.experiments import digits, two_layers
from rolora.federated import wire
from rolora.run.federation import build_server
from tests.rolora.federated.factor_pairs import factors


def one_step(method, factor, rate=0.25):
    """(published factors, plain gradient of `factor`, its change after one full-batch step of one
    client) on the digits' network.
    """
    setting = two_layers.Setting(method, "iid", rate, 0, 1, 8, "digits")
    job = two_layers.prepare(setting, digits.load(None), "test")
    job.config = job.config.with_values(
        local_epochs=None, local_steps=1, batch_size=len(job.clients[0]), max_grad_norm=0.0
    )
    trainer, layout = job.trainer(), job.layout
    published = layout.gather(job.model, ("A", "B"))
    prints = {"A": "a", "B": "b"}
    task = wire.Task("r", 1, factor, 0, layout.hash, {}, prints, "fp32", rate, {}, {})
    update, _ = trainer.train(task, published, {})
    layout.scatter(job.model, published)
    parameters = {"A": job.model.hidden.lora_A, "B": job.model.hidden.lora_B}
    batch = job.recipe.collate([job.train[i] for i in job.clients[0]])
    job.model.hidden.set_phase(factor)
    loss = job.recipe.loss(job.model, batch) / batch.weight
    gradient = torch.autograd.grad(loss, parameters[factor])[0].double().numpy()
    A, B = (layout.views(published, kind)["hidden"].double().numpy() for kind in ("A", "B"))
    return A, B, gradient, update.change.view(gradient.shape).double().numpy()


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_step_in_local_coordinates_is_a_preconditioned_one(factor):
    """SGD in orthonormal coordinates of the frozen factor is ScaledGD (Tong et al.

    2021) times c² = ‖frozen‖² / r: with frozen A, `ΔB = −η c² G (A Aᵀ)⁻¹`; plain SGD is `−η G`.
    """
    A, B, gradient, change = one_step("rolora", factor)
    _, _, _, plain = one_step("rolora+local-coordinates=false", factor)
    frozen = A @ A.T if factor == "B" else B.T @ B
    inverse = np.linalg.inv(frozen) * np.trace(frozen) / len(frozen)
    wanted = -0.25 * (gradient @ inverse if factor == "B" else inverse @ gradient)
    assert np.linalg.norm(change - wanted) < 1e-4 * np.linalg.norm(wanted)
    assert np.linalg.norm(plain + 0.25 * gradient) < 1e-4 * np.linalg.norm(gradient)
    assert np.linalg.norm(change - plain) > 1e-2 * np.linalg.norm(plain), "the two must differ here"


def test_local_coordinates_and_the_balanced_hand_over_are_the_same_path():
    """From an orthonormal A: round 1 is the same, and what the hand-over does to B before round 2
    the coordinates do locally.
    """
    ends = []
    for how in ("+balance", "", "+local-coordinates=false"):
        server = build_server(
            two_layers.prepare(
                two_layers.Setting(f"rolora+init=orthogonal{how}", "10x1", 0.5, 0, 2, 8, "digits"),
                digits.load(None),
                "test",
            ),
            on_round=lambda row: None,
        )
        server.run()
        A, B = factors(server.layout, server.state.published)["hidden"]
        ends.append(B @ A)
    assert np.linalg.norm(ends[0] - ends[1]) < 1e-3 * np.linalg.norm(ends[0])
    assert np.linalg.norm(ends[0] - ends[2]) > 5e-2 * np.linalg.norm(ends[0]), (
        "and not the plain one"
    )


def test_the_coordinates_are_those_of_the_phase():
    """Two rounds of different phases may start from the same factors, after a round that changed
    nothing.
    """
    job = two_layers.prepare(
        two_layers.Setting("rolora", "iid", 0.5, 0, 2, 8, "digits"), digits.load(None), "test"
    )
    published = job.layout.gather(job.model, ("A", "B"))
    alone, twice = job.trainer(), job.trainer()
    tasks = [
        wire.Task("r", 1, phase, 0, job.layout.hash, {}, {"A": "a", "B": "b"}, "fp32", 0.5, {}, {})
        for phase in "BA"
    ]
    first = [twice.train(task, published, {})[0].change for task in tasks]
    assert torch.equal(first[1], alone.train(tasks[1], published, {})[0].change)
    assert not torch.equal(first[0], torch.zeros_like(first[0]))
