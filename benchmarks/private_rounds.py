"""Private rounds of the two-layer network with all clients of a round in one product of matrices.

A study of noise needs many runs of many small clients, of whom the engine's rounds take most of
their time for messages. Here the clients' steps are written out by hand for this network, full
batches by SGD; server, method, hand-over, coordinates, codecs, noise and accountant are the
engine's own. `tests/benchmarks/test_private_front.py` holds the factors after some rounds against
those of the engine's rounds.
"""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rolora import variants
from rolora.config import settled
from rolora.experiments import digits
from rolora.experiments.two_layers import Setting, prepare
from rolora.federated import methods, partition, sampling
from rolora.federated.codec import key
from rolora.federated.local import RESTING
from rolora.federated.methods import Context
from rolora.federated.privacy import normals, smallest_noise
from rolora.federated.state import GlobalState
from rolora.federated.turn import balanced, turned
from rolora.run import private
from rolora_kernels.codecs import CODECS

A_ROUND, ROUNDS, RANK, STEPS, DELTA = 60, 60, 8, 4, 1e-5
# What lies under the adapter: nothing, as in the paper, or a base that was trained on mirror images
# of the first third of the training set, which are public and belong to no client.
CLIENTS = {"none": 575, "mirrored": 383}
_PUBLIC = {"none": 0, "mirrored": 384}
_LATE = 10  # rounds by which a try is judged, every second of them


@dataclass(frozen=True)
class Run:
    """What identifies a run."""

    method: str
    wire: str
    epsilon: float | None
    rate: float
    clip: float | None
    seed: int
    on: str
    rounds: int = ROUNDS
    base: str = "none"

    @property
    def rank(self) -> int:
        return RANK * int(self.method.partition("*")[2] or 1)


@dataclass
class Rounds:
    """The rounds of a job whose clients all have as many examples as a batch holds."""

    job: Any
    sent: int = 0  # bytes of buffers up, all clients together

    def __post_init__(self) -> None:
        config = self.job.config
        self.config, self.layout = config, self.job.layout
        f = config.federation
        self.method = methods.load(f.method, f.schedule, f.hand_over)
        self.state = GlobalState.initial(self.job.initial_factors())
        self.mechanism = private.mechanism(config)
        rows = np.stack(self.job.clients)
        if rows.shape[1] != f.batch_size:
            raise ValueError(f"clients have {rows.shape[1]} examples, a batch {f.batch_size}")
        images, labels = (torch.stack(part) for part in zip(*self.job.train, strict=True))
        self.images, self.labels = images[rows], labels[rows]  # [clients, examples, ...]
        self.base = self.job.model.hidden.weight.detach()  # [h, d]
        self.out = self.job.model.out.weight.detach()  # [10, h]

    def run(self) -> None:
        for number in range(1, self.config.federation.rounds + 1):
            self.round(number)

    def round(self, number: int) -> None:
        """One round: the state moves."""
        phase, f = self.method.phase(number), self.config.federation
        clients = self._cohort(number)
        changes = self._trained(clients, phase, number)
        if self.method.transforms:
            context = Context(self.state, self.layout, phase, self.config.run.seed, lambda c: None)
            for client, change in zip(clients, changes, strict=True):
                change.copy_(self.method.counted(context, client, change))
        if self.mechanism is None and not clients:
            return
        mean = self._mean(changes)
        kinds = self.layout.travelling(phase)
        change = self.layout.part(mean, phase)
        state = self.state.apply(change, f.server_momentum, f.server_lr)
        state = state.publish(kinds, self.config.exchange.exchange_dtype, self.config.run.seed)
        turn = self.method.turn(self.layout, state.published, number)
        self.state = state.turn(self.layout, turn, kinds)

    def accuracy(self) -> float:
        return self.job.evaluate(self.state.published)["accuracy"]

    def _cohort(self, number: int) -> list[int]:
        f = self.config.federation
        per_round = settled(f.clients_per_round)
        if self.mechanism is not None and f.sampling == "poisson":
            return sampling.secret_cohort(f.clients, per_round)
        is_poisson = f.sampling == "poisson"
        return sampling.cohort(
            self.config.run.seed, number, f.clients, per_round, poisson=is_poisson
        )

    def _mean(self, changes: Tensor) -> Tensor:
        """fp32 `[values]` of `[clients, values]`: clipped, noisy and over the planned cohort where
        the run is private, the plain mean where not.
        """
        if self.mechanism is None:
            return changes.mean(0)
        C, z = self.mechanism.clip, self.mechanism.noise
        lengths = torch.linalg.vector_norm(changes, dim=1, keepdim=True)
        total = (changes * (C / lengths.clamp(min=1e-30)).clamp(max=1.0)).double().sum(0)
        if z:
            total += z * C * torch.from_numpy(normals(len(total)))
        return (total / settled(self.config.federation.clients_per_round)).float()

    def _trained(self, clients: list[int], phase: str, number: int) -> Tensor:
        """fp32 `[clients, values]`: the decoded changes of a round's clients."""
        held, back = dict(self.state.published), None
        if self.config.optimisation.local_coordinates and phase in RESTING:
            turns = balanced(self.layout, held, RESTING[phase])
            for kind, turn in (turns or {}).items():
                held[kind] = turned(self.layout, kind, held[kind], turn)
            if turns is not None:  # what turned one factor turns the other one back
                back = turns[RESTING[phase]].view(-1, self.config.adapter.rank).float()
        (start_A,), (start_B,) = (self.layout.views(held, kind).values() for kind in ("A", "B"))
        count = len(clients)
        A, B = start_A.repeat(count, 1, 1), start_B.repeat(count, 1, 1)
        for step in range(settled(self.config.federation.local_steps)):
            own = phase
            if self.method.local_phase is not None and phase == "BOTH":
                own = self.method.local_phase(step)
            self._step(self.images[clients], self.labels[clients], A, B, own)
        moved_A, moved_B = A - start_A, B - start_B
        if back is not None and phase == "B":
            moved_B = moved_B @ back
        elif back is not None:
            moved_A = back @ moved_A
        parts = {"A": moved_A, "B": moved_B}
        flat = torch.cat(
            [parts[k].reshape(count, -1) for k in self.layout.travelling(phase)], dim=1
        )
        codec = CODECS[self.config.exchange.exchange_dtype]
        self.sent += count * codec.bytes(flat.shape[1])
        for client, change in zip(clients, flat, strict=True):
            drawn = key(self.config.run.seed, number, f"client {client}")
            change.copy_(codec.decode(codec.encode(change, drawn)))
        return flat

    def _step(self, x: Tensor, labels: Tensor, A: Tensor, B: Tensor, phase: str) -> None:
        """A step of SGD in place, the gradient of each client's own mean loss clipped by its norm.

        x `[clients, examples, d]`, A `[clients, r, d]`, B `[clients, h, r]`.
        """
        o, rates = self.config.optimisation, self.method.rates
        shrunk = x @ A.mT  # [clients, examples, r]
        before = x @ self.base.t() + shrunk @ B.mT  # [clients, examples, h]
        at_logits = torch.softmax(before.relu() @ self.out.t(), -1)
        at_logits -= torch.nn.functional.one_hot(labels, at_logits.shape[-1])
        at_hidden = (at_logits / x.shape[1]) @ self.out * (before > 0)
        gradients = {}
        if phase in ("A", "BOTH"):
            gradients["A"] = (at_hidden @ B).mT @ x
        if phase in ("B", "BOTH"):
            gradients["B"] = at_hidden.mT @ shrunk
        length = sum(g.square().sum((1, 2)) for g in gradients.values()).sqrt()
        scale = (o.max_grad_norm / (length + 1e-6)).clamp(max=1.0)[:, None, None]
        for kind, factor in (("A", A), ("B", B)):
            if kind in gradients:
                factor -= settled(o.lr) * rates.get(kind, 1.0) * scale * gradients[kind]


