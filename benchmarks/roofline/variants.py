"""The launches of a group of adapted linears, forward and backward, by every way to compute it.

x [M, K] is the group's; W_g [N_g, K]; ranks r each, R in all. Bytes are compulsory: every launch
reads each operand once and writes each result once. Factors are fp32 for us, of the width of x for
the others; their gradients are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.traffic import H100
from rolora_kernels.triton_ops.launch import rows_of
from rolora_kernels.triton_ops.spec import all_specs


@dataclass(frozen=True)
class Launch:
    """A kernel, its arithmetic and its traffic."""

    kind: str
    flops: float
    read: float
    written: float


@dataclass(frozen=True)
class Group:
    """Linears of one input; `phase`: the factors that train, A, B or BOTH; `width`: bytes of an
    element; `nf4`: weights of 4 bits, double quantised; `steps`: micro-steps of an optimizer step.
    """

    M: int
    K: int
    Ns: tuple[int, ...]
    r: int
    phase: str = "B"
    width: int = 2
    nf4: bool = False
    steps: int = 1

    @property
    def trains_A(self) -> bool:
        return self.phase != "B"

    @property
    def trains_B(self) -> bool:
        return self.phase != "A"


def _product(kind: str, m: float, n: float, k: float, width: int, extra: float = 0.0) -> Launch:
    """[m, k] by [k, n]; `extra`: bytes read besides."""
    return Launch(kind, 2.0 * m * n * k, width * (m * k + k * n) + extra, width * m * n)


def _skinny(kind: str, g: Group, long: int, rank: int, to_factor: bool) -> Launch:
    """A product of [M, long] with something of a rank: a read of the long side. Its result is [M,
    rank], or a factor's gradient in fp32.
    """
    other, result = (g.M, 2.0 * long) if to_factor else (long, g.M)
    read = g.width * (g.M * long + other * rank)
    return Launch(kind, 2.0 * g.M * long * rank, read, g.width * result * rank)


def _added(g: Group, columns: int, rank: int, rows: int | None = None) -> Launch:
    """[M, columns] += a product of a rank."""
    m = g.M if rows is None else rows
    read = g.width * (m * columns + rank * (m + columns))
    return Launch("vendor added", 2.0 * m * columns * rank, read, g.width * m * columns)


def _elementwise(g: Group, elements: float, reads: int, read_width: int, width: int) -> Launch:
    return Launch("elementwise", elements, reads * read_width * elements, width * elements)


def _dense(g: Group, passes: int = 2) -> Iterator[Launch]:
    """What 4-bit weights cost before each product."""
    if g.nf4:
        for N in g.Ns * passes:
            codes = N * g.K * (0.5 + 1 / 64 + 4 / 64 / 256)
            yield Launch("our dequantisation", 2.0 * N * g.K, codes, g.width * N * g.K)


def _frozen(g: Group, kind: str = "vendor product") -> Iterator[Launch]:
    """Y = X Wᵀ and dX = Σ dY W; a later linear of a group adds to dX in the accumulator."""
    for number, N in enumerate(g.Ns):
        yield _product(kind, g.M, N, g.K, g.width)
        yield _product(kind, g.M, g.K, N, g.width, extra=g.width * g.M * g.K * (number > 0))


def frozen(g: Group) -> Iterator[Launch]:
    """The frozen linears alone."""
    yield from _dense(g)
    yield from _frozen(g)


def peft_phase(g: Group) -> Iterator[Launch]:
    """PEFT in x's dtype, the factor frozen that does not train. Linears share nothing."""
    yield from frozen(g)
    for N in g.Ns:
        y, x = g.M * N, g.M * g.K
        yield _skinny("vendor skinny", g, g.K, g.r, False)  # S = X Aᵀ
        yield _product("vendor product", g.M, N, g.r, g.width)  # S Bᵀ
        yield _elementwise(g, y, 1, g.width, g.width)  # · scaling
        yield _elementwise(g, y, 2, g.width, g.width)  # Y + …
        yield _elementwise(g, y, 1, g.width, g.width)  # dY · scaling
        if g.trains_B:
            yield _skinny("vendor skinny", g, N, g.r, True)  # dB
        yield _skinny("vendor skinny", g, N, g.r, False)  # T
        if g.trains_A:
            yield _skinny("vendor skinny", g, g.K, g.r, True)  # dA
        yield _product("vendor product", g.M, g.K, g.r, g.width)  # T A
        yield _elementwise(g, x, 2, g.width, g.width)  # dX + …


