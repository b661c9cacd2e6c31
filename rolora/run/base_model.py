"""The base model that a configuration names, on its device, with new factors or a saved adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from rolora import builtin
from rolora.adapter.attach import AttachReport, attach
from rolora.adapter.configuration import LoRAConfig
from rolora.adapter.files import read_adapter_for
from rolora.adapter.frozen import speed_up
from rolora.adapter.loading import load_adapter
from rolora.adapter.peft_config import lora_config
from rolora.config import Config, parse_layers, parse_parameters, parse_targets
from rolora.errors import BadInput
from rolora.hf import architecture, machine, models, precision, reading


def name_of(config: Config) -> str:
    """The hub id or folder: the built-in model's where none is named."""
    return config.data.model or str(builtin.MODEL)


def settle(config: Config, hf_config) -> Config:
    """The configuration with the machine's part of it resolved: threads, device, dtype, and the
    attention that the model has.

    Sets the number of threads of this process.
    """
    system = config.system
    if system.threads is not None:
        torch.set_num_threads(system.threads)
    device = machine.pick_device(system.device)
    dtype = precision.pick_dtype(system.dtype, device)
    return config.with_values(
        threads=torch.get_num_threads(),
        device=str(device),
        dtype=precision.dtype_name(dtype),
        attn=machine.pick_attention(
            system.attn,
            device,
            dtype,
            config.task.max_length,
            architecture.has_fused_attention(hf_config),
        ),
    )


def read_config(config: Config):
    """transformers' configuration of the model."""
    reading.quieten()
    return reading.read_config(name_of(config), config.data.revision)


def require_positions(config: Config, hf_config) -> None:
    """Raises BadInput where --max-length is over what the model has positions for."""
    positions = architecture.positions(hf_config)
    if positions is not None and config.task.max_length > positions:
        raise BadInput(
            f"--max-length {config.task.max_length} is over the model's {positions} positions"
        )


def load_tokenizer(config: Config, hf_config):
    """The tokenizer; it tells two texts apart only where the model does."""
    tokenizer = reading.load_tokenizer(name_of(config), config.data.revision)
    if getattr(hf_config, "type_vocab_size", 0) < 2:
        known = tokenizer.model_input_names
        tokenizer.model_input_names = [name for name in known if name != "token_type_ids"]
    return tokenizer


def load(
    config: Config,
    hf_config,
    tokenizer,
    labels: list[str] | None,
    how: Callable[..., models.Loaded] = models.load_model,
) -> models.Loaded:
    """The frozen model of a configuration that is settled, a classifier where there are labels."""
    system = config.system
    return how(
        name_of(config),
        hf_config,
        tokenizer,
        labels=labels,
        dtype=precision.DTYPES[system.dtype],
        # Where it is cut into parts it is never whole on a device.
        device=torch.device("cpu" if system.base_sharding else system.device),
        attn=system.attn,
        seed=config.run.seed,
        revision=config.data.revision,
        quantize=system.quantize,
        liger=system.liger,
    )


def load_adapted(
    config: Config, hf_config, tokenizer, adapter: str | None, labels: list[str] | None
) -> nn.Module:
    """The model with a saved adapter, or bare, ready to evaluate."""
    loaded = load(config, hf_config, tokenizer, labels)
    if adapter is not None:
        try:
            precision.keep_in_fp32(loaded.model, loaded.new_heads)
            load_adapter(loaded.model, adapter)
        except ValueError as error:
            raise BadInput(str(error)) from None
    speed_up(loaded.model)
    return loaded.model.eval()


def attach_factors(config: Config, loaded: models.Loaded) -> tuple[AttachReport, Config]:
    """Factors on the model; the configuration comes back with what --init-adapter decides."""
    heads = _heads(config, loaded)
    try:
        lora = _asked(config, loaded, heads)
        if config.adapter.init_adapter is not None:
            lora, config = _taken(config, config.adapter.init_adapter, loaded.model, heads)
        precision.keep_in_fp32(loaded.model, lora.modules_to_save)
        report = attach(loaded.model, lora, seed=config.run.seed)
        if config.adapter.init_adapter is None:
            _refuse_wasted_rank(report)
        else:
            load_adapter(loaded.model, config.adapter.init_adapter)
    except ValueError as error:
        raise BadInput(str(error)) from None
    return report, config


def _refuse_wasted_rank(report: AttachReport) -> None:
    """Raises ValueError for a rank above a matrix's smaller side, which only costs messages."""
    for path, layer in report.layers.items():
        smaller = min(layer.in_features, layer.out_features)
        what = "linear" if path not in report.parameters else f"matrix of {path}"
        if layer.rank > smaller:
            raise ValueError(
                f"rank {layer.rank} does not fit a {layer.out_features}x{layer.in_features} "
                f"{what}: give 1 to {smaller}"
            )


def _heads(config: Config, loaded: models.Loaded) -> tuple[str, ...]:
    """The heads that train: new ones unless that is switched off, others where it is asked."""
    wanted = config.adapter.train_head
    if wanted and not loaded.new_heads:
        found = architecture.heads(loaded.model)
        if not found:
            raise BadInput("--train-head: this model has no classification head")
        loaded.new_heads = found
    return () if wanted is False else tuple(loaded.new_heads)


def _asked(config: Config, loaded: models.Loaded, heads: tuple[str, ...]) -> LoRAConfig:
    a = config.adapter
    return LoRAConfig(
        rank=a.rank,
        alpha=a.alpha,
        target_modules=parse_targets(a.target_modules),
        target_parameters=parse_parameters(a.target_parameters),
        layers=_layers(a.layers, loaded),
        dropout=a.dropout,
        rslora=a.rslora,
        modules_to_save=heads,
        init=a.init,
    )


def _layers(text: str | None, loaded: models.Loaded) -> tuple[int, ...] | None:
    found = parse_layers(text, architecture.blocks(loaded.model.config))
    if text is not None and found is None:
        raise BadInput(
            f"--layers {text!r}: the model's configuration does not say how many blocks it has: "
            "give their indices, such as 18-23"
        )
    return found


def _taken(
    config: Config, adapter: str, model: nn.Module, heads: tuple[str, ...]
) -> tuple[LoRAConfig, Config]:
    """What a PEFT folder that is started from says of ranks and targets, and the configuration
    with it.
    """
    taken = lora_config(*read_adapter_for(model, adapter))
    lora = LoRAConfig(
        rank=taken.rank,
        alpha=taken.alpha,
        target_modules=taken.target_modules,
        target_parameters=taken.target_parameters,
        rslora=taken.rslora,
        dropout=config.adapter.dropout,
        modules_to_save=_paths(model, (*heads, *taken.modules_to_save)),
        rank_pattern=taken.rank_pattern,
        alpha_pattern=taken.alpha_pattern,
    )
    return lora, config.with_values(
        rank=taken.rank,
        alpha=float(taken.alpha),
        rslora=taken.rslora,
        layers=None,
        target_modules=",".join(sorted(taken.target_modules)) or "none",
        target_parameters=",".join(taken.target_parameters) or None,
    )


def _paths(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The paths that end with one of `names`, without those inside another of them."""
    found: list[str] = []
    for path, _ in model.named_modules():  # what holds others comes before them
        named = any(f".{path}".endswith(f".{name}") for name in names)
        if path and named and not path.startswith(tuple(f"{outer}." for outer in found)):
            found.append(path)
    return tuple(found)
