"""Whole models beside PEFT: tokens a second, what is kept for backward, and what a quantised base
takes.

    # CPU; writes benchmarks/results/models.json and prints the rows
    python -m benchmarks.models [--pairs N]

Models have the shapes of Llama and RoBERTa with random weights: speed does not depend on their
values. A step is forward, loss and backward, ours as a run prepares its model. PEFT as a user has
it trains both factors (fp32 factors, autocast on a 16-bit base, attention as transformers chooses
it); "same factor frozen" has factors in the base's dtype, `requires_grad=False` on the one that
rests, and our attention. Contenders take turns in one process, a process a row; ratios are medians
over pairs. In fp32 ours runs a second time with oneDNN switched off: what is left is the engine's
own share.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import platform
import statistics
from concurrent import futures
from pathlib import Path

import peft
import torch
import transformers as hf

from benchmarks.interleave import interleaved, ratio
from benchmarks.layers import kept, own_storages
from rolora import LoRAConfig, attach, set_phase
from rolora.adapter.frozen import speed_up
from rolora.hf.machine import pick_attention

RESULTS = Path(__file__).parent / "results" / "models.json"
# name → (model, adapted modules, batch, length)
SHAPES = {
    "Llama-shaped": (
        lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=32_000,
                hidden_size=1024,
                intermediate_size=2816,
                num_hidden_layers=4,
                num_attention_heads=16,
            )
        ),
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        2,
        256,
    ),
    "RoBERTa-shaped": (
        lambda: hf.RobertaForSequenceClassification(
            hf.RobertaConfig(
                vocab_size=8_000, num_labels=2, num_hidden_layers=6, max_position_embeddings=514
            )
        ),
        ["query", "key", "value"],
        8,
        128,
    ),
}
RANK = 16


def contenders(shape: str, dtype: torch.dtype, phase: str) -> tuple[dict, set[int]]:
    """(name → step, the storages of all their weights)."""
    build, targets, batch, length = SHAPES[shape]
    torch.manual_seed(0)
    base = build().to(dtype).eval()
    base.config.use_cache = False  # as Hugging Face's Trainer and our runs have it
    attention = pick_attention("auto", torch.device("cpu"), dtype, length)
    ids = torch.randint(5, base.config.vocab_size, (batch, length))
    labels = ids if shape.startswith("Llama") else torch.randint(0, 2, (batch,))
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)
    ours = copy.deepcopy(base)
    attach(ours, LoRAConfig(rank=RANK, alpha=2 * RANK, target_modules=targets))
    set_phase(ours, phase)
    speed_up(ours)
    ours.set_attn_implementation(attention)
    default = peft.get_peft_model(copy.deepcopy(base), config)
    phased = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).to(
        dtype
    )
    for name, parameter in phased.named_parameters():
        parameter.requires_grad_(
            any(f"lora_{factor}" in name for factor in ("AB" if phase == "BOTH" else phase))
        )
    phased.base_model.model.set_attn_implementation(attention)

    def step(model, autocast=False):
        def run():
            model.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = losses(model, ids, labels)
            loss.backward()

        return run

    def switched_off():
        torch.backends.mkldnn.set_flags(False)
        step(ours)()
        torch.backends.mkldnn.set_flags(True)

    steps = {
        "ours": step(ours),
        "peft_phase": step(phased),
        "peft_default": step(default, autocast=dtype != torch.float32),
    }
    return steps if dtype != torch.float32 else steps | {
        "without_onednn": switched_off
    }, own_storages(ours, phased, default)


def losses(model, ids, labels):
    """What a run's recipe computes, ours and PEFT's alike but for our chunked loss."""
    from rolora.recipes import Batch
    from rolora.recipes.spans import token_losses

    if labels.ndim == 1:
        return torch.nn.functional.cross_entropy(model(input_ids=ids).logits.float(), labels)
    if isinstance(model, peft.PeftModel):
        logits = model(input_ids=ids).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    return (
        token_losses(model, Batch({"input_ids": ids}, labels, 1, len(ids), ids.numel())).sum()
        / labels[:, 1:].numel()
    )


def speed(pairs: int) -> list[dict]:
    """A row for every shape, dtype and phase, each in a process of its own, as a run is: in a
    process that has held other models the allocator's state decides by up to a sixth.
    """
    rows = []
    for shape in SHAPES:
        for dtype in ("float32", "bfloat16"):
            for phase in ("B", "A", "BOTH"):
                with futures.ProcessPoolExecutor(
                    1, multiprocessing.get_context("spawn")
                ) as process:
                    rows.append(process.submit(row, shape, dtype, phase, pairs).result())
                print(_line(rows[-1]), flush=True)
    return rows


def row(shape: str, dtype: str, phase: str, pairs: int) -> dict:
    _, _, batch, length = SHAPES[shape]
    steps, own = contenders(shape, getattr(torch, dtype), phase)
    times = interleaved(steps, pairs)
    return {
        "model": shape,
        "dtype": dtype,
        "phase": phase,
        "tokens_per_second": batch * length / statistics.median(times["ours"]),
        **{
            f"peft_over_ours_{name}": ratio(times, f"peft_{name}", "ours")
            for name in ("phase", "default")
        },
        **(
            {"without_onednn_over_ours": ratio(times, "without_onednn", "ours")}
            if "without_onednn" in times
            else {}
        ),
        **{
            f"kept_{name}": kept(steps[name], own)
            for name in ("ours", "peft_phase", "peft_default")
        },
    }


def table() -> None:
    print(
        "| model | dtype | phase | tokens/s, ours | speed over PEFT, same factor frozen | over "
        "PEFT default | over ours without oneDNN "
        "| MiB kept for backward: ours, PEFT same factor, PEFT default "
        "|\n|---|---|---|---|---|---|---|---|"
    )
    for row in json.loads(RESULTS.read_text())["speed"]:
        print(_line(row))


def quantised_table() -> None:
    print("| base | phase | MiB of frozen weights | MiB kept for backward |\n|---|---|---|---|")
    for row in json.loads(RESULTS.read_text())["quantised"]:
        print(
            f"| {row['base']} | {row['phase']} | {row['weights'] / 2**20:,.1f} | "
            f"{row['kept'] / 2**20:,.1f} |"
        )


def _line(row: dict) -> str:
    held = ", ".join(
        f"{row[f'kept_{name}'] / 2**20:,.0f}" for name in ("ours", "peft_phase", "peft_default")
    )
    library = (
        f"{row['without_onednn_over_ours']:.2f} ×" if "without_onednn_over_ours" in row else "–"
    )
    return (
        f"| {row['model']} | {row['dtype']} | {row['phase']} | {row['tokens_per_second']:,.0f} | "
        f"{row['peft_over_ours_phase']:.2f} × | "
        f"{row['peft_over_ours_default']:.2f} × | {library} | {held} |"
    )


def quantised() -> list[dict]:
    """What bases take, and what a step keeps of them, on the Llama shape in fp32 activations."""
    import tempfile

    build, targets, batch, length = SHAPES["Llama-shaped"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        build().save_pretrained(folder)
        for kind in ("dense", "int8", "nf4"):
            asked = (
                None
                if kind == "dense"
                else hf.BitsAndBytesConfig(
                    load_in_8bit=kind == "int8",
                    load_in_4bit=kind == "nf4",
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=torch.float32,
                )
            )
            model = hf.AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=asked, dtype=torch.float32, device_map="cpu"
            )
            report = attach(model, LoRAConfig(rank=RANK, target_modules=targets))
            weights = sum(
                value.untyped_storage().nbytes()
                for layer in report.layers.values()
                for name, value in layer.state_dict().items()
                if "lora_" not in name
            )
            ids = torch.randint(5, 32_000, (batch, length))
            for phase in ("A", "B"):
                set_phase(model, phase)
                rows.append(
                    {
                        "base": kind,
                        "phase": phase,
                        "weights": weights,
                        "kept": kept(
                            lambda m=model, i=ids: losses(m, i, i).backward(), own_storages(model)
                        ),
                    }
                )
                print(
                    f"| {kind} | {phase} | {weights / 2**20:,.1f} | "
                    f"{rows[-1]['kept'] / 2**20:,.1f} |",
                    flush=True,
                )
    return rows


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
    for row in json.loads(RESULTS.read_text())["matmuls"]:
        M, K, N = row["sizes"]
        print(
            f"| {M}x{K}x{N} | {M * K * N / 2**20:,.2f} | {row['forward_us']:,.0f} | "
            f"{row['forward']:.2f} | {row['dx']:.2f} |"
        )


def attention_table() -> None:
    print("| dtype | tokens in a sequence | sdpa ms | eager / sdpa |\n|---|---|---|---|")
    for row in json.loads(RESULTS.read_text())["attention"]:
        print(
            f"| {row['dtype']} | {row['length']:,} | {row['sdpa_ms']:.1f} | "
            f"{row['eager_over_sdpa']:.2f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    given = parser.parse_args()
    result = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": hf.__version__,
        "matmuls": matmuls(99),
        "attention": attention(given.pairs),
        "quantised": quantised(),
        "speed": speed(given.pairs),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
