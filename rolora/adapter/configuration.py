"""LoRAConfig: what is asked of `attach`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from numbers import Integral
from typing import Any, TypeVar

Number = TypeVar("Number", int, float)

_NAMES = re.compile(r"\s*[\w.]+\s*(,\s*[\w.]+\s*)+")  # two names or more, with commas between


class _Unsaid(float):
    """A default value, told from the same value given."""


def _unsaid(value: float) -> Any:
    return _Unsaid(value)


@dataclass(frozen=True)
class LoRAConfig:
    """Where the factors go and how they start.

    Attributes:
        rank: r, the rows of A and the columns of B.
        alpha: the scaling is alpha / rank.
        rslora: the scaling is alpha / sqrt(rank).
        dropout: probability, on the input of the LoRA path.
        target_modules: last name components, full paths, one regular expression (a string, matched
            against whole paths), "all-linear" (every linear but the output head), or "auto" (query
            and value projections).
        layers: block indices to adapt, such as `range(18, 24)`; None for all.
        modules_to_save: modules trained and saved whole, such as a new classification head
            ("score", "classifier").
        init: "kaiming" (PEFT's default), "gaussian" or "orthogonal" rows for A, with B zero;
            "pissa" and "olora": see RoLoRALinear.reset_factors.
        rank_pattern, alpha_pattern: ranks and alphas of some modules, by a regular expression on
            the end of their paths, as PEFT has them.
        exclude_modules: never adapted, although they match (names, or one regular expression).
        target_parameters: parameters to adapt that no linear owns, such as a mixture's
            "experts.gate_up_proj": the ends of their paths, or whole paths. Patterns of ranks and
            alphas are matched against their paths. Dropout does not go with them, as in PEFT.
        r, lora_alpha, lora_dropout, use_rslora: PEFT's names for rank, alpha, dropout and rslora,
            read into those.

    A string of names with commas between them, "q_proj,v_proj", is a list of names.
    """

    rank: int = _unsaid(8)
    alpha: float = _unsaid(16.0)
    target_modules: Sequence[str] | str = "auto"
    layers: Sequence[int] | None = None
    dropout: float = _unsaid(0.0)
    rslora: bool = _unsaid(False)
    modules_to_save: Sequence[str] = ()
    init: str = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: Sequence[str] | str = ()
    target_parameters: Sequence[str] = ()
    r: InitVar[int | None] = None
    lora_alpha: InitVar[float | None] = None
    lora_dropout: InitVar[float | None] = None
    use_rslora: InitVar[bool | None] = None

    def __post_init__(
        self,
        r: int | None,
        lora_alpha: float | None,
        lora_dropout: float | None,
        use_rslora: bool | None,
    ) -> None:
        for name, alias, given, kind in (
            ("rank", "r", r, int),
            ("alpha", "lora_alpha", lora_alpha, float),
            ("dropout", "lora_dropout", lora_dropout, float),
            ("rslora", "use_rslora", use_rslora, bool),
        ):
            value = getattr(self, name)
            unsaid = isinstance(value, _Unsaid)
            if given is not None and not unsaid and given != value:
                raise ValueError(
                    f"{name}={value!r} and {alias}={given!r} are two names of one thing: give one"
                )
            if given is not None:
                object.__setattr__(self, name, given)
            elif unsaid:
                object.__setattr__(self, name, kind(value))
        parameters: Sequence[str] | str = self.target_parameters or ()
        if isinstance(parameters, str):
            parameters = [name.strip() for name in parameters.split(",") if name.strip()]
        given_names = list(parameters) if isinstance(parameters, Iterable) else [parameters]
        if not all(isinstance(name, str) and name for name in given_names):
            raise ValueError(
                f"target_parameters={self.target_parameters!r}: expected the ends of parameters' "
                'paths, such as ["experts.gate_up_proj", "experts.down_proj"]'
            )
        object.__setattr__(self, "target_parameters", tuple(given_names))
        if self.target_parameters and self.dropout:
            raise ValueError(
                f"target_parameters does not go with dropout={self.dropout:g}: a parameter has no "
                "input of its own to drop, and PEFT refuses it too: set dropout=0"
            )
        _require_indices(self.layers)
        targets = self.target_modules
        if isinstance(targets, str) and _NAMES.fullmatch(targets):
            names = [name.strip() for name in targets.split(",")]
            object.__setattr__(self, "target_modules", names)

    def of(self, name: str) -> tuple[int, float]:
        """(rank, alpha) of a module path."""
        rank = _by_pattern(self.rank_pattern, name, self.rank)
        return rank, _by_pattern(self.alpha_pattern, name, self.alpha)


def _require_indices(layers: Any) -> None:
    """Raises ValueError for `layers` that are no block indices, such as a command's text."""
    found = isinstance(layers, Collection) and not isinstance(layers, (str, bytes))
    if layers is not None and not (found and all(isinstance(i, Integral) for i in layers)):
        raise ValueError(
            f"layers={layers!r}: expected the indices of blocks, such as range(18, 24)"
        )


def _by_pattern(patterns: Mapping[str, Number], name: str, default: Number) -> Number:
    return next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default
    )