@functools.cache
def noise(epsilon: float | None, rounds: int, clients: int) -> float:
    """The noise multiplier by which all rounds spend so much."""
    return 0.0 if epsilon is None else smallest_noise(epsilon, A_ROUND / clients, rounds, DELTA)


@functools.cache
def _digits() -> Any:
    return digits.load(None)


def _train_base(model: Any, public: int) -> None:
    """Trains the weight under the adapter on mirror images of the first `public` ones."""
    images, labels = (torch.from_numpy(part[:public]) for part in _digits().train)
    mirrored = images.view(-1, 8, 8).flip(2).reshape(len(images), -1)
    out, weight = model.out.weight.detach(), torch.nn.Parameter(torch.empty(64, 64))
    torch.nn.init.orthogonal_(weight, 0.1, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([weight], 1e-2)
    for _ in range(100):
        logits = (mirrored @ weight.t()).relu() @ out.t()
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        model.hidden.weight.copy_(weight)


def prepared(run: Run) -> Any:
    """The run as a job of the engine's (`rolora.run.job.Job`)."""
    text = f"{run.method.partition('*')[0]}+exchange-dtype={run.wire}"
    setting = Setting(text, "iid", run.rate, run.seed, run.rounds, run.rank, "digits")
    job = prepare(setting, _digits(), "held" if run.on == "validation" else "test")
    public, clients = _PUBLIC[run.base], CLIENTS[run.base]
    parts = partition.iid(len(_digits().train[1]) - public, clients, run.seed)
    job.clients = [part + public for part in parts]
    if public:
        _train_base(job.model, public)
    protected: dict[str, Any] = {}
    if run.clip is not None:
        protected = dict(dp_clip=run.clip, dp_noise=noise(run.epsilon, run.rounds, clients))
    job.config = job.config.with_values(
        clients=clients,
        clients_per_round=A_ROUND,
        sampling="poisson",
        weighting="uniform",
        max_update_norm=0.0,
        quorum=0 if protected else 1,
        local_epochs=None,
        local_steps=variants.parse(text).get("local_steps", STEPS),
        batch_size=2,
        control_variates=False,
        **protected,
    )
    return job


def measured(run: Run) -> dict[str, Any]:
    """One run; `accuracy` is the mean of the last rounds where a try is judged."""
    start, found = time.monotonic(), []
    rounds = Rounds(prepared(run))
    for number in range(1, run.rounds + 1):
        rounds.round(number)
        left = run.rounds - number
        if left == 0 or (run.on == "validation" and left < _LATE and left % 2 == 0):
            found.append(rounds.accuracy())
    return asdict(run) | {
        "accuracy": round(statistics.mean(found), 4),
        "MB_up": round(rounds.sent / 1e6, 3),
        "values": rounds.layout.travelling_size(rounds.method.phase(1)),
        "noise": round(noise(run.epsilon, run.rounds, CLIENTS[run.base]), 4),
        "seconds": round(time.monotonic() - start, 1),
    }
