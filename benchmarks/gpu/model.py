"""Whole models, forward and backward of a batch: eight layers of Llama-2-7B's width with adapters
on every linear, and a RoBERTa-large with adapters on query and value.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.gpu import contenders
from benchmarks.gpu.bench import Bench, Entry, Unit
from benchmarks.gpu.layer import peak
from benchmarks.gpu.sizes import Sizes
from benchmarks.layers import kept, own_storages
from rolora import LoRAConfig, attach, set_phase
from rolora_kernels import Plan, use_backend


@dataclass(frozen=True)
class Kind:
    """A model by its `make`, the names of the linears that get adapters, their rank, a batch, and
    where its embeddings are.
    """

    make: Callable[[], nn.Module]
    targets: str | list[str]
    rank: int
    batch: dict[str, Tensor]
    embeddings: Callable[[nn.Module], nn.Module]


def units(sizes: Sizes) -> Iterator[Unit]:
    for phase in ("B", "A"):
        for name in ("llama", "roberta"):
            run = partial(_model, kind=name, phase=phase, sizes=sizes)
            yield Unit(f"model {name} phase={phase}", run, limit=120)


def llama(sizes: Sizes, device: str) -> Kind:
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = torch.randint(0, sizes.llama["vocab_size"], sizes.tokens, device=device)
    return Kind(
        lambda: LlamaForCausalLM(LlamaConfig(use_cache=False, **sizes.llama)),
        "all-linear",
        sizes.rank,
        {"input_ids": ids, "labels": ids},
        lambda model: model.model.embed_tokens,
    )


def roberta(sizes: Sizes, device: str) -> Kind:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(num_labels=2, max_position_embeddings=514, **sizes.roberta)
    ids = torch.randint(3, config.vocab_size, sizes.roberta_batch, device=device)
    labels = torch.randint(0, 2, sizes.roberta_batch[:1], device=device)
    return Kind(
        lambda: RobertaForSequenceClassification(config),
        ["query", "value"],
        8,
        {"input_ids": ids, "labels": labels},
        lambda model: model.roberta.embeddings.word_embeddings,
    )


KINDS = {"llama": llama, "roberta": roberta}


def _model(bench: Bench, kind: str, phase: str, sizes: Sizes) -> None:
    made = KINDS[kind](sizes, bench.device)
    tokens = made.batch["input_ids"].numel()
    shared: dict[str, nn.Module] = {}  # our model is one, whatever the plan

    def our_model() -> nn.Module:
        if "ours" not in shared:
            model = _built(made, bench.device)
            attach(model, LoRAConfig(rank=made.rank, alpha=32, target_modules=made.targets))
            set_phase(model, phase)
            shared["ours"] = model
        return shared["ours"]

    def entry(build: Callable[[], nn.Module], plan: Plan | None = None, autocast=False) -> Entry:
        model = build()

        def step(i: int = 0) -> Tensor:
            model.zero_grad(set_to_none=True)
            with (
                torch.autocast(bench.device, dtype=torch.bfloat16, enabled=autocast),
                use_backend(plan) if plan else nullcontext(),
            ):
                loss = model(**made.batch).loss
            loss.backward()
            return loss

        step()
        about = {"peak_bytes": peak(bench, step), "kept_bytes": kept(step, own_storages(model))}
        return Entry(step, about)

    makes: dict[str, Callable[[], Entry]] = {
        "frozen": lambda: entry(lambda: _built(made, bench.device)),
        "peft_default": lambda: entry(lambda: _peft(made, bench.device, None), autocast=True),
        "peft_phase": lambda: entry(lambda: _peft(made, bench.device, phase)),
    }
    for name, plan in contenders.plans().items():
        makes[f"ours {name}"] = partial(entry, our_model, plan)
    if bench.results.tuned:
        makes["ours"] = partial(entry, our_model)
    if kind == "llama":
        makes["ours, a run's loss"] = lambda: _run_entry(our_model(), made, bench)
    about = {"model": kind, "phase": phase, "tokens": tokens}
    times = bench.contest("model", makes, "peft_phase", rounds=7, inner=1, **about)
    for name, samples in times.items():
        rate = 1e3 * tokens / statistics.median(sample.ms for sample in samples)
        bench.add("tokens", name=name, tokens_a_second=rate, **about)


def _run_entry(model: nn.Module, made: Kind, bench: Bench) -> Entry:
    """Ours with the loss of a run's recipe, which makes no whole logits."""
    from rolora.recipes import Batch
    from rolora.recipes.spans import token_losses

    ids = made.batch["input_ids"]
    batch = Batch({"input_ids": ids}, ids, 1, len(ids), ids.numel())

    def step(i: int = 0) -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = token_losses(model, batch).mean()
        loss.backward()
        return loss

    step()
    return Entry(
        step, {"peak_bytes": peak(bench, step), "kept_bytes": kept(step, own_storages(model))}
    )


def _built(made: Kind, device: str) -> nn.Module:
    """A frozen model of random weights, whose activations have gradients from the first layer
    on.
    """
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = made.make()
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    made.embeddings(model).register_forward_hook(lambda m, i, o: o.requires_grad_())
    return model


def _peft(made: Kind, device: str, phase: str | None) -> nn.Module:
    """PEFT on the same model: fp32 factors that both train, or bf16 ones of which one does."""
    import peft

    config = peft.LoraConfig(r=made.rank, lora_alpha=32, target_modules=made.targets)
    model = peft.get_peft_model(_built(made, device), config, autocast_adapter_dtype=phase is None)
    for name, parameter in model.named_parameters():
        wanted = "lora_" if phase is None else f"lora_{phase}"
        parameter.requires_grad_(wanted in name)
    return model
