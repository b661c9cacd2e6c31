"""An adapter added to its base: a whole model in transformers' files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rolora import atomic, config
from rolora.adapter.attach import detach
from rolora.adapter.model import merge
from rolora.errors import BadInput
from rolora.exporting.source import Adapter, new_folder
from rolora.hf import architecture, precision
from rolora.hf.license import license_of
from rolora.run import adapter_folder, base_model, card
from rolora.run.adapter_folder import Kept


def write(
    adapter: Adapter,
    folder: Path,
    model: str | None = None,
    dtype: str | None = None,
    quantize: str = "none",
    dequantize: bool = False,
    shard: str = "5GB",
) -> None:
    """Writes the merged model, its tokenizer with the chat template, and the generation's
    configuration, in files of at most `shard`.

    Raises BadInput for a base whose files are quantised, unless `dequantize`, and for a disk that
    is too full; nothing is left of the folder then.
    """
    name = adapter.base(model)
    settled = config.check(
        config.Config().with_values(model=name, quantize=quantize, device="cpu", max_length=8)
    )
    hf_config = base_model.read_config(settled)
    _refuse_quantised(name, hf_config, dequantize)
    settled = settled.with_values(dtype=dtype or _own_dtype(hf_config))
    settled = base_model.settle(settled, hf_config)
    kept = adapter_folder.read(adapter.folder)
    labels = _labels(adapter, kept, hf_config)
    tokenizer = base_model.load_tokenizer(settled, hf_config)
    made: Any = base_model.load_adapted(settled, hf_config, tokenizer, str(adapter.folder), labels)
    lost = merge(made, keep_base=False)
    detach(made, merge=True)
    precision.make_dense(made, precision.DTYPES[settled.system.dtype])
    with new_folder(folder, architecture.weight_bytes(made, "none")) as place:
        made.save_pretrained(place, max_shard_size=shard)
        tokenizer.save_pretrained(place)
        adapter_folder.copy_tokenizer(adapter.folder, place)
        facts = None if kept is None else kept.facts
        text = card.text(name, labels, facts, merged=True, license=license_of(name))
        atomic.write_text(place / adapter_folder.CARD, text)
    print(
        f"{folder}: merged in {settled.system.dtype}; rounding lost {max(lost.values()):.2g} of "
        f"the change in the worst of {len(lost)} modules"
    )
    if kept is not None:
        _say_of_training(kept.options.get("quantize", "none"), quantize)


def _refuse_quantised(name: str, hf_config: Any, dequantize: bool) -> None:
    stored = architecture.quantized_as(hf_config)
    if stored is not None and not dequantize:
        raise BadInput(
            f"--to merged: the files of {name} are quantised: add --dequantize, which writes them "
            "dense, or name the original with --model"
        )
    if stored is None and dequantize:
        raise BadInput(f"--dequantize: the files of {name} are not quantised: leave it out")


def _own_dtype(hf_config: Any) -> str:
    """The dtype that the base is stored in; fp32 where it says none that is known here."""
    said = getattr(hf_config, "dtype", None) or getattr(hf_config.get_text_config(), "dtype", None)
    known = {str(value).removeprefix("torch."): key for key, value in precision.DTYPES.items()}
    return known.get(str(said).removeprefix("torch."), "fp32")


def _say_of_training(trained: str, quantize: str) -> None:
    """That the base was stored otherwise in training, where it was."""
    if trained != "none" and quantize == "none":
        print(
            f"trained on a base in {trained}, merged into the base as its files are: --quantize "
            f"{trained} merges into what it was trained on"
        )


def _labels(adapter: Adapter, kept: Kept | None, base: Any) -> list[str] | None:
    """A classifier's classes, from our own file, or else so many as its head has outputs: under
    the base's names, where it has as many, or transformers' own. `base`: its configuration.
    """
    if kept is not None:
        return kept.labels
    if adapter.stored.get("task_type") != "SEQ_CLS":
        return None
    named = [str(base.id2label[number]) for number in sorted(base.id2label)]
    heads = [
        value.shape[0]
        for key, value in adapter.tensors.items()
        if ".lora_" not in key and key.endswith(".weight") and value.dim() == 2
    ]
    if not heads or min(heads) == len(named):
        return named
    return [f"LABEL_{number}" for number in range(min(heads))]
