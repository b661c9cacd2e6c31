"""The paper's two-layer network (section 5.1) as a job of the engine's, and one run of it.

    f(x) = ReLU(x A B) W_out,  A [d, r] and B [r, h] train, W_out [h, 10] is fixed and random

A and B are the factors of an adapter on a linear layer of zeros, and the rounds are the engine's
own. B starts at 1e-2 · Gaussian: at exactly 0 the derivative of ReLU(0) is 0 and nothing would ever
train. Gradients are clipped, because plain SGD diverges at the larger rates.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from rolora import variants
from rolora.experiments.digits import SPLITS, Digits, clients_of

_EPOCHS, _BATCH, _CLIP = 5, 64, 1.0
_LAST = 10  # rounds by which a rate is judged


@dataclass(frozen=True)
class Setting:
    """What identifies a run."""

    method: str
    split: str
    rate: float
    seed: int
    rounds: int
    rank: int
    data: str


def train(setting: Setting, digits: Digits, on: str) -> dict:
    """One run: accuracy after every round on the test set, and bytes of messages up and down a
    client; or its score on the held-out slice.
    """
    from rolora.federated.server import QuorumMissed
    from rolora.run.federation import build_server

    rows: list[dict] = []
    server = build_server(prepare(setting, digits, on), on_round=rows.append)
    server.norms.multiple = (
        0.0  # at these rates honest changes differ by more than a bound would bear
    )
    try:
        server.run()
    except QuorumMissed:
        rows += [rows[-1]] * (
            setting.rounds + 1 - len(rows)
        )  # every client diverged: it stays where it was
    accuracy = [round(row["eval"]["accuracy"], 4) for row in rows[1:]]
    if on == "held":  # judges a rate, by its last rounds: single ones jump at large rates
        return asdict(setting) | {"on": on, "score": round(statistics.mean(accuracy[-_LAST:]), 4)}
    return (
        asdict(setting)
        | {"on": on, "accuracy": accuracy}
        | {
            **{
                way: [row[way] // server.config.clients for row in rows[1:]]
                for way in ("bytes_up", "bytes_down")
            }
        }
    )


def prepare(setting: Setting, digits: Digits, on: str):
    """The `Job` of a run: what `rolora.train` works with, for this network and these data."""
    import torch

    from rolora.adapter.attach import attach
    from rolora.adapter.configuration import LoRAConfig
    from rolora.federated import methods
    from rolora.federated.layout import Layout
    from rolora.run import spans
    from rolora.run.job import Job

    resolved, clients = _configuration(setting, digits), clients_of(digits.train[1], setting.split)
    own, draw = resolved.adapter, torch.Generator().manual_seed(setting.seed)
    model = network(digits.train[0].shape[1], own.rank, draw)
    report = attach(
        model,
        LoRAConfig(rank=own.rank, alpha=own.alpha, rslora=own.rslora, target_modules=["hidden"]),
    )
    model.draw(own.init)
    train, judged = (
        list(zip(*map(torch.from_numpy, part), strict=True))
        for part in (digits.train, digits.held if on == "held" else digits.test)
    )
    if methods.load(resolved.federation.method).narrows:
        spans.narrow(model, cast(Any, DigitsRecipe()), train, clients, _BATCH, setting.seed)
        model.draw_core()
    return Job(
        resolved,
        model,
        None,
        cast(Any, DigitsRecipe()),  # what a run uses of one: no rows are read here
        Layout.of(model),
        report,
        [],
        train,
        judged,
        None,
        clients,
        torch.device("cpu"),
    )


def _configuration(setting: Setting, digits: Digits):
    """The options of a run, with what its method asks for."""
    from rolora import config
    from rolora.federated import compatibility

    options = dict(
        lr=setting.rate,
        rounds=setting.rounds,
        seed=setting.seed,
        rank=setting.rank,
        alpha=float(setting.rank),
        clients=SPLITS[setting.split][0],
        local_epochs=_EPOCHS,
        batch_size=_BATCH,
        optimizer="sgd",
        exchange_dtype="fp32",
        max_grad_norm=_CLIP,
        device="cpu",
        engine="batched",
        init="gaussian",
    )
    named = config.Config().with_values(**(options | variants.parse(setting.method)))
    resolved = compatibility.settle(config.check(named))
    if resolved.federation.method == "fedsa" or resolved.federation.client_ranks:
        resolved = resolved.with_values(engine="sequential")  # their clients are not alike
    if resolved.optimisation.control_variates is None:
        resolved = resolved.with_values(control_variates=True)  # so small a model can
    clients = len(clients_of(digits.train[1], setting.split))
    return resolved.with_values(clients_per_round=clients, metric=DigitsRecipe.headline)


def network(width: int, rank: int, draw):
    """ReLU(x A B) W_out as a module: a linear of zeros, whose adapter holds A and B, and a fixed
    random one.
    """
    import torch
    from torch import nn

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = (
                nn.Linear(width, width, bias=False),
                nn.Linear(width, 10, bias=False),
            )
            self.first = (
                torch.randn(width, rank, generator=draw) / width**0.5,
                1e-2 * torch.randn(rank, width, generator=draw),
            )
            with torch.no_grad():
                self.hidden.weight.zero_()
                self.out.weight.copy_((torch.randn(width, 10, generator=draw) / width**0.5).t())

        @torch.no_grad()
        def draw(self, init: str) -> None:
            """The initial factors, once they are attached."""
            A, B = self.first
            factors = dict(self.hidden.named_parameters())
            factors["lora_A"].copy_(torch.linalg.qr(A).Q.t() if init == "orthogonal" else A.t())
            factors["lora_B"].copy_(B.t())

        @torch.no_grad()
        def draw_core(self) -> None:
            """What lies between two factors that stay starts small, as B does."""
            core = dict(self.hidden.named_parameters())["lora_B"]
            core.normal_(0.0, 1e-2, generator=draw)

        def forward(self, images):
            return self.out(torch.relu(self.hidden(images)))

    return Network()


class DigitsRecipe:
    """Images and labels for the engine; see `rolora.recipes.Recipe`."""

    headline = "accuracy"

    def collate(self, examples: Sequence):
        import torch

        from rolora.recipes import Batch

        images, labels = (torch.stack(part) for part in zip(*examples, strict=True))
        return Batch({"images": images}, labels, len(labels), len(labels), len(labels))

    def loss(self, model, batch):
        return self.losses(model, batch).sum()

    def losses(self, model, batch):
        from torch.nn.functional import cross_entropy

        return cross_entropy(model(**batch.inputs), batch.labels, reduction="none")

    def evaluate(self, model, examples: Sequence, batch_size: int) -> dict[str, float]:
        import torch

        batch = self.collate(examples)
        with torch.no_grad():
            hits = model(**batch.inputs).argmax(1).eq(batch.labels)
            return {
                "accuracy": hits.float().mean().item(),
                "loss": self.loss(model, batch).item() / len(hits),
            }