def peft_bf16(g: Group) -> Iterator[Launch]:
    """PEFT in x's dtype, both factors train."""
    return peft_phase(Group(g.M, g.K, g.Ns, g.r, "BOTH", g.width, g.nf4, g.steps))


def peft_default(g: Group) -> Iterator[Launch]:
    """PEFT as it comes on a 16-bit base: fp32 factors under autocast. x is cast to fp32 and back to
    16 bits, and its gradient back and forth.
    """
    yield from peft_bf16(g)
    for _ in g.Ns:
        x = g.M * g.K
        yield _elementwise(g, x, 1, 2, 4)  # x to fp32
        yield _elementwise(g, x, 1, 4, 2)  # and to 16 bits
        yield _elementwise(g, x, 1, 2, 4)  # T A to fp32
        yield _elementwise(g, x, 1, 4, 2)  # and back


def manual(g: Group) -> Iterator[Launch]:
    """A backward by hand as Unsloth has it: X is kept, both factors' gradients are computed."""
    yield from frozen(g)
    for N in g.Ns:
        yield _skinny("vendor skinny", g, g.K, g.r, False)  # S
        yield _added(g, N, g.r)  # Y += S Bᵀ
        yield _skinny("vendor skinny", g, N, g.r, False)  # dY B
        yield _skinny("vendor skinny", g, g.K, g.r, True)  # dA
        yield _skinny("vendor skinny", g, g.K, g.r, False)  # S again
        yield _skinny("vendor skinny", g, N, g.r, True)  # dB
        yield _added(g, g.K, g.r)  # dX += T A


def _shrink(g: Group, kind: str) -> Launch:
    return _skinny(kind, g, g.K, g.r * len(g.Ns), False)


