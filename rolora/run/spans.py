"""What an r × r matrix between two factors that stay may reach: the largest singular vectors of the
first gradient of the whole weight (Fed-SB).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rolora.adapter.layer import RoLoRALinear
from rolora.adapter.model import adapted_layers
from rolora.errors import BadInput
from rolora.federated import sampling
from rolora.recipes import Recipe


def narrow(
    model: nn.Module,
    recipe: Recipe,
    examples: Sequence[Any],
    clients: Sequence[np.ndarray],
    batch_size: int,
    seed: int,
) -> None:
    """Leaves every adapted linear an r × r matrix that trains, zero, between fixed singular vectors
    of the mean over clients, weighted by their examples, of each one's gradient on one batch.

    That takes one gradient of each adapted weight in memory, fp32. Raises BadInput for what is
    adapted and no linear. On the meta device only the shapes are made.
    """
    layers = dict(adapted_layers(model))
    for path, layer in layers.items():
        if not isinstance(layer, RoLoRALinear):
            raise BadInput(
                f"--method fed-sb goes with linears alone, and {path} is adapted: leave out "
                "--target-parameters"
            )
    if next(iter(layers.values())).lora_A.is_meta:
        for layer in layers.values():
            layer.narrow(layer.lora_A.detach(), layer.lora_B.detach())
        return
    for path, gradient in gradients(model, recipe, examples, clients, batch_size, seed).items():
        layer = layers[path]
        U, _, Vt = torch.linalg.svd(gradient.double(), full_matrices=False)
        U, Vt = U[:, : layer.rank], Vt[: layer.rank]
        # A pair of singular vectors has one sign in common, which is nobody's to choose.
        signs = torch.gather(U, 0, U.abs().argmax(0, keepdim=True)).sign()
        layer.narrow((Vt * signs.t()).float(), (U * signs).float())


def gradients(
    model: nn.Module,
    recipe: Recipe,
    examples: Sequence[Any],
    clients: Sequence[np.ndarray],
    batch_size: int,
    seed: int,
) -> dict[str, Tensor]:
    """path → the gradient of every adapted linear's whole weight, fp32 `[out, in]`: `dyᵀ x` of what
    comes out and goes in, so that no weight has to be one that trains.
    """
    model.eval()
    layers = dict(adapted_layers(model))
    total = {
        path: torch.zeros(layer.out_features, layer.in_features, device=layer.lora_A.device)
        for path, layer in layers.items()
    }
    share = [0.0]  # of the client whose batch it is

    def watched(path: str) -> Callable[..., None]:
        def on_forward(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2).float()

            def on_backward(dy: Tensor) -> None:
                total[path].addmm_(dy.flatten(0, -2).float().t(), x, alpha=share[0])

            y.register_hook(on_backward)

        return on_forward

    handles = [layer.register_forward_hook(watched(path)) for path, layer in layers.items()]
    size = sum(map(len, clients))
    try:
        for client, own in enumerate(clients):
            (chosen,) = sampling.batches(seed, 0, client, len(own), batch_size, 1)
            batch = recipe.collate([examples[own[i]] for i in chosen])
            share[0] = len(own) / size / max(batch.weight, 1)
            recipe.loss(model, batch).backward()
            model.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()
    return total
