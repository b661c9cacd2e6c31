"""Options of the machine, and of the run and its folder."""

from __future__ import annotations

from dataclasses import dataclass

from rolora.config.options.declared import option


@dataclass(frozen=True)
class System:
    """System"""

    dtype: str = option(
        "auto",
        "of the frozen base; auto: bf16 on a GPU, fp32 on a CPU",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    quantize: str = option(
        "none",
        "store the frozen linears in 4 or 8 bits (bitsandbytes)",
        choices=("none", "nf4", "int8"),
    )
    attn: str = option(
        "auto",
        "attention implementation; auto: sdpa, but eager where the model has no other, and in 16 "
        "bits on a CPU up to --max-length 128",
        choices=("auto", "sdpa", "eager", "flash_attention_2"),
    )
    liger: bool = option(
        False,
        "Liger's kernels for norms, rotary embedding, gated activations and cross-entropy; GPU "
        "only",
    )
    base_sharding: bool = option(
        False,
        "under torchrun: the frozen base lies in parts on its processes, which train every client "
        "together",
    )
    gradient_checkpointing: bool = option(False, "recompute activations in backward")
    engine: str = option(
        "auto",
        "how one process trains its clients; auto: whichever a short measurement finds faster",
        choices=("auto", "sequential", "batched"),
    )
    cohort_chunk: int | None = option(
        None,
        "clients that --engine batched trains at a time; what fits into half of the free memory "
        "if not given",
        least=1,
    )
    cuda_graphs: str = option(
        "off",
        "capture a local step once for every length of batches, and repeat it as one launch; auto: "
        "where nothing forbids it",
        choices=("auto", "on", "off"),
    )
    backend: str = option("auto", "kernels", choices=("auto", "torch", "triton", "reference"))
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps", metavar="NAME")
    threads: int | None = option(None, "CPU threads", least=1, most=1024)


@dataclass(frozen=True)
class Run:
    """Run"""

    output_dir: str | None = option(None, "the run folder; runs/… if not given", metavar="DIR")
    eval_every: int = option(1, "rounds between evaluations", least=1)
    samples: int = option(
        0,
        "held-out prompts that the model continues at every evaluation, into samples.jsonl",
        least=0,
        most=10_000,
    )
    track: str | None = option(
        None,
        "where the numbers go besides the run folder: one or more of tensorboard, wandb, mlflow, "
        "trackio; none stops what a resumed run did",
        metavar="NAME,…",
    )
    track_project: str | None = option(
        None,
        "the trackers' project or experiment; theirs, or rolora, if not given",
        metavar="NAME",
    )
    checkpoint_every: int = option(1, "rounds between checkpoints", least=1)
    seed: int = option(0, "of everything random", least=0, most=2**63 - 1)
