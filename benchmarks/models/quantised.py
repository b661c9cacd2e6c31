"""What a dense, an int8 and an NF4 base take, and what a step keeps for backward on each."""

from __future__ import annotations

import tempfile

import torch
import transformers as hf

from benchmarks.layers import kept, own_storages
from benchmarks.models import results
from benchmarks.models.shapes import RANK, SHAPES, losses
from rolora import LoRAConfig, attach, set_phase


def measured() -> list[dict]:
    """A row for every base and phase, on the Llama shape in fp32 activations."""
    build, targets, batch, length = SHAPES["Llama-shaped"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        build().save_pretrained(folder)
        for kind in ("dense", "int8", "nf4"):
            model = hf.AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=_asked(kind), dtype=torch.float32, device_map="cpu"
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

                def step(model=model, ids=ids):
                    losses(model, ids, ids).backward()

                held = kept(step, own_storages(model))
                rows.append({"base": kind, "phase": phase, "weights": weights, "kept": held})
                print(_line(rows[-1]), flush=True)
    return rows


def _asked(kind: str) -> hf.BitsAndBytesConfig | None:
    if kind == "dense":
        return None
    return hf.BitsAndBytesConfig(
        load_in_8bit=kind == "int8",
        load_in_4bit=kind == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def table() -> None:
    print("| base | phase | MiB of frozen weights | MiB kept for backward |\n|---|---|---|---|")
    for row in results.rows("quantised"):
        print(_line(row))


def _line(row: dict) -> str:
    return (
        f"| {row['base']} | {row['phase']} | {row['weights'] / 2**20:,.1f} | "
        f"{row['kept'] / 2**20:,.1f} |"
    )
