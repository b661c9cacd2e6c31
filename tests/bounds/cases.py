"""The launches: every primitive, shape, dtype and switch, each with what it gives in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rolora_kernels import torch_ops, triton_ops, tune
from rolora_kernels.codecs import CODECS, Codec
from rolora_kernels.dropout import Dropout, keep_mask
from rolora_kernels.triton_ops import dropped, launch, merge, pack, reduce
from rolora_kernels.triton_ops.dequantise_nf4 import dequantise_nf4
from rolora_kernels.triton_ops.spec import all_specs
from rolora_kernels.weights import NF4, Int8

GATES = {torch.bfloat16: 4e-3, torch.float16: 4e-4, torch.float32: 2e-6}
SHAPES = ((33, 72, 40, 4), (1, 16, 24, 1), (130, 104, 136, 12))  # M, K, N, r
WIDE = (70, 48, 80, 72)  # of a rank that takes several blocks
LONG = (33, 1100, 24, 4)  # few rows of many columns, which several programs share


@dataclass(frozen=True)
class Case:
    """Launches of a kernel: `call` gives results, and `truth` what they are in float64."""

    name: str
    call: Callable[[], list[Tensor]]
    truth: Callable[[], list[Tensor]]
    gate: float


def cases() -> Iterator[Case]:
    """All of them, lazily: their operands are made as they come."""
    return itertools.chain(rule(), groups(), clients(), weights(), masks(), sums(), packing())


def rule() -> Iterator[Case]:
    """The five primitives, by every candidate."""
    for name in tune.primitives():
        for candidate, spec in tune.candidates(name).items():
            switches = {switch for s in spec.specimens.values() for switch in s.switches}
            shapes = (*SHAPES, WIDE, LONG) if "SPLIT" in switches else (*SHAPES, WIDE)
            for dtype, shape in itertools.product(GATES, shapes):
                t = tune.operands("cuda", *shape, dtype)
                if not tune.fits(candidate, t):
                    continue
                for label, dropout in _dropouts(shape[0], switches, name):
                    yield Case(
                        f"{name} {candidate} {shape} {_short(dtype)}{label}",
                        partial(tune.call, name, candidate, t, dropout),
                        partial(tune.truth, name, t, dropout),
                        GATES[dtype],
                    )


def groups() -> Iterator[Case]:
    """Several linears of one input, a bias, a weight that lies the other way, no T."""
    for tma, shape, dtype in itertools.product((False, True), (SHAPES[2], WIDE), GATES):
        if tma and dtype == torch.float32:
            continue
        M, _, N, _ = shape
        t = tune.operands("cuda", *shape, dtype)
        told = f"{'tma ' if tma else ''}{shape} {_short(dtype)}"
        t["V"], t["dz"], bias = t["W"].t().contiguous().t(), t["dy"] * 0.5, torch.randn(N).to(dtype)
        for label, dropout in _dropouts(M, {"DROPOUT"} if tma else {"DROPOUT", "PER_ROW"}):

            def dx(ops, t, which, d=dropout):
                dys, given = [t["dy"], t["dz"]], [t["W"], t["V"]]
                return [
                    ops.base_dx(dys, given, t["T"], t["A"], d, **which),
                    ops.base_dx(dys, given[::-1], t["T"], t["A"], d, **which),
                ]

            # dX is rounded once a linear
            yield _case(f"groups dX {told}{label}", dx, t, {"tma": tma}, 1.5 * GATES[dtype])

        def y(ops, t, which, b=bias):
            own = b.to(t["x"].dtype)
            return [
                ops.expand_base(t["x"], W, t["S"], t["B"], 1.3, own, **which)
                for W in (t["W"], t["V"])
            ] + [ops.expand_base(t["x"], t["V"], t["S"], t["B"], 1.3, None, **which)]

        yield _case(f"groups Y with a bias {told}", y, t, {"tma": tma}, GATES[dtype])
        if not tma:
            yield Case(
                f"groups dB without T {told}",
                lambda t=t: [triton_ops.grads_of_dy(t["dy"], None, t["S"], 1.3)[1]],
                lambda t=t: [1.3 * t["dy"].double().t() @ t["S"].double()],
                GATES[dtype],
            )


def clients() -> Iterator[Case]:
    """C clients' factors on one base: a row block belongs to one of them."""
    C, m, K, N, r = 3, 21, 72, 40, 4
    for dtype in GATES:
        t = tune.operands("cuda", C * m, K, N, r, dtype)
        t["A"], t["B"] = torch.randn(C, r, K).to(dtype), torch.randn(C, N, r).to(dtype)
        for label, dropout in _dropouts(C * m, {"DROPOUT", "PER_ROW"})[::2]:

            def of(ops, t, _, d=dropout):
                return [
                    ops.shrink(t["x"], t["A"], d),
                    ops.expand_base(t["x"], t["W"], t["S"], t["B"], 1.3, None),
                    *ops.grads_of_dy(t["dy"], t["B"], t["S"], 1.3, clients=C),
                    ops.base_dx([t["dy"]], [t["W"]], t["T"], t["A"], d),
                    ops.grad_A(t["T"], t["x"], d, clients=C),
                ]

            yield _case(f"clients {_short(dtype)}{label}", of, t, {}, GATES[dtype])


