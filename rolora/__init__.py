"""RoLoRA: federated LoRA fine-tuning that trains and exchanges one factor a round.

The names below load on first use, so that `import rolora` (and `--help`) loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what editors and type checkers see
    from rolora.adapter.attach import (
        LoRAConfig,
        attach,
        detach,
        explain,
        merge,
        set_phase,
        unmerge,
    )
    from rolora.adapter.checkpoint import (
        get_adapter_state_dict,
        load_adapter,
        save_adapter,
        set_adapter_state_dict,
    )
    from rolora.adapter.familiar import disable_adapter, print_trainable_parameters
    from rolora.adapter.layer import RoLoRALinear

__version__ = "0.2.0"

_EXPORTS = {
    "RoLoRALinear": "rolora.adapter.layer",
    "LoRAConfig": "rolora.adapter.attach",
    "attach": "rolora.adapter.attach",
    "detach": "rolora.adapter.attach",
    "explain": "rolora.adapter.attach",
    "merge": "rolora.adapter.attach",
    "set_phase": "rolora.adapter.attach",
    "unmerge": "rolora.adapter.attach",
    "load_adapter": "rolora.adapter.checkpoint",
    "save_adapter": "rolora.adapter.checkpoint",
    "get_adapter_state_dict": "rolora.adapter.checkpoint",
    "set_adapter_state_dict": "rolora.adapter.checkpoint",
    "disable_adapter": "rolora.adapter.familiar",
    "print_trainable_parameters": "rolora.adapter.familiar",
}

__all__ = [
    "LoRAConfig",
    "RoLoRALinear",
    "attach",
    "detach",
    "disable_adapter",
    "explain",
    "get_adapter_state_dict",
    "load_adapter",
    "merge",
    "print_trainable_parameters",
    "save_adapter",
    "set_adapter_state_dict",
    "set_phase",
    "unmerge",
]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'rolora' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
