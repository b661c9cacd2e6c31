"""A federation small enough to run in milliseconds: a two-layer model, clients that train by a
given rule.
"""

from __future__ import annotations

import torch
from torch import nn

from rolora import LoRAConfig, attach
from rolora.cohort.sequential import Sequential
from rolora.federated import codec, guard, methods
from rolora.federated.buffered.clock import Clock
from rolora.federated.buffered.server import BufferedServer
from rolora.federated.layout import Layout
from rolora.federated.round_config import RoundConfig
from rolora.federated.server import Server
from rolora.federated.state import GlobalState
from rolora.federated.wire import Task, Update
from rolora.transport.local import LocalTransport
from rolora_kernels.codecs import CODECS

WEIGHTS = [30, 10, 25, 7, 40, 18]


def model(rank=3):
    torch.manual_seed(4)
    net = nn.ModuleDict(
        {"q_proj": nn.Linear(10, 8), "v_proj": nn.Linear(8, 6), "score": nn.Linear(6, 3)}
    )
    report = attach(
        net,
        LoRAConfig(rank=rank, target_modules=["q_proj", "v_proj"], modules_to_save=["score"]),
        seed=0,
    )
    return net, Layout.of(net, report.heads)


class Drift:
    """Clients whose local training moves every travelling value by a keyed random step.

    `saw` records what each held, `phases` what each trained.
    """

    def __init__(self, layout):
        self.layout, self.saw, self.phases = layout, [], []

    def train(self, task: Task, published, client_state):
        self.phases.append((task.round, task.client, task.phase))
        self.saw.append((task.round, task.client, {k: v.clone() for k, v in published.items()}))
        generator = torch.Generator().manual_seed(1000 * task.round + task.client)
        size = self.layout.travelling_size(task.phase)
        change = torch.randn(size, generator=generator) * 0.1
        key = codec.key(1, task.round, f"client {task.client}")
        return Update(
            task.run,
            task.round,
            task.phase,
            task.client,
            task.layout,
            task.versions,
            WEIGHTS[task.client],
            1.0,
            5,
            5,
            CODECS[task.exchange_dtype].encode(change, key),
        ), client_state


def server(
    method="rolora",
    rounds=6,
    per_round=None,
    dtype="bf16",
    transport=None,
    rank=3,
    trainer=Drift,
    options=None,
    bound=0.0,
    hand_over=None,
    seconds=None,
    **hooks,
):
    net, layout = model(rank)
    trainer, options = trainer(layout), options or {}
    transport = (transport or LocalTransport)(Sequential(trainer), 1 << 30)
    factors = layout.gather(net, tuple(layout.sizes))
    kind = BufferedServer if options.get("buffered") else Server
    made = hooks.get("kind", kind)(
        config=RoundConfig(
            **dict(
                run="toy",
                rounds=rounds,
                clients=len(WEIGHTS),
                clients_per_round=per_round or len(WEIGHTS),
                quorum=1,
                exchange_dtype=dtype,
                eval_every=1,
                checkpoint_every=1,
                seed=1,
                max_abs=64.0,
                max_examples=max(WEIGHTS),
                examples_of=lambda client: WEIGHTS[client],
                lr=lambda phase, number: 0.1,
            )
            | options
        ),
        method=methods.load(method, hand_over=hand_over),
        layout=layout,
        transport=transport,
        state=GlobalState.initial(factors, methods.load(method).changes_base),
        evaluate=lambda published: {
            "loss": float(sum(v.double().sum() for v in published.values()))
        },
        on_round=hooks.get("on_round", lambda row: None),
        on_checkpoint=hooks.get("on_checkpoint", lambda server: None),
        norms=guard.Norms(bound),
        clock=Clock(seconds),
        **{name: hooks[name] for name in ("members",) if name in hooks},
    )
    made.trainer = trainer
    return made
