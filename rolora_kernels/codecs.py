"""How a change is written on the wire: a codec for each wire dtype, found by its name in CODECS.

fp32, bf16 and fp16 round to nearest. int8 is symmetric with a scale for every 256 consecutive
values of the flat buffer and keyed stochastic rounding: unbiased, and without feedback state. int4
is the same with 7 steps to either side of zero in the place of 127: a sender had better carry over
what that leaves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# (a chunk of the flat change fp32, where it begins) → what was sent, of which NaN and Inf tell.
Write = Callable[[Tensor, int], Tensor]


class Codec(ABC):
    """One wire dtype: what its buffers look like, and the two directions.

    `dtype` is that of a buffer's elements; `chunk` values are computed at a time, so that what is
    made of them stays in cache; `block` values share a scale, where there are scales; `in_kernel`
    says whether the Triton kernel of packing writes it too.
    """

    name: str
    dtype: torch.dtype
    chunk = 1 << 20
    block: int | None = None
    in_kernel = False

    def length(self, values: int) -> int:
        """Elements of a buffer for so many values."""
        return values

    def bytes(self, values: int) -> int:
        """Bytes of a buffer for so many values."""
        return self.length(values) * self.dtype.itemsize

    def values_in(self, wire: Tensor) -> int:
        """How many values a buffer holds; raises ValueError for one of an impossible length."""
        return wire.numel()

    def encode(self, change: Tensor, key: int = 0) -> Tensor:
        """The buffer of a flat fp32 `[n]`; `key`: 64 bits that random rounding is drawn from."""
        out = torch.empty(self.length(len(change)), dtype=self.dtype, device=change.device)
        write = self.writer(out, key)
        for start in range(0, len(change), self.chunk):
            write(change[start : start + self.chunk], start)
        return out

    @abstractmethod
    def writer(self, out: Tensor, key: int) -> Write:
        """What fills the buffer `out`, chunk by chunk, from the first on."""

    @abstractmethod
    def decode(self, wire: Tensor) -> Tensor:
        """The fp32 `[n]` that a buffer says; exact."""

    @abstractmethod
    def add(self, published: Tensor, wire: Tensor) -> Tensor:
        """published + decode(wire), fp32 `[n]`, one rounding a value and no temporary: the addition
        that every peer performs.
        """


class Rounded(Codec):
    """Every value by itself, rounded to nearest in a floating-point dtype."""

    def __init__(self, name: str, dtype: torch.dtype, in_kernel: bool = False):
        self.name, self.dtype, self.in_kernel = name, dtype, in_kernel

    def writer(self, out: Tensor, key: int) -> Write:
        return lambda chunk, start: out[start : start + len(chunk)].copy_(chunk)

    def decode(self, wire: Tensor) -> Tensor:
        return wire.float()

    def add(self, published: Tensor, wire: Tensor) -> Tensor:
        # Not every dtype is promoted by an addition: those of 8 bits are not.
        return wire.to(torch.float32, copy=True).add_(published)


class Int8(Codec):
    """Blocks of 256 values in steps of their largest / 127, rounded at random.

    A buffer is uint8: the fp32 scales, then the values.
    """

    name, dtype = "int8", torch.uint8
    chunk = 1 << 16  # more steps a value
    block = 256
    steps = 127  # to either side of zero
    in_kernel = True

    def blocks(self, values: int) -> int:
        """Blocks, and so scales, of so many values; the last may be short."""
        return -(-values // self.block)

    def length(self, values: int) -> int:
        return values + 4 * self.blocks(values)

    def values_in(self, wire: Tensor) -> int:
        values = wire.numel() - 4 * -(-wire.numel() // (self.block + 4))
        if self.length(values) != wire.numel():
            raise ValueError(f"{wire.numel()} bytes are no int8 buffer of blocks of {self.block}")
        return values

    def writer(self, out: Tensor, key: int) -> Write:
        scales, body = self._parts(out)
        noise = _Noise(key, out.device)

        def write(chunk: Tensor, start: int) -> Tensor:
            end = start + len(chunk)
            self._quantise(chunk, body[start:end], self._of(scales, start, end), noise)
            return chunk  # no byte says Inf or NaN: the scale does

        return write

    def decode(self, wire: Tensor) -> Tensor:
        return self._decode_into(wire, torch.zeros(self.values_in(wire), device=wire.device))

    def add(self, published: Tensor, wire: Tensor) -> Tensor:
        return self._decode_into(wire, published.clone())

    def _parts(self, wire: Tensor) -> tuple[Tensor, Tensor]:
        """(scales fp32, values uint8) of a buffer; views."""
        cut = 4 * self.blocks(self.values_in(wire))
        return wire[:cut].view(torch.float32), wire[cut:]

    def _of(self, scales: Tensor, start: int, end: int) -> Tensor:
        """The scales of the values from `start`, where a block begins, up to `end`; a view."""
        return scales[start // self.block : self.blocks(end)]

    def _quantise(self, chunk: Tensor, wire: Tensor, scales: Tensor, noise: _Noise) -> None:
        """A chunk of whole blocks (but for the last) as int8 bytes: floor(x / scale + u), u uniform
        in [0, 1).
        """
        if chunk.numel() % self.block:
            padded = chunk.new_zeros(len(scales) * self.block)
            padded[: chunk.numel()] = chunk
            chunk = padded
        by_block = chunk.view(-1, self.block)
        torch.mul(by_block.abs().amax(1), 1 / self.steps, out=scales)
        # A block of zeros has scale 0; NaN and Inf stay in the scale.
        inverse = torch.where(scales > 0, 1 / scales, 0.0)
        uniform = noise.draw(chunk.numel()).view(-1, self.block)
        steps = torch.addcmul(uniform, by_block, inverse[:, None]).floor_()
        self._put(steps.clamp_(-self.steps, self.steps).view(-1), wire)

    def _put(self, steps: Tensor, wire: Tensor) -> None:
        """Whole numbers, of whole blocks, as the bytes of as many values as there are."""
        wire.view(torch.int8).copy_(steps[: wire.numel()])

    def _decode_into(self, wire: Tensor, out: Tensor) -> Tensor:
        """out += the decoded buffer, chunk by chunk; product and sum are each rounded to fp32 on
        every device.
        """
        scales, body = self._parts(wire)
        values = body.view(torch.int8)
        for start in range(0, len(out), self.chunk):
            chunk = values[start : start + self.chunk].float()
            end = start + len(chunk)
            steps = self._of(scales, start, end).repeat_interleave(self.block)[: len(chunk)]
            out[start:end].add_(chunk.mul_(steps))
        return out


class Int4(Int8):
    """Blocks of 128 values in steps of their largest / 7, rounded at random, two a byte.

    A buffer is int8: the fp32 scales, then the bytes, the earlier value in the low half. A value
    that is not there, after an odd number of them, is −8, which none is.
    """

    name, dtype = "int4", torch.int8
    block = 128
    steps = 7
    in_kernel = False

    def length(self, values: int) -> int:
        return -(-values // 2) + 4 * self.blocks(values)

    def values_in(self, wire: Tensor) -> int:
        pairs = wire.numel() - 4 * -(-wire.numel() // (self.block // 2 + 4))
        if self.length(2 * pairs) != wire.numel():
            raise ValueError(f"{wire.numel()} bytes are no int4 buffer of blocks of {self.block}")
        return 2 * pairs - int(pairs > 0 and int(wire[-1]) >> 4 == -8)

    def writer(self, out: Tensor, key: int) -> Write:
        cut = 4 * -(-out.numel() // (self.block // 2 + 4))
        scales, body = out[:cut].view(torch.float32), out[cut:]
        noise = _Noise(key, out.device)

        def write(chunk: Tensor, start: int) -> Tensor:
            end = start + len(chunk)
            own = body[start // 2 : -(-end // 2)]
            self._quantise(chunk, own, self._of(scales, start, end), noise)
            if len(chunk) % 2:
                own[-1] = (int(own[-1]) & 15) - 128  # −8 in the upper half
            return chunk

        return write

    def _put(self, steps: Tensor, wire: Tensor) -> None:
        low, high = steps.to(torch.int8).view(-1, 2).unbind(1)
        pairs = torch.bitwise_or(torch.bitwise_and(low, 15), high * 16)
        wire.copy_(pairs[: wire.numel()])

    def _decode_into(self, wire: Tensor, out: Tensor) -> Tensor:
        scales, body = self._parts(wire)
        for start in range(0, len(out), self.chunk):
            end = min(start + self.chunk, len(out))
            pairs = body[start // 2 : -(-end // 2)]
            low = torch.bitwise_and(pairs + 8, 15) - 8  # with its sign
            halves = torch.stack([low, pairs >> 4], 1).flatten()[: end - start].float()
            steps = self._of(scales, start, end).repeat_interleave(self.block)[: end - start]
            out[start:end].add_(halves.mul_(steps))
        return out


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


_ALL = (
    Rounded("fp32", torch.float32, in_kernel=True),
    Rounded("bf16", torch.bfloat16, in_kernel=True),
    Rounded("fp16", torch.float16, in_kernel=True),
    Int8(),
    Int4(),
)
CODECS: dict[str, Codec] = {codec.name: codec for codec in _ALL}
