"""One command for a machine with a GPU: checks, times, tunes, unattended, the most valuable part first.

    python -m benchmarks.gpu --output DIR [--minutes 8] [--smoke]

Needs torch, triton, transformers, PEFT only. After each part DIR/gpu.json and DIR/gpu.csv are rewritten, so a run that is cut
short keeps what it has measured. Parts: correctness of every kernel; every primitive, vendor library against ours over a grid
of configurations (what wins goes into DIR/<GPU name>.json, the table that dispatch reads from rolora_kernels/tuned/); whole
layers against frozen, PEFT and a manual backward; vendor GEMMs at K, K + 16, K + 64; eight layers of Llama-2-7B's width.
`--smoke` runs every line of it on tiny shapes, on a CPU in Triton's interpreter too.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.layers import ManualLoRA, kept_bytes, peft_layer
from rolora import RoLoRALinear
from rolora_kernels import torch_ops, triton_ops, use_backend
from rolora_kernels.dropout import Dropout
from rolora_kernels.triton_ops import launch

LLAMA = [(4096, 4096), (11008, 4096), (4096, 11008)]  # (N, K) of Llama-2-7B's linears
GATES = {torch.bfloat16: (3e-3, 4e-3), torch.float16: (4e-4, 4e-4), torch.float32: (2e-6, 2e-6)}
GRID = {
    "shrink": [dict(BLOCK_M=m, BLOCK_K=k, num_warps=w, num_stages=s) for m in (16, 32, 64, 128) for k in (128, 256) for w in (4, 8)
               for s in (3, 4)],
    "expand_base": [dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=64, num_warps=w, num_stages=s)
                    for m, n, w in ((128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8)) for s in (3, 4)],
    "grads_of_dy": [dict(ROWS=r, BLOCK_M=m, BLOCK_N=n, num_warps=w, num_stages=s) for r in (512, 1024, 2048) for m in (32, 64)
                    for n in (128, 256) for w in (4, 8) for s in (2, 3)],
    "grad_A": [dict(ROWS=r, BLOCK_M=m, BLOCK_K=n, num_warps=w, num_stages=s) for r in (512, 1024, 2048) for m in (32, 64)
               for n in (128, 256) for w in (4, 8) for s in (2, 3)],
}
GRID["base_dx"] = GRID["expand_base"]


class Run:
    """Results so far, the clock, and where they go."""

    def __init__(self, folder: Path, minutes: float, smoke: bool):
        self.folder, self.smoke, self.end = folder, smoke, time.monotonic() + 60 * minutes
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.rows: list[dict] = []
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        import peft
        import transformers
        import triton

        self.about = {
            "gpu": torch.cuda.get_device_name() if self.device == "cuda" else None, "torch": torch.__version__, "triton": triton.__version__,
            "transformers": transformers.__version__, "peft": peft.__version__, "python": platform.python_version(),
            "commit": commit or "unknown", "smoke": smoke}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, **values) -> None:
        self.rows.append({"part": part, **values})
        print(part, *(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()), flush=True)

    def save(self) -> None:
        (self.folder / "gpu.json").write_text(json.dumps({"about": self.about, "rows": self.rows}, indent=1) + "\n")
        names = list(dict.fromkeys(k for row in self.rows for k in row))
        with open(self.folder / "gpu.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)

    def late(self) -> bool:
        return time.monotonic() > self.end

    def interleaved(self, calls: dict[str, Callable], pairs: int = 15, inner: int = 4) -> dict[str, list[float]]:
        """Milliseconds of every call in every rotation, `inner` calls a sample, by CUDA events."""
        pairs, inner = (2, 1) if self.smoke else (pairs, inner)
        times = {name: [] for name in calls}
        names = list(calls)
        for rotation in range(pairs + 1):
            for name in names[rotation % len(names):] + names[: rotation % len(names)]:
                times[name].append(self._time(calls[name], inner))
        return {name: values[1:] for name, values in times.items()}

    def _time(self, call: Callable, inner: int) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / inner

    def report(self, part: str, times: dict[str, list[float]], base: str, flops: float = 0.0, **values) -> None:
        for name, samples in times.items():
            quantiles = statistics.quantiles(samples, n=4) if len(samples) > 2 else samples * 2
            ratio = statistics.median(a / b for a, b in zip(samples, times[base], strict=True))
            extra = {"tflops": flops / statistics.median(samples) / 1e9} if flops else {}
            self.add(part, name=name, ms=statistics.median(samples), q1=quantiles[0], q3=quantiles[-1], **{f"ratio_to_{base}": ratio},
                     **extra, **values)


def operands(run: Run, M: int, K: int, N: int, r: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    make = {"device": run.device, "dtype": torch.float32}
    raw = {"x": torch.randn(M, K, **make), "W": torch.randn(N, K, **make) / K**0.5, "A": torch.randn(r, K, **make) / K**0.5,
           "B": torch.randn(N, r, **make) / r**0.5, "dy": torch.randn(M, N, **make)}
    t = {name: value.to(dtype) for name, value in raw.items()}
    t["S"] = (t["x"].float() @ t["A"].float().t()).to(dtype)
    t["T"] = (t["dy"].float() @ t["B"].float()).to(dtype)
    return t


def primitive(name: str, ops, t: dict, dropout: Dropout | None = None) -> list[torch.Tensor]:
    """One call of a primitive on `t`; a list of its results."""
    if name == "shrink":
        return [ops.shrink(t["x"], t["A"], dropout)]
    if name == "expand_base":
        return [ops.expand_base(t["x"], t["W"], t["S"], t["B"], 1.3, None)]
    if name == "grads_of_dy":
        return list(ops.grads_of_dy(t["dy"], t["B"], t["S"], 1.3))
    if name == "base_dx":
        return [ops.base_dx([t["dy"]], [t["W"]], t["T"], t["A"], dropout)]
    return [ops.grad_A(t["T"], t["x"], dropout)]


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).pow(2).mean() / truth.pow(2).mean()).sqrt().item()


def check(run: Run) -> None:
    """Every kernel against float64 on the same device, odd shapes and dropout included; a failure is a row, not a stop."""
    shapes = [(33, 40, 24, 4)] if run.smoke else [(1, 16, 24, 1), (1000, 1000, 1100, 8), (2048, 4096, 4096, 16), (1025, 520, 700, 64)]
    for dtype, (outer, factor) in GATES.items():
        for shape in shapes:
            for dropout in (None, Dropout(0.05, torch.tensor(7, device=run.device))):
                t = operands(run, *shape, dtype)
                wide = {name: value.double() for name, value in t.items()}
                for name in GRID:
                    try:
                        pairs = zip(primitive(name, triton_ops, t, dropout), primitive(name, torch_ops, wide, dropout), strict=True)
                        worst = max(error(a, b) for a, b in pairs)
                        gate = factor if name in ("grad_A", "grads_of_dy") else outer
                        run.add("check", name=name, dtype=str(dtype), shape=str(shape), dropout=dropout is not None, error=worst,
                                ok=worst <= gate)
                    except Exception as problem:
                        run.add("check", name=name, dtype=str(dtype), shape=str(shape), ok=False, problem=str(problem)[:200])


def tune(run: Run) -> dict[str, str]:
    """Every primitive at the Llama shapes, M = 8192, r = 16, bf16: vendor library, our default, our best configuration. A
    configuration that disagrees with float64 is thrown out before it is timed. Gives the winners' names."""
    wins: dict[str, list[float]] = {name: [] for name in GRID}
    shapes = [(32, 48)] if run.smoke else LLAMA
    M, r = (40, 4) if run.smoke else (8192, 16)
    default = {name: dict(configs) for name, configs in launch.CONFIGS.items()}
    for N, K in shapes:
        t = operands(run, M, K, N, r, torch.bfloat16)
        wide = {name: value.double() for name, value in t.items()}
        for name, grid in GRID.items():
            if run.late():
                return {}
            base, timed = default[name][2], []
            ours, vendors = partial(primitive, name, triton_ops, t), partial(primitive, name, torch_ops, t)
            truth = primitive(name, torch_ops, wide)
            for values in grid[:2] if run.smoke else grid:
                launch.CONFIGS[name][2] = replace(base, **values)
                try:
                    if max(error(a, b) for a, b in zip(ours(), truth, strict=True)) <= 4e-3:
                        timed.append((min(run._time(ours, 3) for _ in range(3)), values))
                except Exception as problem:  # too much shared memory, say
                    run.add("config", name=name, N=N, K=K, config=str(values), problem=str(problem).splitlines()[0][:120])
            launch.CONFIGS[name][2] = base
            calls = {"torch": vendors, "default": ours}
            if timed:
                best = replace(base, **min(timed, key=lambda pair: pair[0])[1])

                calls["tuned"] = partial(with_config, name, best, ours)
                run.add("best", name=name, N=N, K=K, config=str(best))
            times = run.interleaved(calls)
            flops = 2.0 * M * N * K if name in ("expand_base", "base_dx") else 0.0
            run.report("primitive", times, "torch", flops, primitive=name, M=M, N=N, K=K, r=r)
            # Dispatch launches the shipped configuration, so only that one can win; a better one has to be shipped first.
            wins[name].append(statistics.median(a / b for a, b in zip(times["default"], times["torch"], strict=True)))
            run.save()
    return {name: "triton" if max(ratios) < 0.98 else "torch" for name, ratios in wins.items() if ratios}


