"""Two operations that a choice of ours rests on: attention, fused or eager, and matmuls in fp32, by
PyTorch's choice or by oneDNN called directly.
"""

from __future__ import annotations

import statistics

import torch
import transformers as hf

from benchmarks.interleave import interleaved, ratio
from benchmarks.models import results


def attention(pairs: int) -> list[dict]:
    """Attention alone, transformers' own two functions, forward and backward: 1,024 tokens in
    sequences of a length, 12 heads of 64.
    """
    from transformers.models.roberta.modeling_roberta import eager_attention_forward

    module, rows = torch.nn.Module(), []
    module.eval().is_causal = False
    fused = hf.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
    for dtype in (torch.bfloat16, torch.float32):
        for length in (32, 128, 256, 512, 1024):
            q, k, v = (
                torch.randn(1024 // length, length, 12, 64, dtype=dtype)
                .transpose(1, 2)
                .requires_grad_()
                for _ in range(3)
            )

            def step(function, inputs=(q, k, v)):
                torch.autograd.grad(function(module, *inputs, None, scaling=0.125)[0].sum(), inputs)

            times = interleaved(
                {"sdpa": lambda: step(fused), "eager": lambda: step(eager_attention_forward)}, pairs
            )
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "length": length,
                    "sdpa_ms": 1e3 * statistics.median(times["sdpa"]),
                    "eager_over_sdpa": ratio(times, "eager", "sdpa"),
                }
            )
    return rows


def attention_table() -> None:
    print("| dtype | tokens in a sequence | sdpa ms | eager / sdpa |\n|---|---|---|---|")
    for row in results.rows("attention"):
        print(
            f"| {row['dtype']} | {row['length']:,} | {row['sdpa_ms']:.1f} | "
            f"{row['eager_over_sdpa']:.2f} |"
        )


def matmuls(pairs: int) -> list[dict]:
    """`x Wᵀ` and `dy W` in fp32 by PyTorch's choice and by oneDNN called directly, at any size:
    where gemm's limit lies.
    """
    direct, rows = torch.ops.mkldnn._linear_pointwise, []
    for M, K, N in (
        (2048, 2048, 2048),
        (512, 1024, 2816),
        (1024, 768, 768),
        (3840, 128, 128),
        (512, 1024, 16),
        (128, 128, 128),
        (128, 128, 64),
        (256, 64, 16),
    ):
        x, W, dy = torch.randn(M, K), torch.randn(N, K), torch.randn(M, N)
        calls = {
            "forward": lambda x=x, W=W: x @ W.t(),
            "forward_direct": lambda x=x, W=W: direct(x, W, None, "none", [], ""),
            "dx": lambda dy=dy, W=W: dy @ W,
            "dx_direct": lambda dy=dy, W=W: direct(dy, W.t(), None, "none", [], ""),
        }
        times = interleaved(calls, pairs)
        rows.append(
            {
                "sizes": [M, K, N],
                "forward_us": 1e6 * statistics.median(times["forward"]),
                **{name: ratio(times, f"{name}_direct", name) for name in ("forward", "dx")},
            }
        )
    return rows


def matmul_table() -> None:
    print(
        "| M×K×N | million multiply-adds | x Wᵀ, PyTorch's choice, µs | oneDNN / it: x Wᵀ | dy W "
        "|\n|---|---|---|---|---|"
    )
    for row in results.rows("matmuls"):
        M, K, N = row["sizes"]
        print(
            f"| {M}x{K}x{N} | {M * K * N / 2**20:,.2f} | {row['forward_us']:,.0f} | "
            f"{row['forward']:.2f} | {row['dx']:.2f} |"
        )
