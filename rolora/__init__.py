"""RoLoRA: federated LoRA fine-tuning that trains and exchanges one factor a round.

The names below load on first use, so that `import rolora` (and `--help`) loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what editors and type checkers see
    from rolora.adapter.attach import attach, detach
    from rolora.adapter.configuration import LoRAConfig
    from rolora.adapter.familiar import disable_adapter, print_trainable_parameters
    from rolora.adapter.files import save_adapter
    from rolora.adapter.layer import RoLoRALinear
    from rolora.adapter.loading import load_adapter
    from rolora.adapter.model import explain, merge, set_phase, unmerge
    from rolora.adapter.tensors import get_adapter_state_dict, set_adapter_state_dict

__version__ = "0.2.0"

_EXPORTS = {
    "RoLoRALinear": "rolora.adapter.layer",
    "LoRAConfig": "rolora.adapter.configuration",
    "attach": "rolora.adapter.attach",
    "detach": "rolora.adapter.attach",
    "explain": "rolora.adapter.model",
    "merge": "rolora.adapter.model",
    "set_phase": "rolora.adapter.model",
    "unmerge": "rolora.adapter.model",
    "load_adapter": "rolora.adapter.loading",
    "save_adapter": "rolora.adapter.files",
    "get_adapter_state_dict": "rolora.adapter.tensors",
    "set_adapter_state_dict": "rolora.adapter.tensors",
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
