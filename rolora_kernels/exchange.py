"""Flat buffers: changes packed into what goes over the wire, and taken out again.

A change is written as fp32, bf16, fp16 or int8. int8 is symmetric with a scale for every 256
consecutive values of the flat buffer and keyed stochastic rounding: unbiased, and without feedback
state. Its buffer is uint8: the fp32 scales, then the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rolora_kernels import dispatch
from rolora_kernels.wire_format import BLOCK, WIRE, blocks, values_in, wire_length

# Values computed at a time, so that what is made of them stays in cache. int8 takes more steps a
# value.
_CHUNK = 1 << 20
_INT8_CHUNK = 1 << 16


class Packed(NamedTuple):
    """A change as it travels: `wire` on the CPU, the L2 norm of the change, and how many of its
    values are not finite.
    """

    wire: Tensor
    norm: float
    nonfinite: int


def pack_change(
    tensors: Sequence[Tensor],
    published: Sequence[Tensor] | None,
    dtype: str,
    key: int = 0,
    out: Tensor | None = None,
) -> Packed:
    """The change `tensors − published`, flattened and one after another, in the wire's dtype, in
    one pass.

    tensors: fp32, any shapes, on one device; published: as many, of the same sizes, on the same
    device (None: zeros); key: 64 bits that int8's rounding is drawn from; out: a CPU buffer of
    `wire_length` elements to use again. No temporary of the buffer's size; one copy to the host.
    """
    tensors = [t.detach().reshape(-1) for t in tensors]
    bases: list[Tensor | None] = [None] * len(tensors)
    if published is not None:
        bases = [t.reshape(-1) for t in published]
    for tensor, base in zip(tensors, bases, strict=True):
        if base is not None and base.shape != tensor.shape:
            raise ValueError(
                f"published holds {base.numel()} values for a tensor of {tensor.numel()}"
            )
    values, wire_type = sum(t.numel() for t in tensors), WIRE[dtype]
    like = tensors[0] if tensors else torch.empty(0)
    backend, reason = dispatch.choose_pack(like.device)
    dispatch.record("pack", backend, reason, f"n={values} {dtype}", like, 1)
    if backend == "triton":
        from rolora_kernels.triton_ops.pack import pack

        return Packed(*pack(tensors, bases, wire_type, key))
    length = wire_length(values, wire_type)
    if out is None or like.device.type != "cpu":
        out = torch.empty(length, dtype=wire_type, device=like.device)
    elif out.dtype != wire_type or tuple(out.shape) != (length,):
        raise ValueError(f"out is {out.dtype} {list(out.shape)}, expected {wire_type} [{length}]")
    norm, nonfinite = _fill(out, tensors, bases, values, key)
    return Packed(out.cpu(), norm, nonfinite)


def encode(change: Tensor, dtype: str, key: int = 0) -> Tensor:
    """A flat fp32 `[n]` as its wire buffer."""
    if dtype == "int8":
        return pack_change([change], None, dtype, key).wire
    return change.to(WIRE[dtype])


def decode(wire: Tensor) -> Tensor:
    """The fp32 `[n]` that a wire buffer says; exact."""
    if wire.dtype != torch.uint8:
        return wire.float()
    return _decode_into(wire, torch.zeros(values_in(wire), device=wire.device))


def add_decoded(published: Tensor, wire: Tensor) -> Tensor:
    """published + decode(wire), fp32 `[n]`, one rounding a value and no temporary: the addition
    that every peer performs.
    """
    if wire.dtype != torch.uint8:
        return torch.add(published, wire)
    return _decode_into(wire, published.clone())


def unpack(flat: Tensor, tensors: Iterable[Tensor]) -> None:
    """Copies the flat buffer into `tensors`, in order, in place."""
    tensors = list(tensors)
    sizes = [t.numel() for t in tensors]
    if sum(sizes) != flat.numel():
        raise ValueError(f"a buffer of {flat.numel()} values does not fill tensors of {sum(sizes)}")
    if not tensors:
        return
    parts = [part.view(t.shape) for part, t in zip(flat.split(sizes), tensors, strict=True)]
    with torch.no_grad():
        torch._foreach_copy_(tensors, parts)


def pack(tensors: Sequence[Tensor], out: Tensor) -> Tensor:
    """Writes `tensors`, flattened and one after another, into the flat `out`; dtype and device are
    out's.
    """
    sizes = [t.numel() for t in tensors]
    if sum(sizes) != out.numel():
        raise ValueError(f"{sum(sizes)} values do not fill a buffer of {out.numel()}")
    for part, tensor in zip(out.split(sizes) if sizes else (), tensors, strict=True):
        part.copy_(tensor.detach().reshape(-1))
    return out


def _fill(
    out: Tensor, tensors: list[Tensor], published: list[Tensor | None], values: int, key: int
) -> tuple[float, int]:
    """Fills the wire buffer `out` chunk by chunk; (norm of the change, non-finite values)."""
    scales, body = _parts(out)
    noise = _Noise(key, out.device)
    most = _CHUNK if scales is None else _INT8_CHUNK
    scratch = torch.empty(min(most, values), device=out.device)
    square, nonfinite, start = 0.0, 0, 0
    for chunk in _chunks(tensors, published, scratch):
        end = start + len(chunk)
        wire = body[start:end]
        if scales is None:
            sent = wire.copy_(chunk)
        else:
            _quantise(chunk, wire, _scales_of(scales, start, end), noise)
            sent = chunk  # no byte says Inf or NaN: the scale does
        more, bad = _square_and_nonfinite(chunk, sent)
        square, nonfinite, start = square + more, nonfinite + bad, end
    return math.sqrt(square) if square >= 0 else math.nan, nonfinite


def _chunks(
    tensors: list[Tensor], published: list[Tensor | None], scratch: Tensor
) -> Iterator[Tensor]:
    """The flat change, as much at a time as `scratch` holds; the last chunk may be shorter. Each
    one lies in `scratch` and lives until the next is asked for.
    """
    filled = 0
    for tensor, base in zip(tensors, published, strict=True):
        taken = 0
        while taken < tensor.numel():
            size = min(tensor.numel() - taken, len(scratch) - filled)
            piece, target = tensor[taken : taken + size], scratch[filled : filled + size]
            if base is None:
                target.copy_(piece)
            else:
                torch.sub(piece, base[taken : taken + size], out=target)
            taken, filled = taken + size, filled + size
            if filled == len(scratch):
                yield scratch
                filled = 0
    if filled:
        yield scratch[:filled]


def _square_and_nonfinite(chunk: Tensor, sent: Tensor) -> tuple[float, int]:
    """The squared norm of a chunk, and how many of the values sent are not finite."""
    square = torch.dot(chunk, chunk).item()
    if square < 65504.0**2:
        return square, 0  # then every value is finite, in fp16 too
    return chunk.double().square().sum().item(), int((~sent.isfinite()).sum())


class _Noise:
    """Uniform numbers of a key.

    On a CPU 16 bits each, (k + ½) / 2¹⁶: drawing 32 would take longer than all the rest of packing.
    """

    def __init__(self, key: int, device: torch.device):
        self.device = device
        if device.type == "cpu":
            self.bits = np.random.SFC64(key % (1 << 64))
        else:
            self.generator = torch.Generator(device).manual_seed(key % (1 << 63))

    def draw(self, count: int) -> Tensor:
        """`count` numbers, a multiple of 4, fp32 in (0, 1)."""
        if self.device.type != "cpu":
            return torch.rand(count, generator=self.generator, device=self.device)
        words = torch.from_numpy(self.bits.random_raw(count // 4).view(np.int16))
        return words.to(torch.float32).mul_(2.0**-16).add_(0.5 + 2.0**-17)


def _quantise(chunk: Tensor, wire: Tensor, scales: Tensor, noise: _Noise) -> None:
    """A chunk of whole blocks (but for the last) as int8 bytes: floor(x / scale + u), u uniform in
    [0, 1).
    """
    if chunk.numel() % BLOCK:
        padded = chunk.new_zeros(len(scales) * BLOCK)
        padded[: chunk.numel()] = chunk
        chunk = padded
    by_block = chunk.view(-1, BLOCK)
    torch.mul(by_block.abs().amax(1), 1 / 127, out=scales)
    # A block of zeros has scale 0; NaN and Inf stay in the scale.
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    uniform = noise.draw(chunk.numel()).view(-1, BLOCK)
    steps = torch.addcmul(uniform, by_block, inverse[:, None]).floor_().clamp_(-127, 127)
    wire.view(torch.int8).copy_(steps.view(-1)[: wire.numel()])


def _parts(wire: Tensor) -> tuple[Tensor | None, Tensor]:
    """(scales fp32 or None, values) of a wire buffer; views."""
    if wire.dtype != torch.uint8:
        return None, wire
    cut = 4 * blocks(values_in(wire))
    return wire[:cut].view(torch.float32), wire[cut:]


def _scales_of(scales: Tensor, start: int, end: int) -> Tensor:
    """The scales of the values from `start`, where a block begins, up to `end`; a view."""
    return scales[start // BLOCK : blocks(end)]


def _decode_into(wire: Tensor, out: Tensor) -> Tensor:
    """out += the decoded int8 buffer, chunk by chunk; product and sum are each rounded to fp32 on
    every device.
    """
    scales, body = _parts(wire)
    assert scales is not None, "only int8 buffers are decoded here"
    values = body.view(torch.int8)
    for start in range(0, len(out), _INT8_CHUNK):
        chunk = values[start : start + _INT8_CHUNK].float()
        end = start + len(chunk)
        steps = _scales_of(scales, start, end).repeat_interleave(BLOCK)[: len(chunk)]
        out[start:end].add_(chunk.mul_(steps))
    return out
