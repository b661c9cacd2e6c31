"""One adapted linear by everyone who computes one, on the same weights, factors and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from benchmarks.layers import ManualLoRA, peft_layer
from rolora import RoLoRALinear
from rolora_kernels import Plan, use_backend
from rolora_kernels.plan import IMPLEMENTATIONS, MERGED, RULE, TORCH

SCALING = 2.0
SKINNY = Plan.of(dict.fromkeys(("shrink", "grads_of_dy", "grad_A"), "triton"))
TRITON_RULE = Plan.of(dict.fromkeys(RULE, "triton"))
MERGED_SKINNY = replace(SKINNY, merged=True, merge="triton")
TMA = Plan.of({name: "tma" if "tma" in IMPLEMENTATIONS[name] else "triton" for name in RULE})


@dataclass
class Problem:
    """x `[M, K]` (`count` of them), a frozen W `[N, K]`, A `[r, K]`, B `[N, r]`; `phase` names the
    factors that train.
    """

    M: int
    N: int
    K: int
    r: int
    phase: str
    p: float
    device: str
    count: int = 1
    dtype: torch.dtype = torch.bfloat16
    xs: list[Tensor] = field(init=False)
    dys: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        def make(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, device=self.device) * scale

        xs = [make(self.M, self.K).to(self.dtype) for _ in range(self.count)]
        self.xs = [x.requires_grad_() for x in xs]
        self.dys = [make(self.M, self.N).to(self.dtype) for _ in range(self.count)]
        self.linear = nn.Linear(
            self.K, self.N, bias=False, device=self.device, dtype=self.dtype
        ).requires_grad_(False)
        # as the dtype holds them: contenders keep them in one precision or another
        self.A = make(self.r, self.K, scale=self.K**-0.5).to(self.dtype).float()
        self.B = make(self.N, self.r, scale=self.r**-0.5).to(self.dtype).float()

    def trains(self, name: str) -> bool:
        return self.phase in (name, "BOTH")

    def truth(self) -> dict[str, Tensor]:
        """Y and the gradients on the first input, in float64 by the formulas."""
        x, dy, W = (t.detach().double() for t in (self.xs[0], self.dys[0], self.linear.weight))
        A, B = self.A.double(), self.B.double()
        T = SCALING * dy @ B
        return {
            "y": x @ W.t() + SCALING * (x @ A.t()) @ B.t(),
            "dx": dy @ W + T @ A,
            "A": T.t() @ x,
            "B": SCALING * dy.t() @ (x @ A.t()),
        }


@dataclass
class Contender:
    """`forward` of x, and the parameters that it trains: "A", "B", as [r, K] and [N, r]."""

    forward: Callable[[Tensor], Tensor]
    factors: dict[str, Tensor]

    def step(self, problem: Problem) -> Callable[[int], Tensor]:
        """The call that is timed: forward and backward on the i-th input."""

        def call(i: int) -> Tensor:
            x = problem.xs[i % problem.count]
            x.grad = None
            for factor in self.factors.values():
                factor.grad = None
            y = self.forward(x)
            y.backward(problem.dys[i % problem.count])
            return y

        return call

    def errors(self, problem: Problem, truth: dict[str, Tensor]) -> dict[str, float]:
        """Relative RMS errors on the first input: of Y, dX and the gradients of what trains."""
        y = self.step(problem)(0)
        found = {"y": y.detach(), "dx": problem.xs[0].grad}
        found |= {name: f.grad for name, f in self.factors.items() if problem.trains(name)}
        return {
            name: ((value.double() - truth[name]).pow(2).mean() / truth[name].pow(2).mean())
            .sqrt()
            .item()
            for name, value in found.items()
        }


def frozen(problem: Problem) -> Contender:
    return Contender(problem.linear, {})


def peft_default(problem: Problem) -> Contender:
    """PEFT as it comes: both factors in fp32, autocast."""
    layer = _peft(problem, None)
    for factor in _factors(layer).values():
        factor.requires_grad_(True)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(problem.device, dtype=problem.dtype):
            return layer(x)

    return Contender(forward, _factors(layer))


def peft_bf16(problem: Problem) -> Contender:
    """PEFT with factors of the base's dtype, both of which train."""
    layer = _peft(problem, problem.dtype)
    return Contender(layer, _factors(layer))


def peft_phase(problem: Problem) -> Contender:
    """The same, with the factor frozen that does not train: what a phase costs in PEFT."""
    layer = _peft(problem, problem.dtype)
    for name, factor in _factors(layer).items():
        factor.requires_grad_(problem.trains(name))
    return Contender(layer, _factors(layer))


def peft_compiled(problem: Problem) -> Contender:
    """peft_phase under torch.compile, anew for every layer: after eight recompilations it would be
    eager.
    """
    torch._dynamo.reset()
    made = peft_phase(problem)
    backend = "inductor" if problem.device == "cuda" else "aot_eager"
    return Contender(torch.compile(made.forward, dynamic=False, backend=backend), made.factors)


def manual(problem: Problem) -> Contender:
    """A hand-written backward as Unsloth has it: keeps X, computes both factors' gradients."""
    A, B = (f.to(problem.dtype).requires_grad_() for f in (problem.A, problem.B))
    W = problem.linear.weight
    return Contender(lambda x: ManualLoRA.apply(x, W, A, B, SCALING), {"A": A, "B": B})


def ours(problem: Problem, plan: Plan | None = None) -> Contender:
    """Our layer by a plan, or by what the table says."""
    layer = RoLoRALinear.from_linear(
        problem.linear, rank=problem.r, alpha=SCALING * problem.r, dropout=problem.p
    ).train()
    with torch.no_grad():
        layer.lora_A.copy_(problem.A)
        layer.lora_B.copy_(problem.B)
    layer.set_phase(problem.phase)
    factors = {"A": layer.lora_A, "B": layer.lora_B}
    if plan is None:
        return Contender(layer, factors)

    def forced(x: Tensor) -> Tensor:
        with use_backend(plan):
            return layer(x)

    return Contender(forced, factors)


def plans(p: float = 0.0) -> dict[str, Plan]:
    """Our ways to compute a layer: vendor libraries, our kernels, our skinny kernels beside vendor
    products; without dropout also a merged weight, made by vendor libraries or by our kernel.
    """
    found = {"vendor": TORCH, "kernels": TRITON_RULE, "skinny": SKINNY}
    return found if p else found | {"merged": MERGED, "merged, skinny": MERGED_SKINNY}


def _peft(problem: Problem, dtype: torch.dtype | None) -> nn.Module:
    layer = peft_layer(problem.linear, problem.r, dtype).q
    if problem.p:
        layer.lora_dropout["default"] = nn.Dropout(problem.p)
    with torch.no_grad():
        for name, factor in _factors(layer).items():
            factor.copy_(getattr(problem, name))
    return layer.train()


def _factors(layer) -> dict[str, Tensor]:
    return {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
