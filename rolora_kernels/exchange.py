"""Flat buffers: changes packed into what goes over the wire, and taken out again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rolora_kernels import dispatch
from rolora_kernels.codecs import Codec


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
    codec: Codec,
    key: int = 0,
    out: Tensor | None = None,
) -> Packed:
    """The change `tensors − published`, flattened and one after another, as the codec writes it, in
    one pass.

    tensors: fp32, any shapes, on one device; published: as many, of the same sizes, on the same
    device (None: zeros); key: 64 bits that random rounding is drawn from; out: a CPU buffer of the
    codec's length to use again. No temporary of the buffer's size; one copy to the host.
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
    values = sum(t.numel() for t in tensors)
    like = tensors[0] if tensors else torch.empty(0)
    backend, reason = dispatch.choose_pack(like.device)
    if backend == "triton" and not codec.in_kernel:
        backend, reason = "torch", f"no kernel writes {codec.name}"
    dispatch.record("pack", backend, reason, f"n={values} {codec.name}", like, 1)
    if backend == "triton":
        from rolora_kernels.triton_ops.pack import pack

        return Packed(*pack(tensors, bases, codec, key))
    length = codec.length(values)
    if out is None or like.device.type != "cpu":
        out = torch.empty(length, dtype=codec.dtype, device=like.device)
    elif out.dtype != codec.dtype or tuple(out.shape) != (length,):
        raise ValueError(f"out is {out.dtype} {list(out.shape)}, expected {codec.dtype} [{length}]")
    norm, nonfinite = _fill(out, tensors, bases, codec, key)
    return Packed(out.cpu(), norm, nonfinite)


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
    out: Tensor, tensors: list[Tensor], published: list[Tensor | None], codec: Codec, key: int
) -> tuple[float, int]:
    """Fills the wire buffer `out` chunk by chunk; (norm of the change, non-finite values)."""
    write = codec.writer(out, key)
    values = sum(t.numel() for t in tensors)
    scratch = torch.empty(min(codec.chunk, values), device=out.device)
    square, nonfinite, start = 0.0, 0, 0
    for chunk in _chunks(tensors, published, scratch):
        sent = write(chunk, start)
        more, bad = _square_and_nonfinite(chunk, sent)
        square, nonfinite, start = square + more, nonfinite + bad, start + len(chunk)
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