def weights() -> Iterator[Case]:
    """W + s · B A of a dense, an int8 and a 4-bit weight; 4-bit codes to a dense one."""
    N, K = 24, 80
    for dtype, r in [(dtype, r) for dtype in GATES for r in (4, 40)]:
        A, B = torch.randn(r, K), torch.randn(N, r) / r
        kinds = {
            "dense": torch.randn(N, K).to(dtype),
            "int8": Int8(torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N)),
            "nf4": _packed(N, K, False),
            "nf4 double": _packed(N, K, True),
        }
        for kind, weight in kinds.items():
            yield Case(
                f"merge {kind} r={r} {_short(dtype)}",
                lambda w=weight, A=A, B=B, d=dtype: [merge.merge(w, A, B, 0.7, d)],
                lambda w=weight, A=A, B=B, d=dtype: [
                    _whole(w) + 0.7 * B.to(d).double() @ A.to(d).double()
                ],
                GATES[dtype],
            )
            if isinstance(weight, NF4):
                told = (weight.packed, weight.code, weight.absmax, weight.block, weight.double)
                yield Case(
                    f"dequantise {kind} {_short(dtype)}",
                    lambda told=told, d=dtype: [
                        dequantise_nf4(*told, torch.empty(N, K, dtype=d, device="cuda"))
                    ],
                    lambda w=weight: [_whole(w)],
                    GATES[dtype],
                )


def masks() -> Iterator[Case]:
    """Dropout by itself: of x, and added to something."""
    for dtype, shape in [(dtype, shape) for dtype in GATES for shape in ((33, 300), (1, 5))]:
        x, out = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        for label, dropout in _dropouts(shape[0], {"DROPOUT", "PER_ROW"})[1:]:
            kept = keep_mask(range(shape[0]), shape[1], dropout) * x.double()
            yield Case(
                f"masks {shape} {_short(dtype)}{label}",
                lambda x=x, out=out, d=dropout: [
                    dropped.dropped(x, d),
                    dropped.dropped(x, d, out.clone()),
                ],
                lambda out=out, d=dropout, kept=kept: [kept, out.double() + d.scale * kept],
                GATES[dtype],
            )


def sums() -> Iterator[Case]:
    """One sum of partials, and two in one launch."""
    jobs = [
        (torch.randn(3, 40, 50), torch.zeros(40, 50)),
        (torch.randn(2, 9, 7), torch.zeros(9, 7)),
    ]
    for some in (jobs, jobs[:1]):

        def summed(some=some):
            reduce.sum_partials(some, 0.5)
            return [out for _, out in some]

        def truth(some=some):
            return [0.5 * parts.double().sum(0) for parts, _ in some]

        yield Case(f"sums {len(some)}", summed, truth, GATES[torch.float32])


