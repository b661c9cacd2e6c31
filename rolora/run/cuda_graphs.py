"""Whether a run's local steps are CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rolora.cohort.batched import regroups
from rolora.config import Config
from rolora.errors import BadInput
from rolora.federated.backward import Backward
from rolora.federated.cuda_graphs import Graphs, Stream
from rolora.run.job import Job


def settled_for(config: Config, job: Job, say: Callable[[str], None]) -> Config:
    """The configuration with `--cuda-graphs` on or off. Raises BadInput where it was asked for and
    cannot be.
    """
    wanted = config.system.cuda_graphs
    if wanted == "off":
        return config
    reason = next(_reasons(config, job), None)
    if reason is None:
        say("cuda graphs: on")
        return config.with_values(cuda_graphs="on")
    if wanted == "on":
        raise BadInput(f"--cuda-graphs on: {reason}: use --cuda-graphs off")
    say(f"cuda graphs: off ({reason})")
    return config.with_values(cuda_graphs="off")


def _reasons(config: Config, job: Job) -> Iterator[str]:
    """Why local steps cannot be captured."""
    system = config.system
    if job.device.type != "cuda":
        yield f"{job.device} is no CUDA device"
    if system.engine == "batched":
        yield "the factors of clients that --engine batched trains lie elsewhere in every round"
    if system.base_sharding:
        yield "--base-sharding gathers weights while a step runs"
    if system.gradient_checkpointing:
        yield "--gradient-checkpointing asks for the random generator's state while a step runs"
    if system.attn == "flash_attention_2":
        yield "with --attn flash_attention_2 shapes move: padding is taken out of a batch"
    if job.report.experts or job.report.parameters or any(map(regroups, job.model.modules())):
        yield "shapes move in a mixture of experts: how many tokens an expert gets"


def backward(job: Job, say: Callable[[str], None]) -> Backward | None:
    """What makes gradients where graphs are on."""
    if job.config.system.cuda_graphs != "on":
        return None
    parameters = job.layout.trainable(job.model)
    return Graphs(job.model, job.recipe, parameters, Stream(job.device), say)
