"""How large the problems are: a GPU's, and those of `--smoke`, which runs every line on any
machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

GATES = {torch.bfloat16: (3e-3, 4e-3), torch.float16: (4e-4, 4e-4), torch.float32: (2e-6, 2e-6)}


@dataclass(frozen=True)
class Sizes:
    """`linears`: (N, K); `odd`: (M, K, N, r) for checks; `M`, `rank`: of tuning and of the first
    layers; `gemm`: rows and columns of the ceiling's product, `copied`: bytes of its copy;
    `llama`, `roberta`: what a configuration differs in; `configs`: how many of a grid are tried,
    None for all.
    """

    smoke: bool
    linears: tuple[tuple[int, int], ...]
    odd: tuple[tuple[int, int, int, int], ...]
    M: int
    other_rows: tuple[int, ...]
    few_rows: int
    rank: int
    other_ranks: tuple[int, ...]
    gemm: int
    copied: int
    clients: tuple[int, ...]
    tokens: tuple[int, int]
    llama: dict
    roberta: dict
    roberta_batch: tuple[int, int]
    configs: int | None


FULL = Sizes(
    smoke=False,
    linears=((4096, 4096), (11008, 4096), (4096, 11008)),  # Llama-2-7B's
    odd=((1, 16, 24, 1), (1000, 1000, 1104, 8), (2048, 4096, 4096, 16), (1025, 520, 700, 64)),
    M=8192,
    other_rows=(2048, 16384),
    few_rows=512,
    rank=16,
    other_ranks=(4, 64),
    gemm=8192,
    copied=4 << 30,
    clients=(1, 4, 16, 50),
    tokens=(4, 2048),
    llama={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 8,
        "vocab_size": 32000,
    },
    roberta={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    roberta_batch=(32, 128),
    configs=None,
)
SMOKE = Sizes(
    smoke=True,
    linears=((32, 48),),
    odd=((33, 40, 24, 4),),
    M=40,
    other_rows=(24,),
    few_rows=8,
    rank=4,
    other_ranks=(3,),
    gemm=64,
    copied=1 << 16,
    clients=(1, 2),
    tokens=(1, 8),
    llama={
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "vocab_size": 100,
    },
    roberta={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    },
    roberta_batch=(2, 4),
    configs=2,
)
