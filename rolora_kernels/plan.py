"""A plan: which implementation computes each primitive.

A plan is data. Text stands for one only where a person writes or reads it, in `use_backend` and in
what `explain` lists:

    torch                        vendor libraries compute everything
    triton                       our kernels compute everything
    triton[shrink,base_dx:tma]   our kernels compute what is named, with `:tma` the persistent TMA
                                 kernel; vendor libraries compute the rest
    merged                       one vendor product a pass with W′ = round(W + s·B A) (merged)
    merged+triton[shrink,merge]  the same, with our kernels for what is named: `merge` makes W′
    reference                    plain autograd, instead of the rule that the primitives make
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any


def _one_of(*implementations: str):
    """A primitive's field: vendor libraries unless another one of `implementations` is named."""
    return field(default="torch", metadata={"implementations": implementations})


@dataclass(frozen=True)
class Plan:
    """The implementation of every primitive.

    The first five make the autograd rule (primitives); `dequantise` serves 4-bit weights, `pack`
    the exchange. `merged` multiplies with W′ instead of W and the factors: expand_base and base_dx
    are one vendor product each then, and `merge` makes W′. `reference` computes the rule by plain
    autograd: no primitive is called then.
    """

    shrink: str = _one_of("torch", "triton")
    expand_base: str = _one_of("torch", "triton", "tma")
    grads_of_dy: str = _one_of("torch", "triton")
    base_dx: str = _one_of("torch", "triton", "tma")
    grad_A: str = _one_of("torch", "triton")  # noqa: N815
    dequantise: str = _one_of("torch", "triton")
    pack: str = _one_of("torch", "triton")
    merge: str = _one_of("torch", "triton")
    merged: bool = False
    reference: bool = False

    def __post_init__(self):
        for name, allowed in IMPLEMENTATIONS.items():
            given = getattr(self, name)
            if given not in allowed:
                raise ValueError(f"{name} is computed by {' or '.join(allowed)}, got {given!r}")
        if self.reference and self.ours():
            raise ValueError(f"the reference calls no primitive, but {self.ours()} are named")
        if self.merged and (self.reference or {self.expand_base, self.base_dx} != {"torch"}):
            raise ValueError(
                "a merged weight is multiplied by vendor libraries: expand_base, base_dx and the "
                "reference cannot be named with it"
            )

    def ours(self) -> dict[str, str]:
        """primitive → "triton" or "tma", for those that our kernels compute."""
        found = {name: getattr(self, name) for name in IMPLEMENTATIONS}
        return {name: kind for name, kind in found.items() if kind != "torch"}

    def uses_tma(self) -> bool:
        return "tma" in self.ours().values()

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        if self.reference:
            return "reference"
        if self.merged:
            rest = str(replace(self, merged=False))
            return "merged" if rest == "torch" else f"merged+{rest}"
        if self == TRITON:
            return "triton"
        ours = self.ours()
        if not ours:
            return "torch"
        words = [name if kind == "triton" else f"{name}:{kind}" for name, kind in ours.items()]
        return f"triton[{','.join(words)}]"

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The plan that a text says; ValueError for a text that says none."""
        if text in _BY_NAME:
            return _BY_NAME[text]
        if text.startswith("merged+triton["):
            return replace(cls.parse(text.removeprefix("merged+")), merged=True)
        if not (text.startswith("triton[") and text.endswith("]")):
            raise _unknown(text)
        chosen = {}
        for word in text.removeprefix("triton[").removesuffix("]").split(","):
            name, _, kind = word.partition(":")
            kind = kind or "triton"
            if kind == "torch" or kind not in IMPLEMENTATIONS.get(name, ()):
                raise _unknown(text)
            chosen[name] = kind
        return cls.of(chosen)

    @classmethod
    def of(cls, chosen: Mapping[str, str]) -> Plan:
        """The plan of primitive → implementation; vendor libraries for those not named."""
        named: dict[str, Any] = dict(chosen)  # a field's type is not the mapping's
        return replace(cls(), **named)


# primitive → who can compute it
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    each.name: each.metadata["implementations"]
    for each in fields(Plan)
    if "implementations" in each.metadata
}
# the primitives that the autograd rule is made of, and those of them that dropout acts in
RULE = ("shrink", "expand_base", "grads_of_dy", "base_dx", "grad_A")
MASKED = ("shrink", "base_dx", "grad_A")
# those that a group calls for each of its linears, with that linear's own rank
OF_A_LINEAR = ("expand_base", "grads_of_dy")

TORCH = Plan()
TRITON = Plan.of(dict.fromkeys(IMPLEMENTATIONS, "triton"))
REFERENCE = Plan(reference=True)
MERGED = Plan(merged=True)
_BY_NAME = {"torch": TORCH, "triton": TRITON, "merged": MERGED, "reference": REFERENCE}


def _unknown(text: str) -> ValueError:
    with_tma = [name for name, allowed in IMPLEMENTATIONS.items() if "tma" in allowed]
    return ValueError(
        f"backend {text!r} is not torch, triton, merged, reference or triton[…] with names of "
        f"{', '.join(IMPLEMENTATIONS)} ({' and '.join(with_tma)} also with :tma), or "
        "merged+triton[…]"
    )
