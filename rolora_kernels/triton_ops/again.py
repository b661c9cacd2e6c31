"""A launch of a kernel that is compiled already.

Triton finds the compiled kernel of a launch by asking every argument what it is, writing that and
the options down as text, and looking the text up: 15 µs of the host's and more. Here the same facts
are a tuple, and what Triton gave back the first time is launched.

What a compiled kernel holds for: the kernel, its configuration and switches, the device, of a
tensor its dtype and whether its address is a multiple of 16, of a whole number its value (of one
that Triton is told not to specialise on, whether 32 bits hold it).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rolora_kernels.triton_ops.blocks import INTERPRETED
from rolora_kernels.triton_ops.spec import Config, Spec

_MOST = 4096  # launches that are remembered
_ready: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_specialised: dict[Spec, tuple[bool, ...]] = {}


def launch(
    spec: Spec,
    config: Config,
    grid: tuple[int, ...],
    operands: tuple[Any, ...],
    switches: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Launches on the current device. `options`: what Triton is told beside the switches."""
    key: tuple[Any, ...] = ()
    if not INTERPRETED:
        key = spec, config, *switches.values(), *_facts(spec, operands)
    found = _ready.get(key)
    if found is not None:
        compiled, constants = found
        whole = (*grid, 1, 1)[:3]
        compiled[whole](*operands, *constants)
        return
    given = switches | options | spec.arguments(config)
    compiled = spec.kernel[grid](*operands, **given)
    if key and compiled is not None:  # a tool that stands in for Triton may give nothing back
        names = [p.name for p in spec.kernel.params[len(operands) :]]
        if len(_ready) >= _MOST:
            _ready.clear()
        _ready[key] = compiled, tuple(given[name] for name in names)


def _facts(spec: Spec, operands: tuple[Any, ...]) -> list[Any]:
    """What Triton compiles a kernel for, of each operand."""
    flags = _specialised.get(spec)
    if flags is None:
        flags = tuple(not p.do_not_specialize for p in spec.kernel.params)
        _specialised[spec] = flags
    facts: list[Any] = [operands[0].device]
    for value, specialised in zip(operands, flags, strict=False):
        if isinstance(value, Tensor):
            facts += (value.dtype, value.data_ptr() & 15 == 0)
        elif isinstance(value, float):
            facts.append(float)
        elif specialised:
            facts.append(value)
        else:
            facts.append(value.bit_length() > 31)
    return facts


def forget() -> None:
    """Asks Triton anew for every launch."""
    _ready.clear()
