"""The plan that is printed before a run: what will be trained, exchanged and kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rolora.adapter.adapted import Adapted
from rolora.adapter.attach import AttachReport
from rolora.adapter.coverage import stacks
from rolora.config import Config
from rolora.federated import control_variates
from rolora.federated.methods import Method
from rolora.hf import architecture, models, sharding
from rolora.run import asynchrony, base_model, masked, members, private, traffic
from rolora.run.job import Job
from rolora.run.memory import carried_bytes, left_bytes
from rolora_kernels.codecs import CODECS


def details(job: Job, method: Method) -> list[tuple[str, str]]:
    """(name, text) of the lines that only --dry-run prints."""
    sizes = job.layout.sizes.items()
    in_kib = [f"{kind}: {4 * size / 1024:,.0f} KiB" for kind, size in sizes]
    return [
        ("factors in fp32", ", ".join(in_kib)),
        ("memory", _memory(job, method)),
        *traffic.rows(job, method),
        ("adapted modules", ", ".join((*job.report.replaced, *job.report.parameters))),
    ]


def rows(job: Job, method: Method, ends: tuple[int, int] | None = None) -> list[tuple[str, str]]:
    """(name, text) of every line that a run prints too.

    ends: the round that the run ends with, and what it will have released by then, where it goes on
    and rounds that ran again have been charged.
    """
    config = job.config
    found = [
        ("model", _model(job)),
        ("adapted", _adapted(job)),
        ("trained", _trained(job, method)),
        ("exchange", _exchange(job, method)),
        ("clients", _clients(job)),
        *_examples(job),
    ]
    if config.optimisation.optimizer == "adamw":
        found.append(("moments", _moments(job)))
    if config.optimisation.control_variates:
        found.append(("control variates", _control_variates(job)))
    if config.exchange.error_feedback:
        found.append(("error feedback", _error_feedback(job)))
    found.append(("rounds", _rounds(config)))
    if config.federation.membership is not None:
        found.append(("members", members.text(config)))
    if config.asynchrony.client_speeds is not None:
        found.append(("simulated clock", asynchrony.clock_text(job)))
    if config.asynchrony.buffer is not None:
        found.append(("asynchronous", asynchrony.text(config)))
    if config.privacy.dp_clip is not None:
        found.append(("privacy", private.text(config, *(ends or (config.federation.rounds, None)))))
    if config.privacy.secure_aggregation:
        most = max(size for _, size in _travelling(job, method))
        found.append(("masked sums", masked.text(config, most)))
    return found


def _model(job: Job) -> str:
    config, system = job.config, job.config.system
    name = base_model.name_of(config) if config.data.model else "built-in"
    text = f"{name}, {job.report.frozen_parameters:,} frozen parameters, {system.dtype}"
    stored = architecture.quantized_as(job.model.config, system.quantize)
    if stored is not None:
        text += f", base in {stored}"
        dense = sum(job.model.get_parameter(path).numel() for path in stacks(job.model))
        if dense:
            text += f", {dense:,} parameters of experts dense"
        if not models.has_bitsandbytes():
            text += " (read without bitsandbytes)"
    liger = getattr(job.model, "liger_kernels", ())
    if liger:
        text += f", Liger's {', '.join(liger)}"
    return f"{text} on {system.device}"


def _adapted(job: Job) -> str:
    report = job.report
    linears = [report.layers[path] for path in report.replaced]
    stacks = [report.layers[path] for path in report.parameters]
    adapted = []
    for kind, layers in (("linears", linears), ("parameters", stacks)):
        if layers:
            adapted.append(f"{len(layers)} {kind} ({_shapes(layers)})")
    text = f"{' and '.join(adapted)}, rank {job.config.adapter.rank}"
    if report.heads:
        text += f", head {', '.join(report.heads)} ({report.head_parameters:,})"
    text += f"; {report.unadapted_share:.0%} of the linear parameters are not adapted"
    if report.expert_parameters:
        share = report.expert_parameters / report.linear_parameters
        text += f", {share:.0%} in experts ({_rest(report)})"
    return text


def _shapes(layers: Iterable[Adapted]) -> str:
    """How many of each shape, `[experts]x[out]x[in]`."""
    counts: Counter[str] = Counter()
    for layer in layers:
        lead = layer.lora_A.shape[:-2]
        counts["x".join(map(str, (*lead, layer.out_features, layer.in_features)))] += 1
    return ", ".join(f"{count} of {shape}" for shape, count in counts.items())


def _rest(report: AttachReport) -> str:
    """The experts that no adapter reaches, and what would."""
    ends = dict.fromkeys(".".join(path.split(".")[-2:]) for path in report.experts)
    if report.parameters:
        return ", ".join(ends)
    return f"--target-parameters {','.join(ends)} adapts them"


def _travelling(job: Job, method: Method) -> list[tuple[str, int]]:
    """(phase, values that travel) of the first two rounds."""
    phases = [method.phase(number) for number in (1, 2)]
    return [(phase, job.layout.travelling_size(phase)) for phase in phases]


def _trained(job: Job, method: Method) -> str:
    rounds = enumerate(_travelling(job, method), 1)
    texts = [f"round {number}: {phase}, {size:,}" for number, (phase, size) in rounds]
    return f"{job.report.factor_parameters:,} factor parameters in all; {', '.join(texts)}"


def _exchange(job: Job, method: Method) -> str:
    dtype = job.config.exchange.exchange_dtype
    first = 4 * sum(job.layout.sizes.values())
    if job.config.privacy.secure_aggregation:
        return f"{dtype}, up as int64 under masks; first down {first:,}"
    up = dict.fromkeys(CODECS[dtype].bytes(size) for _, size in _travelling(job, method))
    texts = ", ".join(f"{size:,} bytes" for size in up)
    return f"{dtype}, {texts} up a client and round; first down {first:,}"


def _clients(job: Job) -> str:
    f, sizes = job.config.federation, [len(own) for own in job.clients]
    return (
        f"{f.clients}, {f.clients_per_round} a round, {min(sizes)} to {max(sizes)} examples each "
        f"({f.partition}), {len(job.evaluation)} to evaluate on"
    )


def _examples(job: Job) -> list[tuple[str, str]]:
    """What the recipe says of itself, and what was cut and dropped."""
    described = job.recipe.describe() if hasattr(job.recipe, "describe") else {}
    counted = [(name, tally.text()) for name, tally in job.tallies.items() if tally.text()]
    return [*described.items(), *counted]


def _moments(job: Job) -> str:
    o = job.config.optimisation
    follows = bool(o.realign_moments)
    size = carried_bytes(job.layout, len(job.clients), follows) / 2**20
    if o.carry_moments:
        follow = " and follow the factor that rests" * follows
        return f"AdamW's stay with the clients from round to round{follow}, {size:,.1f} MiB at most"
    return "AdamW starts anew in every round"


def _control_variates(job: Job) -> str:
    size = len(job.clients) * control_variates.kept_bytes(job.layout) / 2**20
    return f"clients keep where their steps went, {size:,.1f} MiB at most; nothing more is sent"


def _error_feedback(job: Job) -> str:
    framed = job.config.federation.hand_over is not None
    framed = framed and not job.config.optimisation.realign_moments  # which keeps them already
    size = left_bytes(job.layout, len(job.clients), framed) / 2**20
    return f"clients keep what rounding leaves of their changes, {size:,.1f} MiB at most"


def _rounds(config: Config) -> str:
    f = config.federation
    text = f"{f.rounds} of {f.method}, lr {config.optimisation.lr:g}"
    if f.aggregation != "mean":
        text += f", aggregated by {f.aggregation}"
    if f.hand_over is not None:
        text += f", factors handed over by {f.turning}"
    return text


def _memory(job: Job, method: Method) -> str:
    weights = architecture.weight_bytes(job.model, job.config.system.quantize)
    most = max(size for _, size in _travelling(job, method))
    if job.config.system.base_sharding:
        held, gathered = sharding.bytes_a_rank(job.model, sharding.count())
        return (
            f"a rank of {sharding.count()} holds {held / 2**20:,.1f} MiB of frozen weights and "
            f"gathers at most {gathered / 2**20:,.1f} MiB of them at a time; "
            f"{8 * most / 2**20:,.1f} MiB optimizer, activations beside"
        )
    return (
        f"{weights / 2**20:,.1f} MiB weights and factors, {8 * most / 2**20:,.1f} MiB optimizer, "
        "activations beside"
    )
