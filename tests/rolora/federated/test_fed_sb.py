"""Fed-SB against its rule in NumPy in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from rolora import config
from rolora.adapter.model import adapted_layers
from rolora.federated import sampling
from rolora.federated.layout import fingerprint
from rolora.federated.wire import Task
from rolora.run import job, spans
from rolora.run.federation import build_server
from tests.rolora.cohorts import compare, prepared
from tests.rolora.federated.digits_run import digits_server, seen_updates


class Squares:
    """`½ ‖W x − y‖²`, whose gradient is `(W x − y) xᵀ`; an example is (x, y)."""

    def collate(self, examples):
        from rolora.recipes import Batch

        x, y = (torch.stack(part) for part in zip(*examples, strict=True))
        return Batch({"x": x}, y, len(x), len(x), len(x))

    def loss(self, model, batch):
        return (model(batch.inputs["x"]) - batch.labels).square().sum() / 2


def test_the_factors_are_singular_vectors_of_the_mean_of_clients_first_gradients():
    from rolora import LoRAConfig, attach

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5))
    W, bias = (t.detach().double().numpy() for t in (model[0].weight, model[0].bias))
    attach(model, LoRAConfig(rank=2, target_modules=["0"]))
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(20, 7)), rng.normal(size=(20, 5))
    examples = [
        (torch.tensor(a).float(), torch.tensor(b).float()) for a, b in zip(x, y, strict=True)
    ]
    clients = [np.arange(3), np.arange(3, 20)]
    spans.narrow(model, Squares(), examples, clients, 4, seed=9)
    wanted = np.zeros((5, 7))
    for client, own in enumerate(clients):
        rows = own[sampling.batches(9, 0, client, len(own), 4, 1)[0]]
        gradient = (x[rows] @ W.T + bias - y[rows]).T @ x[rows] / 4
        wanted += len(own) / 20 * gradient
    U, _, Vt = np.linalg.svd(wanted)
    ((_, layer),) = adapted_layers(model)
    A, span = layer.lora_A.detach().double().numpy(), layer.lora_span.detach().double().numpy()
    signs = np.sign((U[:, :2] * span).sum(0))
    np.testing.assert_allclose(span, U[:, :2] * signs, atol=1e-5)
    np.testing.assert_allclose(A, Vt[:2] * signs[:, None], atol=1e-5)
    assert layer.lora_B.shape == (2, 2) and not layer.lora_B.any()
    assert not any(p.grad is not None for p in model.parameters())


def test_r_alone_moves_by_the_mean_and_the_product_is_exact():
    """What the server publishes is the mean of the clients' own products."""
    server, _ = digits_server("fed-sb", rounds=3)
    layout, model = server.layout, server.transport.cohort.trainer.model
    start = {kind: flat.clone() for kind, flat in server.state.published.items()}
    seen = seen_updates(server)
    before = start["B"].double().numpy()
    server.run()
    ends = server.state.master
    assert set(start) == {"A", "B", "span"} and start["B"].numel() == 8 * 8
    for kind in ("A", "span"):
        assert torch.equal(server.state.published[kind], start[kind]), kind
        assert server.state.versions[kind] == 0
    for number in (1, 2, 3):
        own = [(u.weight, change.double().numpy()) for u, change, _ in seen if u.round == number]
        assert len(own) == 10
        weights, changes = zip(*own, strict=True)
        before = before + np.average(changes, axis=0, weights=weights)
    np.testing.assert_allclose(ends["B"].double().numpy(), before, atol=1e-5)
    span, R, A = (
        next(iter(layout.views(server.state.published, kind).values())).double().numpy()
        for kind in ("span", "B", "A")
    )
    layout.scatter(model, server.state.published)
    ((_, layer),) = adapted_layers(model)
    np.testing.assert_allclose(
        layer.delta().double().numpy(), layer.scaling * span @ R @ A, atol=1e-6
    )


def test_a_client_s_step_is_that_of_the_r_by_r_matrix(files):
    """SGD on `R` in `W + s U R A`: the gradient is `s Uᵀ G Aᵀ`, of G the layer's own."""
    made = prepared(
        files, method="fed-sb", optimizer="sgd", local_steps=1, max_grad_norm=0.0, train_head=False
    )
    trainer, factors = made.trainer(), made.initial_factors()
    prints = {kind: fingerprint(flat) for kind, flat in factors.items()}
    task = Task("r", 1, "B", 0, made.layout.hash, {}, prints, "fp32", 0.1, {}, {})
    own = made.clients[0]
    (rows,) = sampling.batches(made.config.run.seed, 1, 0, len(own), 4, 1)
    update, _ = trainer.train(task, factors, {})
    made.layout.scatter(made.model, factors)
    for _, layer in adapted_layers(made.model):
        layer.set_phase("BOTH")
    whole = spans.gradients(
        made.model, _Once(made.recipe, [made.train[own[i]] for i in rows]), made.train, [own], 4, 0
    )
    changes = made.layout.views(made.layout.part(update.change, "B"), "B")
    for path, layer in adapted_layers(made.model):
        U, A = layer.lora_span.double(), layer.lora_A.double()
        wanted = -0.1 * layer.scaling * U.t() @ whole[path].double() @ A.t()
        assert (changes[path] - wanted).norm() <= 1e-4 * wanted.norm(), path


class _Once:
    """A recipe that has one batch, whatever it is asked for."""

    def __init__(self, recipe, examples):
        self.recipe, self.examples = recipe, examples

    def collate(self, examples):
        return self.recipe.collate(self.examples)

    def loss(self, model, batch):
        return self.recipe.loss(model, batch)


def test_clients_together_are_as_alone(files):
    compare(prepared(files, method="fed-sb", optimizer="sgd"), "B", 5, gate=1e-4)


def test_the_saved_adapter_is_plain_lora(files, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made = prepared(files, method="fed-sb", prompt_column="prompt", response_column="response")
    server = build_server(made, on_round=lambda row: None)
    server.config = replace(server.config, rounds=2)
    server.run()
    made.save_adapter(server.state.published, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(files["llama"], dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.arange(3, 11)[None]
    made.layout.scatter(made.model, server.state.published)
    made.model.eval()
    with torch.no_grad():
        ours = made.model(input_ids=ids).logits
        wanted = theirs(input_ids=ids).logits
        with theirs.disable_adapter():
            moved = (wanted - theirs(input_ids=ids).logits).norm()
    assert moved > 0 and (ours - wanted).norm() <= 1e-4 * moved


def test_a_plan_without_weights_has_the_shapes(files):
    flags = {
        "model": str(files["llama"]),
        "train_file": str(files["train"]),
        "rank": 3,
        "max_length": 32,
    }
    flags |= {"eval_file": str(files["eval"]), "method": "fed-sb", "device": "cpu", "clients": 2}
    made = job.prepare(config.resolve(flags), weights=False)
    count = len(list(adapted_layers(made.model)))
    assert made.layout.sizes["B"] == 9 * count
    heads = made.layout.sizes.get("head", 0)
    assert made.layout.travelling_size("B") == 9 * count + heads


@pytest.mark.parametrize("flags", [{"init": "pissa"}])
def test_factors_of_another_start_are_refused(flags, files):
    from rolora.errors import BadInput

    with pytest.raises(BadInput, match="first gradient"):
        prepared(files, method="fed-sb", **flags)
