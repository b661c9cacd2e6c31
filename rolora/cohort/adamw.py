"""AdamW for clients that are trained together and have taken different numbers of steps before.

`[C, …]` parameters, `[C]` steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rolora.federated.local import ClientState, LocalConfig
from rolora_kernels.transfer import to_device

_BETA1, _EPSILON = 0.9, 1e-8  # torch.optim.AdamW's defaults, which a client has alone


class ClientAdamW:
    """AdamW (Loshchilov & Hutter 2019) as in torch.optim, every client with its own step."""

    def __init__(
        self,
        own: dict[str, list[Tensor]],
        lr: float,
        config: LocalConfig,
        states: Sequence[ClientState],
    ):
        """Goes on from what each client carries.

        `own`: kind → parameters `[C, …]`. `config` says the weight decay and each kind's part of
        the rate. `states`: what each client carries from its last round (`federated.moments`), or
        {}.
        """
        self.own, self.weight_decay = own, config.weight_decay
        self.betas = (_BETA1, config.beta2)
        self.rates = {kind: lr * config.rates.get(kind, 1.0) for kind in own}
        self.moments: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        self.steps: dict[str, Tensor] = {}
        for kind, parameters in own.items():
            self.moments[kind] = (
                _together(f"exp_avg.{kind}", parameters, states),
                _together(f"exp_avg_sq.{kind}", parameters, states),
            )
            self.steps[kind] = torch.cat(
                [state.get(f"step.{kind}", torch.zeros(1)) for state in states]
            )

    @torch.no_grad()
    def step(self) -> None:
        for kind, parameters in self.own.items():
            if all(p.grad is None for p in parameters):
                continue  # the kind rests in this step
            lr = self.rates[kind]
            self.steps[kind] += 1
            corrections = [1 - beta ** self.steps[kind].double() for beta in self.betas]
            host = [c.float() for c in (lr / corrections[0], corrections[1].sqrt())]
            device = parameters[0].device
            size, root = (to_device(c, device) for c in host)
            for p, first, second in zip(parameters, *self.moments[kind], strict=True):
                if p.grad is None:
                    continue
                each = (-1, *[1] * (p.ndim - 1))
                p.mul_(1 - lr * self.weight_decay)
                first.lerp_(p.grad, 1 - self.betas[0])
                second.mul_(self.betas[1]).addcmul_(p.grad, p.grad, value=1 - self.betas[1])
                p.sub_(size.view(each) * first / (second.sqrt() / root.view(each)).add_(_EPSILON))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in (p for parameters in self.own.values() for p in parameters):
            p.grad = None

    def state(self, client: int) -> ClientState:
        """What a client would carry from here, as `federated.moments` gathers it."""
        found = {}
        for kind, (first, second) in self.moments.items():
            for name, parts in (("exp_avg", first), ("exp_avg_sq", second)):
                found[f"{name}.{kind}"] = torch.cat(
                    [part[client].flatten() for part in parts]
                ).cpu()
            found[f"step.{kind}"] = self.steps[kind][client : client + 1].clone()
        return found


def _together(name: str, parameters: list[Tensor], states: Sequence[ClientState]) -> list[Tensor]:
    """One kind's moments of all clients, in the parameters' shapes; zeros where one has none."""
    sizes = [p[0].numel() for p in parameters]
    flat = torch.stack([state.get(name, torch.zeros(sum(sizes))) for state in states])
    parts = zip(flat.split(sizes, dim=1), parameters, strict=True)
    return [part.view(p.shape).to(p) for part, p in parts]
