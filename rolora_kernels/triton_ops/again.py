"""A launch of a kernel that is compiled already.

Triton finds the compiled kernel of a launch by asking every argument what it is, writing that and
the options down as text, and looking the text up: 15 µs of the host's and more. Here the same facts
are a tuple, and what Triton gave back the first time is handed to the driver.

What a compiled kernel holds for: the kernel, its configuration and switches, the device, of a
tensor its dtype and whether its address is a multiple of 16, of a whole number its value (of one
that Triton is told not to specialise on, whether 32 bits hold it), of a fraction nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from triton import knobs
from triton.runtime.driver import driver

from rolora_kernels.triton_ops.blocks import INTERPRETED
from rolora_kernels.triton_ops.spec import Config, Spec

_RUNTIME = knobs.runtime
_MOST = 4096  # launches that are remembered
_FRACTIONS = ("scale", "scaling")  # the parameters that may hold one
_ready: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_parts: dict[Spec, _Parts] = {}


@dataclass(frozen=True)
class _Parts:
    """What takes the operands of one kind out of a kernel's."""

    tensors: Callable[[Sequence[Any]], tuple[Any, ...]]
    values: Callable[[Sequence[Any]], tuple[Any, ...]]  # whole numbers that Triton specialises on
    widths: Callable[[Sequence[Any]], tuple[Any, ...]]  # those that it is told not to
    fractions: Callable[[Sequence[Any]], tuple[Any, ...]]

    @classmethod
    def of(cls, spec: Spec, count: int) -> _Parts:
        """Of the first `count` parameters: the others are constants."""
        kinds: tuple[list[int], ...] = ([], [], [], [])
        for place, parameter in enumerate(spec.kernel.params[:count]):
            if parameter.name.endswith("_ptr"):
                kinds[0].append(place)
            elif parameter.name in _FRACTIONS:
                kinds[3].append(place)
            else:
                kinds[2 if parameter.do_not_specialize else 1].append(place)
        return cls(*map(_taker, kinds))


def _taker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """operands → those at the places, always as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda operands: tuple([operands[place] for place in places])


def launch(
    spec: Spec,
    config: Config,
    grid: tuple[int, ...],
    operands: tuple[Any, ...],
    switches: dict[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Launches on the current device. `options`: what Triton is told beside the switches."""
    key: tuple[Any, ...] = ()
    if not INTERPRETED:
        key = spec, config, *switches.values(), *_facts(spec, operands)
    found = _ready.get(key)
    if found is not None:
        _run(*found, grid, operands)
        return
    given = {**switches, **options, **spec.arguments(config)}
    compiled = spec.kernel[grid](*operands, **given)
    if key and compiled is not None:  # a tool that stands in for Triton may give nothing back
        names = [p.name for p in spec.kernel.params[len(operands) :]]
        if len(_ready) >= _MOST:
            _ready.clear()
        _ready[key] = compiled, tuple(given[name] for name in names)


def _run(
    compiled: Any, constants: tuple[Any, ...], grid: tuple[int, ...], operands: tuple[Any, ...]
) -> None:
    """Hands a compiled kernel to the driver, as Triton does where no profiler's hook listens."""
    whole = (*grid, 1, 1)[:3]
    if _listens(_RUNTIME.launch_enter_hook) or _listens(_RUNTIME.launch_exit_hook):
        compiled[whole](*operands, *constants)
        return
    active = driver.active
    stream = active.get_current_stream(active.get_current_device())
    compiled.run(
        *whole,
        stream,
        compiled.function,
        compiled.packed_metadata,
        None,
        None,
        None,
        *operands,
        *constants,
    )


def _listens(hook: Any) -> bool:
    """Whether anybody does: Triton keeps hooks in chains, which are there without any."""
    return bool(getattr(hook, "calls", hook))


def _facts(spec: Spec, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """What Triton compiles a kernel for, of the operands."""
    parts = _parts.get(spec)
    if parts is None:
        parts = _parts[spec] = _Parts.of(spec, len(operands))
    tensors = parts.tensors(operands)
    return (
        operands[0].device,
        *parts.values(operands),
        *[tensor.dtype for tensor in tensors],
        *[tensor.data_ptr() & 15 == 0 for tensor in tensors],
        *[value.bit_length() > 31 for value in parts.widths(operands)],
        *[type(value) for value in parts.fractions(operands)],
    )


def forget() -> None:
    """Asks Triton anew for every launch."""
    _ready.clear()
