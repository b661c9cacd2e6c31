"""The whole configuration: its sections, and every option by name."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rolora.config.options import (
    Adapter,
    Asynchrony,
    Data,
    Exchange,
    Federation,
    Optimisation,
    Privacy,
    Run,
    System,
    Task,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    data: Data = field(default_factory=Data)
    task: Task = field(default_factory=Task)
    federation: Federation = field(default_factory=Federation)
    asynchrony: Asynchrony = field(default_factory=Asynchrony)
    adapter: Adapter = field(default_factory=Adapter)
    optimisation: Optimisation = field(default_factory=Optimisation)
    exchange: Exchange = field(default_factory=Exchange)
    privacy: Privacy = field(default_factory=Privacy)
    system: System = field(default_factory=System)
    run: Run = field(default_factory=Run)

    def to_tables(self) -> dict[str, dict[str, Any]]:
        """Sections of set values, as a TOML file holds them."""
        tables = {
            s.name: dataclasses.asdict(getattr(self, s.name)) for s in dataclasses.fields(self)
        }
        return {
            name: {k: v for k, v in table.items() if v is not None}
            for name, table in tables.items()
        }

    def values(self) -> dict[str, Any]:
        """Every option by name; names are unique over the sections."""
        return {
            k: v
            for s in dataclasses.fields(self)
            for k, v in dataclasses.asdict(getattr(self, s.name)).items()
        }

    def with_values(self, **values: Any) -> Config:
        """A copy with some options changed."""
        sections = {}
        for section in dataclasses.fields(self):
            current = getattr(self, section.name)
            own = {
                k: v
                for k, v in values.items()
                if k in {f.name for f in dataclasses.fields(current)}
            }
            sections[section.name] = dataclasses.replace(current, **own)
        return Config(**sections)


def settled(value: T | None) -> T:
    """A value that is None only until the data and the model are there."""
    assert value is not None, "it is settled when a job is prepared"
    return value


def sections() -> list[tuple[str, type]]:
    """(name, dataclass) of every section, in the order of `--help`."""
    return [(f.name, type(getattr(Config(), f.name))) for f in dataclasses.fields(Config)]


def options() -> dict[str, dataclasses.Field]:
    """Every option by name."""
    return {f.name: f for _, cls in sections() for f in dataclasses.fields(cls)}


def option_type(option: dataclasses.Field, cls: type) -> type:
    """str, int, float or bool; None is taken out of a union."""
    hint = typing.get_type_hints(cls)[option.name]
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None))
    return hint
