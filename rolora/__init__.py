"""RoLoRA: federated LoRA fine-tuning that trains and exchanges one factor a round.

The names below load on first use, so that `import rolora` (and `--help`) loads no torch.
"""

from importlib import import_module

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

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'rolora' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