def with_config(name: str, config: launch.Config, call: Callable) -> None:
    """`call` with another configuration of a 16-bit kernel."""
    before, launch.CONFIGS[name][2] = launch.CONFIGS[name][2], config
    call()
    launch.CONFIGS[name][2] = before


def write_table(run: Run, winners: dict[str, str]) -> str:
    """The dispatch table: our kernels for the primitives that win at every shape. Gives the backend it names."""
    ours = [name for name, winner in winners.items() if winner == "triton"]
    backend = f"triton[{','.join(ours)}]" if ours else "torch"
    gpu = run.about["gpu"] or "cpu"
    table = {**run.about, "gpu": gpu, "backend": {"bfloat16": backend, "float16": backend}}
    (run.folder / f"{gpu.replace(' ', '_').replace('/', '_')}.json").write_text(json.dumps(table, indent=1) + "\n")
    run.add("table", backend=backend)
    return backend


def layers(run: Run, backend: str, Ms, ranks, phases, dropouts) -> None:
    """Forward and backward of one adapted linear: frozen, PEFT, PEFT compiled, a manual backward, ours by every backend."""
    for N, K in [(32, 48)] if run.smoke else LLAMA:
        for M in Ms:
            for r in ranks:
                for phase in phases:
                    for p in dropouts:
                        if run.late():
                            return
                        layer(run, backend, M, N, K, r, phase, p)
        run.save()


