"""`python -m rolora.export`: an adapter as serving stacks want it, or merged into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rolora import atomic, cli, config
from rolora.errors import BadInput
from rolora.run import adapter_folder

HELP = """Writes an adapter folder anew: for PEFT, for vLLM, or merged into the base model.

--to peft keeps everything, in another dtype where one is given. --to vllm checks what its loader
takes: one rank and one scaling for
all modules (--bake makes it so), no saved heads. --to merged writes a whole model and says what
rounding lost."""
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
        metavar="peft|vllm|merged",
        default="peft",
        group="Export",
        help="[peft]",
    ),
    cli.Flag(
        ["--output-dir", "output"],
        metavar="DIR",
        required=True,
        group="Export",
        help="a new or empty folder",
    ),
    cli.Flag(
        ["--bake"],
        is_flag=True,
        group="Export",
        help="one rank (zeros beyond a module's own) and a scaling of 1 (inside B)",
    ),
    cli.Flag(
        ["--model"],
        metavar="ID|DIR",
        group="Export",
        help="merged: the base; the adapter's own if not given",
    ),
    cli.Flag(
        ["--dtype"],
        metavar="fp32|bf16|fp16",
        default="fp32",
        group="Export",
        help="of what is written  [fp32]",
    ),
    cli.Flag(
        ["--quantize"],
        metavar="none|nf4|int8",
        default="none",
        group="Export",
        help="merged: the storage that the base had in training; written dense",
    ),
]


def export(
    adapter: str, target: str, output: str, bake: bool, model: str | None, dtype: str, quantize: str
) -> None:
    for flag, value, known in (
        ("--to", target, ("peft", "vllm", "merged")),
        ("--dtype", dtype, ("fp32", "bf16", "fp16")),
        ("--quantize", quantize, ("none", "nf4", "int8")),
    ):
        if value not in known:
            raise BadInput(f"{flag} {value!r} is not one of {', '.join(known)}")
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"--output-dir {folder} holds other files: give a new or empty folder")
    from rolora.adapter.files import CONFIG_FILE, read_adapter, write_adapter

    try:
        stored, tensors = read_adapter(adapter)
    except ValueError as error:
        raise BadInput(f"--adapter {error}") from None
    if target == "merged":
        _merged(stored, tensors, adapter, folder, model, dtype, quantize)
        return
    stacks = stored.get("target_parameters")
    if stacks and (bake or target == "vllm"):
        raise BadInput(
            f"{'--bake' if bake else '--to vllm'}: this adapter has factors of parameters "
            f"({', '.join(stacks)}), which is done for those of linears alone: use --to merged"
        )
    if bake:
        stored, tensors = baked(stored, tensors)
    if target == "vllm":
        _check_vllm(stored)
    from rolora.hf.precision import DTYPES

    base = stored.get("base_model_name_or_path")
    if base:
        stored["base_model_name_or_path"] = adapter_folder.named_from_anywhere(Path(adapter), base)
    write_adapter(folder, stored, tensors, DTYPES[dtype])
    adapter_folder.copy(Path(adapter), folder)
    print(
        f"{folder / CONFIG_FILE}: rank {stored['r']}, alpha {stored['lora_alpha']:g}, "
        f"{len(tensors)} tensors in {dtype}"
    )


def baked(stored: dict, tensors: dict) -> tuple[dict, dict]:
    """The same adapter with one rank for all modules and alpha equal to it, so that nothing is
    scaled when it is used.
    """
    import torch

    from rolora.adapter.peft_config import lora_config
    from rolora.adapter.tensors import PREFIX, adapted_names

    said, rslora = lora_config(stored, tensors), bool(stored.get("use_rslora"))
    names = adapted_names(tensors)
    rank, made = max(said.of(name)[0] for name in names), dict(tensors)
    for name in names:
        own, alpha = said.of(name)
        A, B = (tensors[f"{PREFIX}{name}.lora_{factor}.weight"].float() for factor in "AB")
        made[f"{PREFIX}{name}.lora_A.weight"] = torch.cat([A, A.new_zeros(rank - own, A.shape[1])])
        made[f"{PREFIX}{name}.lora_B.weight"] = torch.cat(
            [B * (alpha / (own**0.5 if rslora else own)), B.new_zeros(B.shape[0], rank - own)], 1
        )
    return stored | {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
    }, made


def _check_vllm(stored: dict) -> None:
    """What vLLM's loader refuses (its PEFTHelper and LoRA model): patterns, whole modules, DoRA,
    biases.
    """
    if stored.get("rank_pattern") or stored.get("alpha_pattern"):
        raise BadInput(
            "--to vllm: this adapter has ranks or alphas of single modules, of which vLLM takes "
            "one for all: add --bake"
        )
    if stored.get("modules_to_save"):
        raise BadInput(
            f"--to vllm: this adapter saves {', '.join(stored['modules_to_save'])} whole, which "
            "vLLM does not load: use --to merged"
        )


def _labels(stored: dict, tensors: dict, adapter: Path, base) -> list[str] | None:
    """A classifier's classes, from our own file, or else so many as its head has outputs: under
    the base's names, where it has as many, or transformers' own. `base`: its configuration.
    """
    kept = adapter_folder.read(adapter)
    if kept is not None:
        return kept.labels
    if stored.get("task_type") != "SEQ_CLS":
        return None
    named = [str(base.id2label[number]) for number in sorted(base.id2label)]
    heads = [
        value.shape[0]
        for key, value in tensors.items()
        if ".lora_" not in key and key.endswith(".weight") and value.dim() == 2
    ]
    if not heads or min(heads) == len(named):
        return named
    return [f"LABEL_{number}" for number in range(min(heads))]


def _merged(
    stored: dict,
    tensors: dict,
    adapter: str,
    folder: Path,
    model: str | None,
    dtype: str,
    quantize: str,
) -> None:
    name, base = model, stored.get("base_model_name_or_path")
    if name is None and base is None:
        raise BadInput("the adapter does not name its base: give --model")
    if name is None:
        name = adapter_folder.find_base(Path(adapter), str(base))
    from rolora.adapter.attach import detach
    from rolora.adapter.model import merge
    from rolora.hf import precision
    from rolora.run import base_model

    settled = config.check(
        config.Config().with_values(
            model=name, dtype=dtype, quantize=quantize, device="cpu", max_length=8
        )
    )
    hf_config = base_model.read_config(settled)
    settled = base_model.settle(settled, hf_config)
    labels = _labels(stored, tensors, Path(adapter), hf_config)
    tokenizer = base_model.load_tokenizer(settled, hf_config)
    made: Any = base_model.load_adapted(settled, hf_config, tokenizer, adapter, labels)
    lost = merge(made, keep_base=False)
    detach(made, merge=True)
    precision.make_dense(made, precision.DTYPES[dtype])
    with atomic.new_folder(folder) as place:
        made.save_pretrained(place)
        tokenizer.save_pretrained(place)
    print(
        f"{folder}: merged in {dtype}; rounding lost {max(lost.values()):.2g} of the change in the "
        f"worst of {len(lost)} modules"
    )


command = cli.command("export", HELP, FLAGS, export)

if __name__ == "__main__":
    cli.run(command)
