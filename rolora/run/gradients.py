"""Whether training reaches every adapter, found on one example before the first round."""

from __future__ import annotations

import re

from torch import nn

from rolora.adapter.attach import AttachReport
from rolora.errors import BadInput
from rolora.recipes import Batch, Recipe

_SHOWN = 3
_ROUTED = ("expert", "moe")  # a layer in there waits for tokens that are sent to it


def require_gradients(model: nn.Module, recipe: Recipe, batch: Batch, report: AttachReport) -> None:
    """Raises BadInput naming the adapted linears that get no gradient: those that the model does
    not use for these inputs (a decoder's cross-attention), or whose weights it reads past their
    forward (Mamba's).
    """
    model.eval()
    recipe.loss(model, batch).backward()
    lost = [
        path
        for path, layer in report.layers.items()
        if layer.lora_A.grad is None and not _is_routed(model, path)
    ]
    model.zero_grad(set_to_none=True)
    if not lost:
        return
    shown = ", ".join(lost[:_SHOWN]) + (", …" if len(lost) > _SHOWN else "")
    others = _without(list(report.layers), lost)
    mend = f"give --target-modules without them, such as {others}"
    raise BadInput(f"no gradient reaches {len(lost)} of the adapted linears ({shown}): {mend}")


def _without(paths: list[str], lost: list[str]) -> str:
    """Names of the others; a regular expression where they have the same names elsewhere."""

    def ends(chosen: list[str], parts: int) -> set[str]:
        return {".".join(path.split(".")[-parts:]) for path in chosen}

    kept = [path for path in paths if path not in lost]
    if not ends(kept, 1) & ends(lost, 1):
        return ",".join(sorted(ends(kept, 1)))
    places = sorted(map(re.escape, ends(kept, 2) - ends(lost, 2)))
    return f"'.*({'|'.join(places)})'" if places else "other modules"


def _is_routed(model: nn.Module, path: str) -> bool:
    """Whether a linear lies in a mixture of experts, where one example may not come by."""
    parts = path.split(".")
    within = [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    kinds = [*parts, *(type(module).__name__ for module in within)]
    return any(word in kind.lower() for kind in kinds for word in _ROUTED)