def packing() -> Iterator[Case]:
    """A change of several tensors on the wire, by every codec that the kernel has."""
    tensors = [torch.randn(size) for size in (300, 7, 2001)]  # even in all: whole int64 words
    for name, codec in CODECS.items():
        if not codec.in_kernel:
            continue
        gate = {"fp32": 1e-6, "int8": 2e-2}.get(name) or GATES[codec.dtype]
        for label, base in (("", []), (" minus what is published", [t * 0.5 for t in tensors])):
            change = torch.cat(tensors).double() * (0.5 if base else 1.0)
            yield Case(
                f"packing {name}{label}",
                partial(_packed_change, tensors, base, codec),
                lambda change=change: [change],
                gate,
            )


def _packed_change(tensors: list[Tensor], base: list[Tensor], codec: Codec) -> list[Tensor]:
    """What the wire of a change says. The kernel finds tensors by their addresses, and the semantics
    know the storages of arguments alone: the tensors are laid behind the table of addresses.
    """

    def laid(spec, config, grid, _, __, *operands, **switches):
        tables = [_with_addresses(some) for some in (tensors, base or tensors)]
        launch.launch(spec, config, grid, *tables, *operands, **switches)

    pack.launch = laid
    try:
        wire, _, _ = pack.pack(tensors, base or [None] * len(tensors), codec, 3)
    finally:
        pack.launch = launch.launch
    return [codec.decode(wire)]


def _with_addresses(tensors: list[Tensor]) -> Tensor:
    """int64: the addresses of the tensors' values, which follow in the same storage."""
    words = 2 * len(tensors)
    home = torch.cat([torch.zeros(words), *tensors])
    sizes = torch.tensor([words, *(t.numel() for t in tensors[:-1])])
    table = home[:words].view(torch.int64)
    table.copy_(home.data_ptr() + 4 * sizes.cumsum(0))
    return table


def _case(name: str, of: Callable, t: dict[str, Tensor], which: dict, gate: float) -> Case:
    """`of(ops, t, which)` by our kernels, and by vendor libraries in float64."""
    return Case(
        name, partial(of, triton_ops, t, which), partial(of, torch_ops, _double(t), {}), gate
    )


def _double(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in t.items()}


def _dropouts(M: int, switches: set[str], name: str = "") -> list[tuple[str, Dropout | None]]:
    """No dropout, and where a kernel has the switch a key for all rows, and a key for every row."""
    found: list[tuple[str, Dropout | None]] = [("", None)]
    if "DROPOUT" in switches and name != "expand_base":
        found.append((" dropout", Dropout(0.25, torch.tensor(-7, device="cuda"))))
    if "PER_ROW" in switches:
        rows = torch.arange(M, device="cuda")
        found.append((" dropout by row", Dropout(0.25, rows % 3, rows // 3)))
    return found


def _packed(N: int, K: int, double: bool, block: int = 64) -> NF4:
    codes = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8)
    blocks = N * K // block
    absmax, nested = torch.rand(blocks), None
    if double:
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
        nested = (torch.rand(256), torch.rand(-(-blocks // 8)), 8, torch.tensor(0.1))
    return NF4(codes, absmax, torch.linspace(-1, 1, 16), (N, K), block, nested)


def _whole(weight: Tensor | NF4 | Int8) -> Tensor:
    """A weight in float64, by its definition."""
    if isinstance(weight, Tensor):
        return weight.double()
    if isinstance(weight, Int8):
        return weight.values.double() * weight.scale.double()[:, None] / 127
    absmax = weight.absmax.double()
    if weight.double is not None:
        code2, absmax2, block2, offset = weight.double
        coarse = absmax2.double().repeat_interleave(block2)[: len(absmax)]
        absmax = code2.double()[weight.absmax.long()] * coarse + offset.double()
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], 1).flatten().long()
    values = weight.code.double()[codes] * absmax.repeat_interleave(weight.block)
    return values.view(weight.shape)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def forms() -> dict[str, list[dict[str, bool]]]:
    """kernel → the settings of its switches that launches can ask for."""
    found: dict[str, list[dict[str, bool]]] = {}
    for spec in all_specs().values():
        for specimen in spec.specimens.values():
            for setting in specimen.settings():
                own = {key: value for key, value in setting.items() if isinstance(value, bool)}
                found.setdefault(spec.kernel.__name__, []).append(own)
    return found
