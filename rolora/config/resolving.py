"""From defaults, a preset, a TOML file and flags to one checked configuration. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from pathlib import Path
from typing import Any

from rolora.config import asynchrony, membership, presets, protection
from rolora.config.options import BENCHMARKS, PLACES
from rolora.config.parsing import nearest, parse_layers, parse_ranks, parse_trackers
from rolora.config.tree import Config, option_type, options, sections
from rolora.errors import BadInput

# Options that were there, lost in the study and are gone: name → its value where it was not used,
# which the config.toml of a run from before may have.
GONE: dict[str, Any] = {
    "local_alternation": False,
    "server_dampening": 0.0,
    "server_nesterov": False,
}


def resolve(
    flags: dict[str, Any], file: str | Path | None = None, preset: str | None = None
) -> Config:
    """Defaults, then `preset` (names separated by commas), then the TOML `file`, then `flags`;
    checked.
    """
    values = presets.values(preset)
    if file is not None:
        values |= read_toml(file)
    return check(Config().with_values(**(values | flags)))


def read_toml(path: str | Path, flag: str = "--config") -> dict[str, Any]:
    """The options of a TOML file, in their sections' tables or at the top; raises BadInput naming
    an unknown key. `flag`: what the file was named by.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{flag} {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{flag} {path} cannot be read: {error}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadInput(f"{flag} {path} is not valid TOML: {str(error)[:200]}") from None
    names = dict(sections())
    values: dict[str, Any] = {}
    for key, value in tables.items():
        if key == "resolved":
            continue  # what a run folder adds: chunk sizes, versions
        if isinstance(value, dict):
            if key not in names:
                raise BadInput(f"{path}: unknown table [{key}]{nearest(key, names)}")
            values |= {k.replace("-", "_"): v for k, v in value.items()}
        else:
            values[key.replace("-", "_")] = value
    known = options()
    for key, unused in GONE.items():
        if values.pop(key, unused) != unused:
            raise BadInput(
                f"{path}: {key} is gone, because it lost (benchmarks/results/STUDY.md): leave it "
                "out, or go on with the version that began this run"
            )
    for key in values:
        if key not in known:
            raise BadInput(f"{path}: unknown key {key!r}{nearest(key, known)}")
    if "resolved" in tables and "dp_epsilon" in values:
        values.pop("dp_noise", None)  # which was computed from it, and will be again
    return values


def check(config: Config) -> Config:
    """Types, choices and ranges of every option; integers are accepted for floats."""
    values = {}
    for name, cls in sections():
        for option in dataclasses.fields(cls):
            value = getattr(getattr(config, name), option.name)
            if value is not None:
                values[option.name] = _check_option(option, option_type(option, cls), value)
    config = config.with_values(**values)
    if set(config.federation.schedule) - {"A", "B"} or not config.federation.schedule:
        raise BadInput(
            f"--schedule {config.federation.schedule!r}: expected letters A and B, such as BA or "
            "BBA"
        )
    if config.task.chat_template is not None:
        config = config.with_values(chat_template=_template(config.task.chat_template))
    parse_layers(config.adapter.layers)
    if config.data.benchmark is not None and (config.data.train_file or config.data.eval_file):
        raise BadInput(
            f"--benchmark {config.data.benchmark} reads its own data: leave --train-file and "
            "--eval-file out, and give "
            "--dataset FOLDER for local files"
        )
    parse_ranks(config.federation.client_ranks)
    parse_trackers(config.run.track)
    return membership.settle(asynchrony.settle(protection.settle(config)))


def _template(given: str) -> str:
    """The chat template itself, where the file of one is given: a run then keeps it whole."""
    if "{{" in given or "{%" in given:
        return given
    try:
        text = Path(given).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"--chat-template {given} does not exist: give a Jinja template") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--chat-template {given} cannot be read: {error}") from None
    if "{{" not in text and "{%" not in text:
        raise BadInput(f"--chat-template {given} is no Jinja template: it has neither {{{{ nor {{%")
    return text


def whole_paths(config: Config) -> Config:
    """The configuration with whole paths of what is on this machine, so that they mean the same
    from any folder.
    """
    values = config.values()
    places = {name: values[name] for name in PLACES if name != "output_dir"}
    if places["dataset"] in BENCHMARKS:
        places["dataset"] = None  # a name, be there a folder of that name or not
    places |= {name: values[name] for name in ("method", "task_type") if _is_file(values[name])}
    found = {
        name: os.path.abspath(value)
        for name, value in places.items()
        if value is not None and os.path.exists(value)
    }
    return config.with_values(**found)


def _is_file(value: Any) -> bool:
    """Whether a method or a kind of task is a file of one's own."""
    return isinstance(value, str) and value.endswith(".py")


def _check_option(option: dataclasses.Field, kind: type, value: Any) -> Any:
    flag, meta = "--" + option.name.replace("_", "-"), option.metadata
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1 << 1000 else math.inf
    if kind is str and isinstance(value, list) and all(isinstance(v, str | int) for v in value):
        value = ",".join(map(str, value))
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise BadInput(f"{flag} {value!r}: expected {KIND_NAMES[kind]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{flag} {value}: expected a finite number")
    if isinstance(value, str):
        _require_plain(flag, value)
        if option.name in PLACES or _is_file(value):
            value = os.path.expanduser(value)  # the shell does so for flags, nobody for TOML
    if (
        meta["choices"]
        and value not in meta["choices"]
        and not (option.name in ("method", "task_type") and _is_file(value))
    ):
        raise BadInput(
            f"{flag} {value!r} is not one of "
            f"{', '.join(meta['choices'])}{nearest(str(value), meta['choices'])}"
        )
    for bound, wrong, text in (
        ("least", lambda b: not value >= b, "at least"),
        ("above", lambda b: not value > b, "more than"),
        ("most", lambda b: not value <= b, "at most"),
    ):
        if meta[bound] is not None and wrong(meta[bound]):
            raise BadInput(f"{flag} {value}: expected {text} {meta[bound]}")
    return value


def _require_plain(flag: str, value: str) -> None:
    """Raises BadInput for a text that no file or terminal can hold."""
    if "\0" in value or any(0xD800 <= ord(c) <= 0xDFFF for c in value):
        raise BadInput(f"{flag} {value!a}: expected text in UTF-8 without null characters")


KIND_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
