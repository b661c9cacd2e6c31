"""What a federation sets around a layer's calls. None of it is a parameter or in a state dict."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class MixesExamples(ValueError):
    """A model hands an adapted layer something else than the examples of a cohort, one after
    another.
    """


@dataclass(frozen=True)
class ClientFactors:
    """What C clients that are trained together do not have in common: A fp32 `[C, r, in]`, B fp32
    `[C, out, r]`, or None where the layer's own factor is everybody's. Inputs are `[batch, …]`, the
    same number of examples for each client, client by client.
    """

    A: Tensor | None
    B: Tensor | None
    batch: int


@dataclass(frozen=True)
class MaskKey:
    """Which dropout masks a step draws.

    Attributes:
        key: int64 `[]`, the key of every row, or int64 `[rows]`, each row's own.
        rows: None where rows count from the start of the batch; else int64 `[rows]`, each row's
            place in its own client's batch.
    """

    key: Tensor
    rows: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        """The key as the kernels take it: `[]`, or `[2, rows]`."""
        key = self.key if self.rows is None else torch.stack([self.key, self.rows])
        return key if key.device == device else key.to(device)


@dataclass(frozen=True)
class CallState:
    """What `RoLoRALinear.set_call` sets, all of it at once.

    Attributes:
        clients: the factors of a cohort that is trained together, in the place of the layer's own.
        masks: None draws a key from torch's generator at every call.
        term: (U `[out, R]`, V `[R, in]`): a frozen low-rank addition to the path, `scaling · U V`
            in the product, which some federated methods grow (FLoRA, FedEx). No dropout acts on it.
    """

    clients: ClientFactors | None = None
    masks: MaskKey | None = None
    term: tuple[Tensor, Tensor] | None = None

    def check(self, x: Tensor) -> None:
        """Raises MixesExamples where x cannot be the examples of the cohort."""
        if self.clients is not None and x.shape[0] != self.clients.batch:
            raise MixesExamples(
                f"a cohort of {self.clients.batch} examples is trained together, but an adapted "
                f"layer was called with {list(x.shape)}: this model reorders or mixes examples"
            )
