"""Methods with options as one word: `rolora`, `rolora+balance`, `rolora+schedule=BBA+lr-b=0.02`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rolora import config
from rolora.errors import BadInput


def parse(text: str) -> dict[str, Any]:
    """The options that a variant's text names, `method` among them; raises BadInput for an option
    or value that `rolora.train` would not take either.
    """
    name, *parts = text.strip().split("+")
    values: dict[str, Any] = {"method": name}
    known = config.options()
    for part in parts:
        key, given, value = part.partition("=")
        option = key.strip().replace("-", "_")
        if option not in known:
            raise BadInput(f"{text}: unknown option {key!r}{config.nearest(option, known)}")
        if option in ("method", "seed", "output_dir"):
            raise BadInput(f"{text}: {key} is not a variant's to say")
        values[option] = _value(text, option, value) if given else True
    from rolora.federated import compatibility  # torch comes with it, which --help does without

    try:
        compatibility.settle(config.check(config.Config().with_values(**values)))
    except BadInput as error:
        raise BadInput(f"{text}: {error}") from None
    return values


def parse_all(text: str) -> list[str]:
    """The variants of a comma-separated list, each checked, none twice."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise BadInput(
            "--methods: expected variants separated by commas, such as rolora,fedavg,rolora+balance"
        )
    for name in names:
        parse(name)
        if names.count(name) > 1:
            raise BadInput(f"--methods: {name} is given twice")
    return names


@dataclass(frozen=True)
class Crossed:
    """A variant at one precision of its messages: its whole text, the variant that it is of, and
    what it is called in a table.
    """

    text: str
    method: str
    label: str


def crossed(names: list[str], wires: str | None, given: dict[str, Any]) -> list[Crossed]:
    """Every variant at every wire of a comma-separated list; as they are, where there is none.

    given: options that hold for all. A variant that names its own precision keeps it. Raises
    BadInput for a wire that there is not, and for a precision that is given for all beside a list.
    """
    if wires is None:
        return [Crossed(name, name, name) for name in names]
    if "exchange_dtype" in given:
        raise BadInput(
            "--exchange-dtype and --wires exclude each other: give one for all, or several"
        )
    listed = list(dict.fromkeys(part.strip() for part in wires.split(",") if part.strip()))
    unknown = [wire for wire in listed if wire not in config.WIRES]
    if unknown or not listed:
        raise BadInput(f"--wires {wires!r}: expected some of {', '.join(config.WIRES)}")
    found = []
    for name in names:
        if "exchange_dtype" in parse(name):
            found.append(Crossed(name, name, name))
            continue
        for wire in listed:
            found.append(Crossed(f"{name}+exchange-dtype={wire}", name, f"{name} {wire}"))
    return found


def _value(text: str, option: str, value: str) -> Any:
    kind = next(
        config.option_type(field, cls)
        for _, cls in config.sections()
        for field in dataclasses.fields(cls)
        if field.name == option
    )
    try:
        return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        raise BadInput(
            f"{text}: {option.replace('_', '-')} {value!r}: expected {config.KIND_NAMES[kind]}"
        ) from None


def rates(text: str) -> list[float]:
    """The learning rates of a comma-separated list, ascending."""
    try:
        found = sorted({float(rate) for rate in text.split(",")})
    except ValueError:
        found = []
    if not found or not found[0] > 0 or found[-1] == float("inf"):
        raise BadInput(f"--rates {text!r}: expected positive numbers, such as 0.1,0.5")
    return found
