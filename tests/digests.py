"""Digests of trained adapters, for a change that must not change a bit: `python -m tests.digests
record|check [FILE]`.

`record` trains small federations (every method on three models, and the options that reach deep)
and writes the SHA-256 of each adapter's tensors. `check` trains them again and names the ones that
differ. Bits hold for one kind of CPU and one release of torch, which the file names; on another
machine record first on the commit before.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

FILE = Path(__file__).parent / "digests.json"
METHODS = ("rolora", "fedavg", "ffa", "flexlora", "fedsvd", "flora", "fedex", "fedsa", "lora-a2")
_SMALL = (
    "--rounds 4 --clients 4 --local-steps 2 --batch-size 4 --rank 4 --alpha 8 "
    "--engine sequential --threads 1 --device cpu --exchange-dtype bf16"
).split()
MODELS = {
    "builtin": "--eval-max-examples 16",
    "roberta": "--lr 5e-4 --model {roberta} --train-file {train} --eval-file {eval} --max-length 32 --attn "
    "eager",
    "llama": "--lr 5e-4 --model {llama} --train-file {train} --eval-file {eval} --task-type causal-lm "
    "--prompt-column prompt "
    "--response-column response --max-length 48 --attn eager",
}
OPTIONS = {
    "balance": "--balance",
    "carried": "--no-equal-factors",
    "local-coordinates": "--local-coordinates --no-carry-moments",
    "sgd": "--optimizer sgd --no-control-variates --lr 0.1",
    "dropout": "--dropout 0.1",
    "int8": "--exchange-dtype int8",
    "fp16": "--exchange-dtype fp16",
    "batched": "--engine batched",
    "batched-dropout": "--engine batched --dropout 0.1",
    "median": "--aggregation median",
    "momentum": "--server-momentum 0.5",
    "sampled": "--clients-per-round 2 --no-equal-factors",
    "new": "--no-carry-moments",
    "trimmed": "--aggregation trimmed-mean --trim-fraction 0.3",
    "flexlora-ranks": "--method flexlora --client-ranks 2,4",
    "lora-a2-ranks": "--method lora-a2 --client-ranks 1,2",
    "flora-ranks": "--method flora --client-ranks 1,2",
    "clip": "--dp-clip 0.5 --dp-noise 0",
    "pissa": "--init pissa",
    "orthogonal": "--init orthogonal",
    "linears": "--target-modules all-linear",
    "weights": "--max-weight 20 --partition dirichlet",
    "triton": "--backend reference",
    "schedule": "--schedule BBA --lr-schedule cosine",
    "accumulation": "--gradient-accumulation 2",
    "uniform": "--weighting uniform",
    "shards": "--partition shards",
    "checkpointing": "--gradient-checkpointing",
}


def jobs() -> dict[str, str]:
    """Name → flags: every method on every model, and every option on the RoBERTa; some on the Llama
    too.
    """
    found = {
        f"{model}/{method}": f"{flags} --method {method}"
        for model, flags in MODELS.items()
        for method in METHODS
    }
    found |= {
        f"roberta/{name}": f"{MODELS['roberta']} {flags}"
        for name, flags in OPTIONS.items()
        if name != "checkpointing"
    }
    found |= {
        f"llama/{name}": f"{MODELS['llama']} {OPTIONS[name]}"
        for name in ("batched", "dropout", "linears", "int8", "checkpointing")
    }
    return found


def digest(folder: Path) -> str:
    """Of every adapter in a run folder: names, shapes and bytes of its tensors."""
    from safetensors.torch import load_file

    sha = hashlib.sha256()
    for path in sorted(folder.glob("adapter/**/*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            sha.update(
                f"{path.relative_to(folder)} {name} {list(tensor.shape)} {tensor.dtype}".encode()
            )
            sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def measure() -> dict[str, str]:
    """The digest of every job."""
    from rolora.train import command
    from tests.models import make_files

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder))
        for number, (name, flags) in enumerate(jobs().items()):
            out = Path(folder) / f"run-{number}"
            words = [*_SMALL, *flags.format(**files).split(), "--quiet", "--output-dir", str(out)]
            with contextlib.redirect_stdout(io.StringIO()):
                command.main(words, standalone_mode=False)
            found[name] = digest(out)
            print(f"{name}: {found[name][:16]}", flush=True)
    return found


def machine() -> dict[str, str]:
    """What the bits depend on."""
    import torch

    rows = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = {name.strip(): value.strip() for name, _, value in (row.partition(":") for row in rows)}
    words = [f"{name} {cpu.get(name, '?')}" for name in ("model name", "cpu family", "model")]
    return {"cpu": ", ".join(words), "torch": torch.__version__}


def main(verb: str, path: str = str(FILE)) -> int:
    found = {"machine": machine(), "adapters": measure()}
    if verb == "record":
        Path(path).write_text(json.dumps(found, indent=1) + "\n")
        return 0
    recorded = json.loads(Path(path).read_text())
    if recorded["machine"] != found["machine"]:
        print(f"recorded on {recorded['machine']}, run on {found['machine']}: bits may differ")
    other = [
        name for name, value in recorded["adapters"].items() if found["adapters"].get(name) != value
    ]
    print(
        f"{len(recorded['adapters']) - len(other)} of {len(recorded['adapters'])} adapters are "
        f"bit-identical; others: {other}"
    )
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
