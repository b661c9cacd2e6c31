"""What a kernel's file says of its kernel: the SPEC that launch, aot and tune read.

A new primitive is a file of this folder with a kernel, a launcher and a SPEC, and its place in the
protocol (plan, primitives). Nothing else lists kernels: `all_specs` finds them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

# The files of this folder that hold no kernel.
NO_KERNEL = ("__init__", "again", "blocks", "descriptors", "launch", "library", "spec")


@dataclass(frozen=True)
class Config:
    """Block sizes (those a kernel lacks are 0), warps and pipeline stages."""

    BLOCK_M: int = 0
    BLOCK_N: int = 0
    BLOCK_K: int = 0
    BLOCK_R: int = 0
    BLOCK: int = 0
    ROWS: int = 0
    GROUP_M: int = 0
    SPECIALISED: int = 0  # base_tma: warps in groups that load and groups that multiply
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        # Every launch looks one up; its fields are hashed once.
        object.__setattr__(self, "_hash", hash(tuple(vars(self).values())))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Specimen:
    """What ahead-of-time compilation is told of a kernel.

    switches: the constexpr parameters that no configuration sets; what costs something is on.
    types: Triton's types of the parameters for which aot's own rule is wrong.
    unit_strides: strides that are 1 for contiguous operands, which is what models pass: Triton
    specialises them on a launch as well.
    fixed: switches that no launch of this specimen sets otherwise.
    """

    switches: Mapping[str, int] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    unit_strides: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()

    def settings(self) -> list[dict[str, int]]:
        """The switches in every setting that a launch can ask for."""
        free = [
            name
            for name, value in self.switches.items()
            if isinstance(value, bool) and name not in self.fixed
        ]
        found = []
        for values in itertools.product((True, False), repeat=len(free)):
            setting = {**self.switches, **dict(zip(free, values, strict=True))}
            # a mask lies on the first linear of a group, and only a mask has keys of rows
            masked = setting.get("DROPOUT", True)
            if (masked or not setting.get("PER_ROW")) and (
                setting.get("FIRST", True) or not setting.get("DROPOUT")
            ):
                found.append(setting)
        return found


@dataclass(frozen=True, eq=False)
class Spec:
    """A kernel, its shipped configurations, and what checks and tunes it.

    kernel: the jitted function; specimens: what aot compiles of it, by the name of its row.
    configs: bytes of an element → the configuration for any GPU without a measured table. 4 bytes
    are for checking and small models, not for speed.
    by_rank: bytes of an element → padded rank → what differs in the configuration.
    hopper: what differs on sm_90. masked: bytes of an element → what differs, last of all, where
    dropout acts in it. options: further options of compiling and launching.
    renamed: a configuration's name → the kernel's own parameter, where it has another.

    sizes: the letters of a table's row and of a launch, "MK". rank_blocks: the padded ranks that a
    block can have; ranks above the last take several blocks. walks_ranks: a program walks over
    those blocks itself, so that a configuration serves any rank.
    primitives: whose candidate `implementation` it is; grid: the configurations that tune tries.
    call: one call of the primitive on tune's operands, by any backend.
    traffic: the bytes that it has to move in a 16-bit type, factors in fp32, from M, N, K, r.

    matmul: whether it multiplies matrices, and so has to use tensor cores in 16-bit types.
    first_arch: the oldest architecture that it compiles for.
    """

    kernel: Any
    configs: Mapping[int, Config]
    specimens: Mapping[str, Specimen]
    by_rank: Mapping[int, Mapping[int, Mapping[str, int]]] = field(default_factory=dict)
    hopper: Mapping[str, int] = field(default_factory=dict)
    masked: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    options: Mapping[str, bool] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    sizes: str = ""
    rank_blocks: tuple[int, ...] = ()
    walks_ranks: bool = False
    primitives: tuple[str, ...] = ()
    implementation: str = "triton"
    grid: tuple[Mapping[str, int], ...] = ()
    call: Callable[..., Any] | None = None
    traffic: Callable[[int, int, int, int], int] | None = None
    matmul: bool = True
    first_arch: int = 80

    def rank_block(self, rank: int) -> int:
        """The padded rank of a block: tensor cores need 16 at least; 0 without ranks."""
        if not self.rank_blocks:
            return 0
        return min(self.rank_blocks[-1], max(16, 1 << (rank - 1).bit_length()))

    def shipped(
        self,
        width: int,
        rank_block: int = 0,
        capability: tuple[int, int] | None = None,
        dropout: bool = False,
    ) -> Config:
        """The shipped configuration for elements of `width` bytes, with a mask where `dropout`."""
        config = replace(self.configs[width], BLOCK_R=rank_block)
        if capability == (9, 0):
            config = replace(config, **self.hopper)
        config = replace(config, **self.by_rank.get(width, {}).get(rank_block, {}))
        return replace(config, **self.masked.get(width, {})) if dropout else config

    def arguments(self, config: Config) -> dict[str, int]:
        """The keyword arguments of a launch with `config`."""
        given = {name: value for name, value in asdict(config).items() if value}
        given.pop("SPECIALISED", None)  # a switch, which is passed where it is off too
        return {self.renamed.get(name, name): value for name, value in given.items()}


# What tune tries of matmuls.
GEMM_GRID = tuple(
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64, "num_warps": warps, "num_stages": stages}
    for m, n, warps, stages in (
        (128, 128, 4, 3),
        (128, 128, 8, 3),
        (128, 256, 8, 3),
        (128, 256, 8, 4),
        (256, 128, 8, 3),
        (256, 128, 8, 4),
    )
)


@functools.cache
def all_specs() -> dict[str, Spec]:
    """file → SPEC of every kernel of this folder."""
    files = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    return {
        file: import_module(f"{__package__}.{file}").SPEC for file in files if file not in NO_KERNEL
    }
