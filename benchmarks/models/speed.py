"""Tokens a second beside PEFT, and what is kept for backward.

A step is forward, loss and backward, ours as a run prepares its model. PEFT as a user has it trains
both factors (fp32 factors, autocast on a 16-bit base, attention as transformers chooses it); "same
factor frozen" has factors in the base's dtype, `requires_grad=False` on the one that rests, and our
attention. Contenders take turns in one process, a process a row; ratios are medians over pairs. In
fp32 ours runs a second time with oneDNN switched off: what is left is the engine's own share.
"""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import statistics
from concurrent import futures

import peft
import torch

from benchmarks.interleave import interleaved, ratio
from benchmarks.layers import kept, own_storages
from benchmarks.models import results
from benchmarks.models.shapes import RANK, SHAPES, losses
from rolora import LoRAConfig, attach, set_phase
from rolora.adapter.frozen import speed_up
from rolora.hf.machine import pick_attention


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
    if dtype == torch.float32:
        steps["without_onednn"] = switched_off
    return steps, own_storages(ours, phased, default)


def measured(pairs: int) -> list[dict]:
    """A row for every shape, dtype and phase, each in a process of its own, as a run is: in a
    process that has held other models the allocator's state decides by up to a sixth.
    """
    rows, spawn = [], multiprocessing.get_context("spawn")
    for case in itertools.product(SHAPES, ("float32", "bfloat16"), ("B", "A", "BOTH")):
        with futures.ProcessPoolExecutor(1, spawn) as process:
            rows.append(process.submit(row, *case, pairs).result())
        print(_line(rows[-1]), flush=True)
    return rows


def row(shape: str, dtype: str, phase: str, pairs: int) -> dict:
    _, _, batch, length = SHAPES[shape]
    steps, own = contenders(shape, getattr(torch, dtype), phase)
    times = interleaved(steps, pairs)
    found = {
        "model": shape,
        "dtype": dtype,
        "phase": phase,
        "tokens_per_second": batch * length / statistics.median(times["ours"]),
        "peft_over_ours_phase": ratio(times, "peft_phase", "ours"),
        "peft_over_ours_default": ratio(times, "peft_default", "ours"),
    }
    if "without_onednn" in times:
        found["without_onednn_over_ours"] = ratio(times, "without_onednn", "ours")
    for name in ("ours", "peft_phase", "peft_default"):
        found[f"kept_{name}"] = kept(steps[name], own)
    return found


def table() -> None:
    print(
        "| model | dtype | phase | tokens/s, ours | speed over PEFT, same factor frozen | over "
        "PEFT default | over ours without oneDNN "
        "| MiB kept for backward: ours, PEFT same factor, PEFT default "
        "|\n|---|---|---|---|---|---|---|---|"
    )
    for row in results.rows("speed"):
        print(_line(row))


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
