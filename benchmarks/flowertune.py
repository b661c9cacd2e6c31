"""What FlowerTune's four settings send: ours by the run's own rules, theirs by their program's.

    python -m benchmarks.flowertune      # writes results/flowertune.json and prints the table

Nothing is trained and nothing sent: the factors' shapes come from a Mistral-7B without weights, who
is drawn and who holds what from the rules that a server goes by (`rolora.run.traffic`).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as hf

from rolora import LoRAConfig, attach, config
from rolora.federated import compatibility, methods
from rolora.federated.layout import Layout
from rolora.recipes.flowertune import SETTINGS, YARDSTICK
from rolora.run import defaults
from rolora.run.traffic import predicted

RESULTS = Path(__file__).parent / "results" / "flowertune.json"
OURS = (("rolora", "bf16"), ("rolora", "int8"), ("fedavg", "bf16"), ("fedavg", "fp32"))


def mistral() -> hf.MistralForCausalLM:
    """Mistral-7B-v0.3's shapes, on the meta device."""
    shapes = hf.MistralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32768,
    )
    with torch.device("meta"):
        return hf.MistralForCausalLM(shapes)


def measure() -> list[dict]:
    """A row a setting: bytes both ways in all rounds, theirs and ours by method and wire dtype."""
    preset = config.resolve({}, preset="flowertune-general").adapter
    model, targets = mistral(), preset.target_modules.split(",")
    attach(model, LoRAConfig(rank=preset.rank, alpha=preset.alpha, target_modules=targets))
    layout = Layout.of(model)
    message = YARDSTICK.message_bytes([entry.shape for entry in layout.entries])
    found = []
    for name in SETTINGS:
        f = config.resolve({}, preset=name).federation
        row = {
            "setting": name,
            "clients": [f.clients, f.clients_per_round],
            "rounds": f.rounds,
            "theirs": 2 * f.rounds * f.clients_per_round * message,
        }
        for method, dtype in OURS:
            options = config.resolve({"method": method, "exchange_dtype": dtype}, preset=name)
            options = compatibility.settle(options)
            options = defaults.moments(options, everybody=False, room=True, fits=True)
            traffic = predicted(options, layout, methods.load(method))
            row[f"{method} {dtype}"] = [traffic.down, traffic.up]
        found.append(row)
    return found


def table() -> None:
    names = [f"{method}, {dtype}" for method, dtype in OURS]
    print(f"| preset | clients, a round | FlowerTune's own | {' | '.join(names)} |")
    print("|---|---|---|" + "---|" * len(names))
    for row in json.loads(RESULTS.read_text()):
        clients, drawn = row["clients"]
        ours = [row[f"{method} {dtype}"] for method, dtype in OURS]
        cells = [f"{down / 2**20:,.0f} + {up / 2**20:,.0f}" for down, up in ours]
        print(
            f"| `{row['setting']}` | {clients}, {drawn} | {row['theirs'] / 2**20:,.0f} | "
            f"{' | '.join(cells)} |"
        )


if __name__ == "__main__":
    RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    table()