def _our_dA(g: Group) -> Iterator[Launch]:
    """Our one walk over X, and the sum of its partials."""
    rank = g.r * len(g.Ns)
    spec = all_specs()["grad_A"]
    config = spec.shipped(g.width, spec.rank_block(rank))
    beside = -(-g.K // config.BLOCK_K) * -(-rank // config.BLOCK_R)
    parts = 4.0 * rank * g.K * -(-g.M // rows_of(config, g.M, beside, H100))
    read = g.width * g.M * (g.K + rank)
    yield Launch("our skinny", 2.0 * g.M * g.K * rank, read, parts)
    yield Launch("our skinny", parts / 4, parts, 4.0 * rank * g.K)


def _of_dy(g: Group, N: int, need_T: bool = True) -> Iterator[Launch]:
    """Our one pass over dY for T and dB, and the sum of its partials."""
    if not g.trains_B:
        yield _skinny("our skinny", g, N, g.r, False)
        return
    spec = all_specs()["grads_of_dy"]
    config = spec.shipped(g.width, spec.rank_block(g.r))
    columns = -(-N // config.BLOCK_N)
    beside = columns * -(-g.r // config.BLOCK_R)
    parts = 4.0 * g.r * N * -(-g.M // rows_of(config, g.M, beside, H100))
    parts += 4.0 * g.r * g.M * columns * need_T
    flops = 2.0 * g.M * N * g.r * (1 + need_T)
    yield Launch("our skinny", flops, g.width * (g.M * N + (g.M + N) * g.r), parts)
    yield Launch("our skinny", parts / 4, parts, 4.0 * g.r * N + g.width * g.M * g.r * need_T)


def vendor(g: Group) -> Iterator[Launch]:
    """Ours on vendor libraries: one S and one sum of dX a group."""
    yield from frozen(g)
    yield _shrink(g, "vendor skinny")
    for N in g.Ns:
        yield _added(g, N, g.r)
        yield _skinny("vendor skinny", g, N, g.r, False)
        if g.trains_B:
            yield _skinny("vendor skinny", g, N, g.r, True)
    if g.trains_A:
        yield _skinny("vendor skinny", g, g.K, g.r * len(g.Ns), True)
    yield _added(g, g.K, g.r * len(g.Ns))


def skinny(g: Group) -> Iterator[Launch]:
    """Our skinny kernels beside vendor products."""
    yield from frozen(g)
    yield _shrink(g, "our skinny")
    for N in g.Ns:
        yield _added(g, N, g.r)
        yield from _of_dy(g, N)
    if g.trains_A:
        yield from _our_dA(g)
    yield _added(g, g.K, g.r * len(g.Ns))


def _fused(g: Group, kind: str) -> Iterator[Launch]:
    yield from _dense(g)
    yield from _frozen(g, kind)
    yield _shrink(g, "our skinny")
    for N in g.Ns:
        yield from _of_dy(g, N)
    if g.trains_A:
        yield from _our_dA(g)


def pointers(g: Group) -> Iterator[Launch]:
    """All ours: the low-rank product in the accumulator of a product by pointers."""
    return _fused(g, "our pointer product")


def tma(g: Group) -> Iterator[Launch]:
    """All ours, the product by descriptors."""
    return _fused(g, "our TMA product")


def _merged(g: Group, merges: float, producer: bool = False) -> Iterator[Launch]:
    """W' = W + s · B A made `merges` times a step by our kernel (4-bit weights: while they are
    dequantised, at no further bytes), then products with W' alone.
    """
    yield from frozen(g)
    if not g.nf4:
        for N in g.Ns:
            one = _added(g, g.K, g.r, rows=N)  # as much as adding in place: W read, W' written
            flops, read, written = (merges * part for part in (one.flops, one.read, one.written))
            yield Launch("our skinny", flops, read, written)
    if g.trains_B and not producer:
        yield _shrink(g, "our skinny")
    for N in g.Ns:
        if g.phase == "B":
            yield from _of_dy(g, N, need_T=False)
        else:
            yield from _of_dy(g, N)
    if g.trains_A:
        yield from _our_dA(g)


def merged(g: Group) -> Iterator[Launch]:
    """Merged once a pass: nothing more is kept."""
    return _merged(g, 2.0)


def merged_kept(g: Group) -> Iterator[Launch]:
    """Merged once an optimizer step and kept until its last backward: a second copy of W."""
    return _merged(g, 1.0 / g.steps)


def merged_producer(g: Group) -> Iterator[Launch]:
    """Merged once a pass; what computes x (a norm, an activation) writes S too."""
    return _merged(g, 2.0, producer=True)


def merged_vendor(g: Group) -> Iterator[Launch]:
    """Merged once a pass on vendor libraries: on CUDA `torch.addmm` copies W and then adds to the
    copy in place, which is W read and written twice.
    """
    yield from frozen(g)
    for N in () if g.nf4 else g.Ns * 2:
        yield _elementwise(g, N * g.K, 1, g.width, g.width)
        yield _added(g, g.K, g.r, rows=N)
    if g.trains_B:
        yield _shrink(g, "vendor skinny")
    for N in g.Ns:
        if g.trains_A:
            yield _skinny("vendor skinny", g, N, g.r, False)
        if g.trains_B:
            yield _skinny("vendor skinny", g, N, g.r, True)
    if g.trains_A:
        yield _skinny("vendor skinny", g, g.K, g.r * len(g.Ns), True)


VARIANTS: dict[str, tuple[str, Callable[[Group], Iterator[Launch]], str]] = {
    # name → (as a table calls it, its launches, the contender of benchmarks.gpu that it models)
    "frozen": ("frozen linears", frozen, "frozen"),
    "peft_default": ("PEFT as it comes", peft_default, "peft_default"),
    "peft_bf16": ("PEFT, bf16", peft_bf16, "peft_bf16"),
    "peft_phase": ("PEFT, bf16, one factor frozen", peft_phase, "peft_phase"),
    "manual": ("by hand, as Unsloth", manual, "manual"),
    "vendor": ("ours, vendor libraries", vendor, "ours vendor"),
    "skinny": ("ours, skinny kernels beside vendor products", skinny, "ours skinny"),
    "pointers": ("ours, products by pointers", pointers, "ours kernels"),
    "tma": ("ours, products by TMA", tma, "ours tma"),
    "merged_vendor": ("ours, merged by vendor libraries", merged_vendor, "ours merged"),
    "merged": ("ours, merged once a pass", merged, "ours merged, skinny"),
    "merged_producer": ("ours, merged, S from x's producer", merged_producer, ""),
    "merged_kept": ("ours, merged once an optimizer step", merged_kept, ""),
}