def layer(run: Run, backend: str, M: int, N: int, K: int, r: int, phase: str, p: float) -> None:
    dtype, device = torch.bfloat16, run.device
    x = torch.randn(M, K, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(M, N, device=device, dtype=dtype)
    frozen = nn.Linear(K, N, bias=False, device=device, dtype=dtype).requires_grad_(False)
    default, phased = peft_layer(frozen, r), peft_layer(frozen, r, dtype)
    for module in (default, phased):
        module.q.lora_dropout["default"] = nn.Dropout(p) if p else nn.Identity()
    for name, module in (("A", phased.q.lora_A), ("B", phased.q.lora_B)):
        module.requires_grad_(phase in (name, "BOTH"))
    ours = RoLoRALinear.from_linear(frozen, rank=r, alpha=2 * r, dropout=p).train()
    nn.init.normal_(ours.lora_B)
    ours.set_phase(phase)
    A, B = (torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in ((r, K), (N, r)))

    def autocast(x):
        with torch.autocast(device, dtype=dtype):
            return default.q(x)

    forwards = {"frozen": frozen, "peft_default": autocast, "peft_phase": phased.q,
                "manual": lambda x: ManualLoRA.apply(x, frozen.weight, A, B, 2.0)}
    if not run.smoke:
        forwards["peft_compiled"] = torch.compile(phased.q)
    for name in dict.fromkeys(("torch", backend, "triton")):
        def forced(x, name=name):
            with use_backend(name):
                return ours(x)
        forwards[f"ours {name}"] = forced
    if p:
        del forwards["manual"]  # it has no dropout
    parameters = [x, A, B, *default.parameters(), *phased.parameters(), *ours.parameters()]

    def step(forward):
        def run_once():
            for parameter in parameters:
                parameter.grad = None
            forward(x).backward(dy)
        return run_once

    try:
        times = run.interleaved({name: step(f) for name, f in forwards.items()})
    except Exception as problem:
        run.add("layer", M=M, N=N, K=K, r=r, phase=phase, dropout=p, problem=str(problem).splitlines()[0][:200])
        return
    run.report("layer", times, "frozen", 4.0 * M * N * K, M=M, N=N, K=K, r=r, phase=phase, dropout=p)
    own = {q.untyped_storage().data_ptr() for m in (frozen, default, phased, ours) for q in m.parameters()} | {
        A.untyped_storage().data_ptr(), B.untyped_storage().data_ptr()}
    for name in ("frozen", "peft_default", "peft_phase", "ours torch"):
        run.add("kept", name=name, M=M, N=N, K=K, r=r, phase=phase, dropout=p, bytes_a_token=kept_bytes(forwards[name], x, own) / M)


def wide_gemm(run: Run) -> None:
    """The vendor GEMM at K, K + 16, K + 64 with row strides of K + pad: decides whether K-augmentation is worth building."""
    for N, K in [(32, 48)] if run.smoke else LLAMA:
        M = 40 if run.smoke else 8192
        calls = {}
        for extra in (0, 16, 64):
            x = torch.randn(M, K + 64, device=run.device, dtype=torch.bfloat16)[:, : K + extra]
            W = torch.randn(N, K + 64, device=run.device, dtype=torch.bfloat16)[:, : K + extra]
            calls[f"K+{extra}"] = lambda x=x, W=W: x @ W.t()
        run.report("wide_gemm", run.interleaved(calls), "K+0", 2.0 * M * N * K, M=M, N=N, K=K)
    run.save()


def whole_model(run: Run, backend: str) -> None:
    """Eight layers of Llama-2-7B's width, q, k, v, o, gate, up, down at r 16: tokens a second and peak memory."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    from rolora import LoRAConfig, attach, set_phase

    size = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, vocab_size=100) if run.smoke else dict(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000)
    ids = torch.randint(0, 100, (2, 24) if run.smoke else (4, 2048), device=run.device)

    def build():
        torch.manual_seed(0)
        with torch.device(run.device):
            return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2 if run.smoke else 8, **size)).to(torch.bfloat16)

    for phase in ("B", "A"):
        for name in ("peft_default", "peft_phase", "ours torch", f"ours {backend}"):
            if run.late():
                return
            model = build()
            if name.startswith("peft"):
                config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
                model = peft.get_peft_model(model, config, autocast_adapter_dtype=name == "peft_default")
                for n, q in model.named_parameters():
                    q.requires_grad_((name == "peft_default" and "lora_" in n) or f"lora_{phase}" in n)
                inner = model.base_model.model
            else:
                attach(model, LoRAConfig(rank=16, alpha=32, target_modules="all-linear"))
                set_phase(model, phase)
                inner = model
            inner.model.embed_tokens.register_forward_hook(lambda m, i, o: o.requires_grad_())

            def step(model=model, name=name):
                model.zero_grad(set_to_none=True)
                with torch.autocast(run.device, dtype=torch.bfloat16, enabled=name == "peft_default"), \
                        use_backend(name.removeprefix("ours ") if name.startswith("ours") else "torch"):
                    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

            try:
                step()
                if run.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                samples = [run._time(step, 1) for _ in range(2 if run.smoke else 8)]
                peak = torch.cuda.max_memory_allocated() if run.device == "cuda" else 0
                run.add("model", name=name, phase=phase, tokens_a_second=1e3 * ids.numel() / statistics.median(samples), peak_bytes=peak)
            except Exception as problem:
                run.add("model", name=name, phase=phase, problem=str(problem).splitlines()[0][:200])
            del model, inner, step
            if run.device == "cuda":
                torch.cuda.empty_cache()
    run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="after so long no new measurement begins")
    parser.add_argument("--smoke", action="store_true", help="every line once, on tiny shapes")
    args = parser.parse_args()
    run = Run(args.output, args.minutes, args.smoke)
    if run.device == "cpu" and not args.smoke:
        sys.exit("error: no CUDA device was found: run this on a machine with a GPU, or with --smoke")
    torch.manual_seed(0)
    big, tiny = dict(Ms=[8192], ranks=[16], phases=["B"], dropouts=[0.0]), dict(Ms=[40], ranks=[4], phases=["B"], dropouts=[0.0])
    parts = [
        ("check", lambda: check(run)),
        ("layers", lambda: layers(run, "triton[shrink,grads_of_dy,grad_A]", **(tiny if args.smoke else big))),
        ("tune", lambda: run.__setattr__("backend", write_table(run, tune(run)))),
        ("wide_gemm", lambda: wide_gemm(run)),
        ("model", lambda: whole_model(run, run.backend)),
        ("more layers", lambda: layers(run, run.backend, [40] if args.smoke else [8192, 2048, 16384], [4] if args.smoke else [16, 4, 64],
                                       ["A", "B", "BOTH"], [0.0, 0.05])),
    ]
    run.backend = "torch"
    for name, part in parts:
        if run.late():
            run.add("skipped", name=name)
            continue
        start = time.monotonic()
        part()
        run.add("time", name=name, seconds=time.monotonic() - start)
        run.save()
    failed = [row for row in run.rows if row["part"] == "check" and not row["ok"]]
    print(f"{len(run.rows)} rows in {args.output}; {len(failed)} checks failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
