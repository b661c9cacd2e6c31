"""One command for a machine with a GPU: checks, times, tunes, unattended, the most valuable part
first.

    python -m benchmarks.gpu --output DIR [--minutes 8] [--smoke]

Needs torch, triton, transformers, PEFT only. After each part DIR/gpu.json and DIR/gpu.csv are
rewritten, so a run that is cut short keeps what it has measured. Parts: correctness of every
kernel; whole layers against frozen, PEFT and a manual backward; every primitive, vendor library
against our candidates over a grid of configurations (what wins goes into DIR/<GPU name>.json: copy
it to rolora_kernels/tuned/, where dispatch reads it); eight layers of Llama-2-7B's width; 4-bit
weights; vendor GEMMs at K, K + 16, K + 64. `--smoke` runs every line of it on tiny shapes, on a CPU
in Triton's interpreter too.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.layers import ManualLoRA, kept, kept_bytes, own_storages, peft_layer
from rolora import RoLoRALinear
from rolora_kernels import Plan, tune, tuned, use_backend
from rolora_kernels.dropout import Dropout
from rolora_kernels.triton_ops.base_tma import why_not
from rolora_kernels.triton_ops.spec import all_specs
from rolora_kernels.weights import NF4

LLAMA = [(4096, 4096), (11008, 4096), (4096, 11008)]  # (N, K) of Llama-2-7B's linears
GATES = {torch.bfloat16: (3e-3, 4e-3), torch.float16: (4e-4, 4e-4), torch.float32: (2e-6, 2e-6)}
TMA = Plan(shrink="triton", expand_base="tma", grads_of_dy="triton", base_dx="tma", grad_A="triton")


class Run:
    """Results so far, the clock, and where they go."""

    def __init__(self, folder: Path, minutes: float, smoke: bool):
        self.folder, self.smoke, self.end = folder, smoke, time.monotonic() + 60 * minutes
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.rows: list[dict] = []
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        import peft
        import transformers
        import triton

        self.about = {
            "gpu": torch.cuda.get_device_name() if self.device == "cuda" else None,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "python": platform.python_version(),
            "commit": commit or "unknown",
            "smoke": smoke,
        }
        self.name = self.about["gpu"] or "cpu"
        capability = list(torch.cuda.get_device_capability()) if self.device == "cuda" else None
        self.table = {**self.about, "gpu": self.name, "capability": capability, "rows": []}
        tuned.install({}, self.name)  # what is measured must not follow an older table
        folder.mkdir(parents=True, exist_ok=True)

    def use_table(self, rows: list[dict] | None = None) -> None:
        """Dispatch follows the rows measured so far, or `rows`."""
        tuned.install(
            {**self.table, "rows": self.table["rows"] if rows is None else rows}, self.name
        )

    def add(self, part: str, **values) -> None:
        self.rows.append({"part": part, **values})
        print(
            part,
            *(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()),
            flush=True,
        )

    def save(self) -> None:
        (self.folder / "gpu.json").write_text(
            json.dumps({"about": self.about, "rows": self.rows}, indent=1) + "\n"
        )
        names = list(dict.fromkeys(k for row in self.rows for k in row))
        with open(self.folder / "gpu.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)
        (self.folder / f"{tuned.file_name(self.name)}.json").write_text(
            json.dumps(self.table, indent=1) + "\n"
        )

    def late(self) -> bool:
        return time.monotonic() > self.end

    def interleaved(
        self,
        calls: dict[str, Callable],
        pairs: int = 15,
        inner: int = 4,
        tables: dict[str, list[dict]] | None = None,
    ) -> dict[str, list[float]]:
        """Milliseconds of every call in every rotation, `inner` calls a sample, by CUDA events;
        `tables` names rows that dispatch follows during one of the calls.
        """
        pairs, inner = (2, 1) if self.smoke else (pairs, inner)
        times = {name: [] for name in calls}
        names = list(calls)
        for rotation in range(pairs + 1):
            for name in names[rotation % len(names) :] + names[: rotation % len(names)]:
                if tables:
                    self.use_table(tables.get(name, []))
                times[name].append(self.time(calls[name], inner))
        return {name: values[1:] for name, values in times.items()}

    def time(self, call: Callable, inner: int) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()  # a first call under another configuration compiles
        torch.cuda._sleep(
            4_000_000
        )  # about 2 ms, in which the launches queue up: what is measured is the device, not Python
        start.record()
        for _ in range(inner):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / inner

    def peak(self, step: Callable) -> int:
        """Bytes that a step takes at most beyond what is held before it; 0 on a CPU."""
        if self.device == "cpu":
            return 0
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - held

    def report(
        self,
        part: str,
        times: dict[str, list[float]],
        base: str,
        flops: float = 0.0,
        moved: float = 0.0,
        **values,
    ) -> None:
        for name, samples in times.items():
            quantiles = statistics.quantiles(samples, n=4) if len(samples) > 2 else samples * 2
            ratio = statistics.median(a / b for a, b in zip(samples, times[base], strict=True))
            extra = {"tflops": flops / statistics.median(samples) / 1e9} if flops else {}
            if moved:
                extra["gb_a_second"] = moved / statistics.median(samples) / 1e6
            self.add(
                part,
                name=name,
                ms=statistics.median(samples),
                q1=quantiles[0],
                q3=quantiles[-1],
                **{f"ratio_to_{base}": ratio},
                **extra,
                **values,
            )


def check(run: Run) -> None:
    """Every kernel against float64 on the same device, odd shapes and dropout included; a failure
    is a row, not a stop.
    """
    shapes = (
        [(33, 40, 24, 4)]
        if run.smoke
        else [(1, 16, 24, 1), (1000, 1000, 1104, 8), (2048, 4096, 4096, 16), (1025, 520, 700, 64)]
    )
    for dtype, (outer, factor) in GATES.items():
        for shape in shapes:
            for dropout in (None, Dropout(0.05, torch.tensor(7, device=run.device))):
                t = tune.operands(run.device, *shape, dtype)
                for name in tune.primitives():
                    truth = tune.truth(name, t, dropout)
                    for candidate in tune.candidates(name):
                        if not tune.fits(candidate, t):
                            continue
                        about = dict(
                            name=name,
                            candidate=candidate,
                            dtype=str(dtype),
                            shape=str(shape),
                            dropout=dropout is not None,
                        )
                        try:
                            worst = tune.error(tune.call(name, candidate, t, dropout), truth)
                            gate = factor if name in ("grad_A", "grads_of_dy") else outer
                            run.add("check", **about, error=worst, ok=worst <= gate)
                        except Exception as problem:
                            run.add(
                                "check",
                                **about,
                                ok=False,
                                problem=str(problem).splitlines()[0][:200],
                            )


def fill_table(run: Run, r: int) -> None:
    """Every primitive at the Llama shapes, M = 8192, bf16: adds the rows of the table that dispatch
    follows, and installs it. After the first shape only each candidate's fastest configurations
    are tried.
    """
    M = 40 if run.smoke else 8192
    grid = tune.grids()
    if run.smoke:
        grid = {key: configs[:2] for key, configs in grid.items()}
    for N, K in [(32, 48)] if run.smoke else LLAMA:
        t = tune.operands(run.device, M, K, N, r, torch.bfloat16)
        for name in tune.primitives():
            if run.late():
                return
            entry, times = tune.measure(run, name, t, grid)
            flops = 2.0 * M * N * K if name in ("expand_base", "base_dx") else 0.0
            moved = all_specs()[name].traffic(M, N, K, r)
            about = dict(primitive=name, M=M, N=N, K=K, r=r)
            run.report("primitive", times, "torch", flops, moved, **about)
            run.table["rows"].append(entry)
            run.add(
                "winner",
                name=name,
                N=N,
                K=K,
                r=r,
                winner=entry["winner"],
                config=str(entry["configs"].get(entry["winner"], "")),
            )
            run.use_table()
            run.save()


def nf4(run: Run) -> None:
    """Double-quantised 4-bit weights to bf16: torch against our kernel (and bitsandbytes where it
    is installed), bit for bit.
    """
    for N, K in [(32, 128)] if run.smoke else LLAMA:
        size, device = N * K, run.device
        code = torch.linspace(-1, 1, 16, device=device)
        double = (
            torch.linspace(0, 1, 256, device=device),
            torch.rand(-(-size // 64 // 256), device=device),
            256,
            torch.tensor(0.1, device=device),
        )
        weight = NF4(
            torch.randint(0, 256, (size // 2,), dtype=torch.uint8, device=device),
            torch.randint(0, 256, (size // 64,), dtype=torch.uint8, device=device),
            code,
            (N, K),
            64,
            double,
        )
        out = torch.empty(N, K, dtype=torch.bfloat16, device=device)

        def by(backend, weight=weight, out=out):
            with use_backend(backend):
                return weight.dequantise(torch.bfloat16, out)

        run.add(
            "check",
            name="dequantise_nf4",
            shape=str((N, K)),
            ok=torch.equal(by("torch").clone(), by("triton")),
        )
        times = run.interleaved({name: partial(by, name) for name in ("torch", "triton")})
        run.report("dequantise", times, "torch", 0.0, size * (0.5 + 1 / 64 + 2), N=N, K=K)
        faster = (
            statistics.median(a / b for a, b in zip(times["triton"], times["torch"], strict=True))
            < 0.98
        )
        run.table["rows"].append(
            {
                "primitive": "dequantise",
                "dtype": "bfloat16",
                "rank": 0,
                "sizes": [N, K],
                "winner": "triton" if faster else "torch",
                "configs": {},
            }
        )
    run.use_table()
    run.save()


def layers(run: Run, Ms, ranks, phases, dropouts) -> None:
    """Forward and backward of one adapted linear: frozen, PEFT, PEFT compiled, a manual backward,
    ours by every backend.
    """
    for N, K in [(32, 48)] if run.smoke else LLAMA:
        for M in Ms:
            for r in ranks:
                for phase in phases:
                    for p in dropouts:
                        if run.late():
                            return
                        layer(run, M, N, K, r, phase, p)
        run.save()


def layer(run: Run, M: int, N: int, K: int, r: int, phase: str, p: float) -> None:
    dtype, device = torch.bfloat16, run.device
    x = torch.randn(M, K, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(M, N, device=device, dtype=dtype)
    frozen = nn.Linear(K, N, bias=False, device=device, dtype=dtype).requires_grad_(False)
    default, phased = peft_layer(frozen, r), peft_layer(frozen, r, dtype)
    for module in (default, phased):
        module.q.lora_dropout["default"] = nn.Dropout(p) if p else nn.Identity()
    for name, module in (("A", phased.q.lora_A), ("B", phased.q.lora_B)):
        module.requires_grad_(phase in (name, "BOTH"))
    adapted = RoLoRALinear.from_linear(frozen, rank=r, alpha=2 * r, dropout=p).train()
    nn.init.normal_(adapted.lora_B)
    adapted.set_phase(phase)
    A, B = (
        torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in ((r, K), (N, r))
    )

    def autocast(x):
        with torch.autocast(device, dtype=dtype):
            return default.q(x)

    forwards = {
        "frozen": frozen,
        "peft_default": autocast,
        "peft_phase": phased.q,
        "manual": lambda x: ManualLoRA.apply(x, frozen.weight, A, B, 2.0),
    }
    if not run.smoke:
        forwards["peft_compiled"] = torch.compile(phased.q)
    if run.table["rows"]:
        forwards["ours auto"] = adapted
    for name, backend in {"torch": "torch", "triton": "triton", "tma": TMA}.items():
        if name == "tma" and why_not(x.device, dtype, N, K) is not None:
            continue

        def forced(x, backend=backend):
            with use_backend(backend):
                return adapted(x)

        forwards[f"ours {name}"] = forced
    if p:
        del forwards["manual"]  # it has no dropout
    parameters = [x, A, B, *default.parameters(), *phased.parameters(), *adapted.parameters()]

    def step(forward):
        def run_once():
            for parameter in parameters:
                parameter.grad = None
            forward(x).backward(dy)

        return run_once

    try:
        times = run.interleaved({name: step(f) for name, f in forwards.items()})
    except Exception as problem:
        run.add(
            "layer",
            M=M,
            N=N,
            K=K,
            r=r,
            phase=phase,
            dropout=p,
            problem=str(problem).splitlines()[0][:200],
        )
        return
    run.report(
        "layer", times, "frozen", 4.0 * M * N * K, 0.0, M=M, N=N, K=K, r=r, phase=phase, dropout=p
    )
    own = {
        q.untyped_storage().data_ptr()
        for m in (frozen, default, phased, adapted)
        for q in m.parameters()
    } | {A.untyped_storage().data_ptr(), B.untyped_storage().data_ptr()}
    for name in ("frozen", "peft_default", "peft_phase", "ours torch", "ours triton"):
        run.add(
            "kept",
            name=name,
            M=M,
            N=N,
            K=K,
            r=r,
            phase=phase,
            dropout=p,
            peak_bytes=run.peak(step(forwards[name])),
            bytes_a_token=kept_bytes(forwards[name], x, own) / M,
        )


def wide_gemm(run: Run) -> None:
    """The vendor GEMM at K, K + 16, K + 64 with row strides of K + pad: decides whether
    K-augmentation is worth building.
    """
    for N, K in [(32, 48)] if run.smoke else LLAMA:
        M = 40 if run.smoke else 8192
        calls = {}
        for extra in (0, 16, 64):
            x = torch.randn(M, K + 64, device=run.device, dtype=torch.bfloat16)[:, : K + extra]
            W = torch.randn(N, K + 64, device=run.device, dtype=torch.bfloat16)[:, : K + extra]
            calls[f"K+{extra}"] = lambda x=x, W=W: x @ W.t()
        run.report("wide_gemm", run.interleaved(calls), "K+0", 2.0 * M * N * K, M=M, N=N, K=K)
    run.save()


def whole_model(run: Run) -> None:
    """Eight layers of Llama-2-7B's width, q, k, v, o, gate, up, down at r 16: tokens a second, peak
    memory, and the bytes that are kept for backward. "run" is ours with the loss of a run's recipe
    (no whole logits), "liger" that with Liger's kernels where installed.
    """
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    from rolora import LoRAConfig, attach, set_phase
    from rolora.hf import liger
    from rolora.recipes import Batch
    from rolora.recipes.spans import token_losses

    size = (
        dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, vocab_size=100)
        if run.smoke
        else dict(
            hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000
        )
    )
    ids = torch.randint(0, 100, (2, 24) if run.smoke else (4, 2048), device=run.device)

    def build():
        torch.manual_seed(0)
        with torch.device(run.device):
            return LlamaForCausalLM(
                LlamaConfig(num_hidden_layers=2 if run.smoke else 8, **size)
            ).to(torch.bfloat16)

    for phase in ("B", "A"):
        for name in (
            "peft_default",
            "peft_phase",
            "ours torch",
            "ours auto",
            "ours triton",
            "run",
            "liger",
        ):
            if name == "liger" and (
                not importlib.util.find_spec("liger_kernel") or run.device != "cuda"
            ):
                continue
            if run.late():
                return
            model = build()
            if name.startswith("peft"):
                config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
                model = peft.get_peft_model(
                    model, config, autocast_adapter_dtype=name == "peft_default"
                )
                for n, q in model.named_parameters():
                    q.requires_grad_(
                        (name == "peft_default" and "lora_" in n) or f"lora_{phase}" in n
                    )
                inner = model.base_model.model
            else:
                attach(model, LoRAConfig(rank=16, alpha=32, target_modules="all-linear"))
                set_phase(model, phase)
                inner = model
                if name == "liger":
                    liger.apply(model, "the model", torch.device(run.device))
            inner.model.embed_tokens.register_forward_hook(lambda m, i, o: o.requires_grad_())

            inner.config.use_cache = False

            def step(model=model, name=name):
                model.zero_grad(set_to_none=True)
                forced = (
                    name.removeprefix("ours ") if name in ("ours torch", "ours triton") else None
                )
                with (
                    torch.autocast(
                        run.device, dtype=torch.bfloat16, enabled=name == "peft_default"
                    ),
                    use_backend(forced) if forced else nullcontext(),
                ):
                    if name in ("run", "liger"):
                        token_losses(
                            model, Batch({"input_ids": ids}, ids, 1, len(ids), ids.numel())
                        ).mean().backward()
                    else:
                        model(input_ids=ids, labels=ids).loss.backward()

            try:
                step()
                if run.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                samples = [run.time(step, 1) for _ in range(2 if run.smoke else 8)]
                peak = torch.cuda.max_memory_allocated() if run.device == "cuda" else 0
                run.add(
                    "model",
                    name=name,
                    phase=phase,
                    tokens_a_second=1e3 * ids.numel() / statistics.median(samples),
                    peak_bytes=peak,
                    kept_bytes=kept(step, own_storages(model)),
                )
            except Exception as problem:
                run.add("model", name=name, phase=phase, problem=str(problem).splitlines()[0][:200])
            del model, inner, step
            if run.device == "cuda":
                torch.cuda.empty_cache()
    run.save()


def cohort(run: Run) -> None:
    """One step of C clients on a model of RoBERTa-large's shape, batch 32 × 128: one after another,
    and together.
    """
    from benchmarks.cohort import engines, shaped

    size = (
        dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        if run.smoke
        else dict(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
        )
    )
    made = shaped(size, *((2, 8) if run.smoke else (32, 128)), run.device)
    for count in (1, 2) if run.smoke else (4, 16, 50):
        if run.late():
            return
        calls, tokens, _ = engines(made, count)
        try:
            times = run.interleaved(calls, pairs=3, inner=1)
            run.report("cohort", times, "sequential", 0.0, clients=count, tokens=tokens())
            for name, call in calls.items():
                run.add("cohort_peak", name=name, clients=count, peak_bytes=run.peak(call))
        except Exception as problem:
            run.add("cohort", clients=count, problem=str(problem).splitlines()[0][:200])
    run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="after so long no new measurement begins"
    )
    parser.add_argument("--smoke", action="store_true", help="every line once, on tiny shapes")
    args = parser.parse_args()
    run = Run(args.output, args.minutes, args.smoke)
    if run.device == "cpu" and not args.smoke:
        sys.exit(
            "error: no CUDA device was found: run this on a machine with a GPU, or with --smoke"
        )
    torch.manual_seed(0)
    first = dict(Ms=[40], ranks=[4]) if args.smoke else dict(Ms=[8192], ranks=[16])
    rest = (
        dict(Ms=[40], ranks=[4]) if args.smoke else dict(Ms=[8192, 2048, 16384], ranks=[16, 4, 64])
    )
    parts = [
        ("check", lambda: check(run)),
        ("layers", lambda: layers(run, **first, phases=["B"], dropouts=[0.0])),
        ("tune", lambda: fill_table(run, 4 if args.smoke else 16)),
        ("layers by the table", lambda: layers(run, **first, phases=["B", "A"], dropouts=[0.0])),
        ("model", lambda: whole_model(run)),
        ("cohort", lambda: cohort(run)),
        ("nf4", lambda: nf4(run)),
        ("wide_gemm", lambda: wide_gemm(run)),
        ("tune at rank 64", lambda: fill_table(run, 64)),
        (
            "more layers",
            lambda: layers(run, **rest, phases=["A", "B", "BOTH"], dropouts=[0.0, 0.05]),
        ),
    ]
    for name, part in parts:
        if run.late():
            run.add("skipped", name=name)
            continue
        start = time.monotonic()
        part()
        run.add("time", name=name, seconds=time.monotonic() - start)
        run.save()
    failed = [row for row in run.rows if row["part"] == "check" and not row.get("ok")]
    print(f"{len(run.rows)} rows in {args.output}; {len(failed)} checks failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
