"""wire = encode(tensor − published) for every tensor of a list, its squared norm and its non-finite
values, in one launch.

    tensors fp32, found through a table of addresses; published fp32 likewise, or absent
    wire fp32, bf16, fp16 [n], or int8 [n] with a scale fp32 a block of 256
    norm² fp32 and a count int32 a program, summed in a second, small launch

Bytes: 4 n (8 n with published) read, n times the wire's width written.

A program owns BLOCK consecutive values of the flat buffer and looks at every tensor that reaches
into them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rolora_kernels.codecs import Codec
from rolora_kernels.triton_ops.blocks import rounded
from rolora_kernels.triton_ops.launch import cdiv, config_for, launch
from rolora_kernels.triton_ops.spec import Config, Spec, Specimen


@triton.jit
def pack_kernel(
    # the tensors' addresses int64 [T], and those of what is published (unread without PUBLISHED)
    tensors_ptr,
    published_ptr,
    # int64 [T + 1]: where each tensor starts in the flat buffer, and the end
    starts_ptr,
    # int64 [programs + 1]: the tensor in which each program's first value lies
    first_ptr,
    # wire [n], and of int8 the scales [n / 256]
    wire_ptr,
    scales_ptr,
    # a program's norm² and count of non-finite values, [programs]
    square_ptr,
    bad_ptr,
    n,
    key,
    PUBLISHED: tl.constexpr,
    INT8: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    pid = tl.program_id(0)
    place = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.zeros((BLOCK,), tl.float32)
    for number in range(tl.load(first_ptr + pid), tl.load(first_ptr + pid + 1) + 1):
        start, end = tl.load(starts_ptr + number), tl.load(starts_ptr + number + 1)
        mask = (place >= start) & (place < end)
        tensor = tl.load(tensors_ptr + number).to(tl.pointer_type(tl.float32))
        part = tl.load(tensor + (place - start), mask=mask, other=0.0)
        if PUBLISHED:
            base = tl.load(published_ptr + number).to(tl.pointer_type(tl.float32))
            part -= tl.load(base + (place - start), mask=mask, other=0.0)
        value = tl.where(mask, part, value)
    if INT8:
        blocks = tl.reshape(value, [BLOCK // 256, 256])
        scale = tl.max(tl.abs(blocks), 1) * (1 / 127)
        numbers = pid.to(tl.int64) * (BLOCK // 256) + tl.arange(0, BLOCK // 256)
        tl.store(scales_ptr + numbers, scale, mask=numbers * 256 < n)
        inverse = tl.where(scale > 0, 1 / scale, 0.0)
        noise = tl.rand(key, place)
        step = tl.floor(tl.reshape(blocks * inverse[:, None], [BLOCK]) + noise)
        step = tl.minimum(tl.maximum(step, -127.0), 127.0)
        tl.store(wire_ptr + place, step.to(tl.int8), mask=place < n)
        bad = (value != value) | (tl.abs(value) == float("inf"))
    else:
        sent = rounded(value, wire_ptr.dtype.element_ty, UPCAST)
        tl.store(wire_ptr + place, sent, mask=place < n)
        back = sent.to(tl.float32)
        bad = (back != back) | (tl.abs(back) == float("inf"))
    tl.store(square_ptr + pid, tl.sum(value * value))
    tl.store(bad_ptr + pid, tl.sum(bad.to(tl.int32)))


_TYPES = {
    "tensors_ptr": "*i64",
    "published_ptr": "*i64",
    "starts_ptr": "*i64",
    "first_ptr": "*i64",
    "scales_ptr": "*fp32",
    "square_ptr": "*fp32",
    "bad_ptr": "*i32",
    "n": "i64",
    "key": "i64",
}

SPEC = Spec(
    kernel=pack_kernel,
    configs={4: Config(BLOCK=1024, num_warps=4, num_stages=1)},
    specimens={
        "pack": Specimen(
            switches={"PUBLISHED": True, "INT8": False}, types=_TYPES, fixed=("INT8",)
        ),
        "pack_int8": Specimen(
            switches={"PUBLISHED": True, "INT8": True},
            types={**_TYPES, "wire_ptr": "*i8"},
            fixed=("INT8",),
        ),
    },
    primitives=("pack",),
    matmul=False,
)


def pack(
    tensors: list[Tensor], published: list[Tensor | None], codec: Codec, key: int
) -> tuple[Tensor, float, int]:
    """(wire on the CPU, norm, non-finite values) of flat fp32 tensors on one device; one copy to
    the host brings all three.
    """
    device, values = tensors[0].device, sum(t.numel() for t in tensors)
    if any(t.dtype != torch.float32 for t in tensors):
        raise ValueError(f"tensors to pack are fp32, got {sorted({str(t.dtype) for t in tensors})}")
    config = config_for(SPEC, tensors[0])
    tensors = [t.contiguous() for t in tensors]
    bases = [t.contiguous() for t in published if t is not None]
    has_base = bool(bases)
    bases = bases or tensors  # a pointer must point somewhere; it is not read
    programs = cdiv(values, config.BLOCK)
    tables = [
        torch.tensor([t.data_ptr() for t in tensors]),
        torch.tensor([t.data_ptr() for t in bases]),
        *_places([t.numel() for t in tensors], programs, config.BLOCK),
    ]
    size = codec.bytes(values)
    # One buffer for the one copy to the host: the wire, then norm² and the count, 8 bytes each.
    host = torch.empty(size + -size % 16 + 16, dtype=torch.uint8, device=device)
    wire = body = scales = host[:size].view(codec.dtype)
    if codec.block is not None:
        cut = 4 * cdiv(values, codec.block)
        scales, body = wire[:cut].view(torch.float32), wire[cut:].view(torch.int8)
    square = torch.empty(programs, device=device)
    bad = torch.empty(programs, dtype=torch.int32, device=device)
    launch(
        SPEC,
        config,
        (programs,),
        *(table.to(device) for table in tables),
        body,
        scales,
        square,
        bad,
        values,
        key % (1 << 63),
        PUBLISHED=has_base,
        INT8=codec.block is not None,
    )
    host[-16:-8].view(torch.float64).copy_(square.double().sum())
    host[-8:].view(torch.int64).copy_(bad.sum())
    host = host.cpu()
    norm = host[-16:-8].view(torch.float64).item() ** 0.5
    return host[:size].view(codec.dtype), norm, int(host[-8:].view(torch.int64).item())


def _places(sizes: list[int], programs: int, block: int) -> tuple[Tensor, Tensor]:
    """(where each tensor starts in the flat buffer, and the end; the tensor in which each program's
    first value lies), int64.
    """
    ends = torch.tensor(sizes, dtype=torch.int64).cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    first = torch.searchsorted(ends, torch.arange(programs + 1) * block, right=True)
    return starts, first.clamp_(max=len(sizes) - 1)
