"""`python -m rolora.export`: an adapter as serving stacks want it, merged, or on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rolora import cli
from rolora.errors import BadInput

TARGETS = ("peft", "vllm", "merged", "gguf-lora", "hub")
HELP = """Writes an adapter folder anew: for PEFT, vLLM or llama.cpp, merged into the base model, or
to the Hugging Face hub.

--to peft keeps everything, in another dtype where one is given. --to vllm checks what its loader
takes: one rank and one scaling for
all modules (--bake makes it so), no saved heads. --to merged writes a whole model and says what
rounding lost. --to gguf-lora writes llama.cpp's file for --lora. --to hub uploads an adapter, or
a folder that --to merged or --to gguf-lora wrote."""
FLAGS = [
    cli.Flag(
        ["--adapter"],
        metavar="DIR",
        required=True,
        group="Export",
        help="a PEFT folder, such as RUN/adapter",
    ),
    cli.Flag(
        ["--to", "target"],
        metavar="|".join(TARGETS),
        default="peft",
        group="Export",
        help="[peft]",
    ),
    cli.Flag(
        ["--output-dir", "output"],
        metavar="DIR",
        group="Export",
        help="a new or empty folder; all but hub need it",
    ),
    cli.Flag(
        ["--bake"],
        is_flag=True,
        group="Export",
        help="peft, vllm: one rank (zeros beyond a module's own) and a scaling of 1 (inside B)",
    ),
    cli.Flag(
        ["--model"],
        metavar="ID|DIR",
        group="Export",
        help="the base, where the adapter names none or another; hub: its id there",
    ),
    cli.Flag(
        ["--dtype"],
        metavar="fp32|bf16|fp16",
        group="Export",
        help="of what is written  [fp32; merged: the base's]",
    ),
    cli.Flag(
        ["--quantize"],
        metavar="none|nf4|int8",
        group="Export",
        help="merged: the storage that the base had in training; written dense",
    ),
    cli.Flag(
        ["--dequantize"],
        is_flag=True,
        group="Export",
        help="merged: take a base whose files are quantised, and write it dense",
    ),
    cli.Flag(
        ["--max-shard-size", "shard"],
        metavar="SIZE",
        group="Export",
        help="merged: the most bytes of a file of weights, such as 500MB  [5GB]",
    ),
    cli.Flag(["--repo-id"], metavar="OWNER/NAME", group="Hub", help="where it goes"),
    cli.Flag(["--private"], is_flag=True, group="Hub", help="only you can see it"),
    cli.Flag(["--commit-message"], metavar="TEXT", group="Hub", help="[Upload with RoLoRA]"),
    cli.Flag(
        ["--dry-run"],
        is_flag=True,
        group="Hub",
        help="list what would go where, without network, and stop",
    ),
]
# What each target has a use for; every one needs --adapter.
_TAKES = {
    "peft": {"output", "bake", "dtype"},
    "vllm": {"output", "bake", "dtype"},
    "merged": {"output", "model", "dtype", "quantize", "dequantize", "shard"},
    "gguf-lora": {"output", "model", "dtype"},
    "hub": {"bake", "model", "dtype", "repo_id", "private", "commit_message", "dry_run"},
}
_CHOICES = {
    "target": TARGETS,
    "dtype": ("fp32", "bf16", "fp16"),
    "quantize": ("none", "nf4", "int8"),
}

_SIZE = re.compile(r"[1-9]\d*(\.\d+)?\s*[KMGT]i?B", re.IGNORECASE)


def export(adapter: str, target: str, **given: Any) -> None:
    given = {name: value for name, value in given.items() if value not in (None, False)}
    _check(target, given)
    folder = Path(given.get("output", ""))
    if target != "hub" and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"--output-dir {folder} holds other files: give a new or empty folder")
    options = {name: value for name, value in given.items() if name != "output"}
    if target == "hub":
        from rolora.exporting import hub

        hub.upload(Path(adapter), **options)
        return
    from rolora.exporting import source

    found = source.read(Path(adapter))
    if target == "merged":
        from rolora.exporting import merged

        merged.write(found, folder, **options)
    elif target == "gguf-lora":
        from rolora.exporting import gguf_lora

        gguf_lora.write(found, folder, **options)
    else:
        from rolora.exporting import plain

        plain.write(found, folder, for_vllm=target == "vllm", **options)


def _check(target: str, given: dict[str, Any]) -> None:
    """Raises BadInput for a value that is none of its option's, and for an option that the target
    has no use for.
    """
    for name, known in _CHOICES.items():
        value = target if name == "target" else given.get(name, known[0])
        if value not in known:
            raise BadInput(f"{_flag(name)} {value!r} is not one of {', '.join(known)}")
    for name in given:
        if name not in _TAKES[target]:
            users = ", ".join(to for to in TARGETS if name in _TAKES[to])
            raise BadInput(f"{_flag(name)} says nothing to --to {target}: it goes with {users}")
    size = given.get("shard", "5GB")
    if not _SIZE.fullmatch(size):
        raise BadInput(f"--max-shard-size {size!r}: expected a size such as 500MB or 5GB")
    needed = "repo_id" if target == "hub" else "output"
    if needed not in given:
        raise BadInput(f"--to {target} needs {_flag(needed)}")


def _flag(name: str) -> str:
    known = {"target": "--to", "output": "--output-dir", "shard": "--max-shard-size"}
    return known.get(name, "--" + name.replace("_", "-"))


command = cli.command("export", HELP, FLAGS, export)

if __name__ == "__main__":
    cli.run(command)
