"""Commands from the configuration's fields: grouped help, nearest suggestions, one-line errors,
exit codes.
"""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import click

from rolora import __version__, config
from rolora.errors import BadInput


class Flag(click.Option):
    """An option that belongs to a group of the help."""

    def __init__(self, *args, group: str = "Options", **kwargs):
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """Lists options under their groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


def config_flags(names: Iterable[str] | None = None) -> list[Flag]:
    """A flag for every option of the configuration, or for those named."""
    flags = []
    for _, cls in config.sections():
        for option in dataclasses.fields(cls):
            if names is None or option.name in names:
                flags.append(_flag(option, cls))
    return flags


def _flag(option: dataclasses.Field, cls: type) -> Flag:
    name, kind, meta = (
        option.name.replace("_", "-"),
        config.option_type(option, cls),
        option.metadata,
    )
    declaration = f"--{name}/--no-{name}" if kind is bool else f"--{name}"
    shown = "" if option.default is None or kind is bool else f"  [{option.default}]"
    return Flag(
        [declaration, option.name],
        group=cls.__doc__ or "Options",
        help=meta["help"] + shown,
        default=None,
        type=None if kind is bool else kind,
        metavar="|".join(meta["choices"]) if meta["choices"] else meta["metavar"],
    )


def command(
    name: str, help: str, flags: Sequence[click.Parameter], body: Callable[..., Any]
) -> click.Command:
    """`python -m rolora.<name>`; `body` gets every flag by name, None where it was not given."""
    return GroupedCommand(
        name,
        params=[*flags, version_flag()],
        callback=body,
        help=help,
        context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    )


def version_flag() -> Flag:
    return Flag(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        group="Run",
        help="print the version",
        callback=_print_version,
    )


def _print_version(ctx: click.Context, _parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(__version__)
        ctx.exit()


def run(command: click.Command, program: str | None = None) -> NoReturn:
    """Runs a command and exits: 0 done, 2 bad input (one line on standard error), 130
    interrupted.

    `program` is what the help says was typed; `python -m rolora.<name>` if not given.
    """
    wait_briefly()
    _bear_any_text()
    try:
        _run(command, program or f"python -m rolora.{command.name}")
    except SystemExit as end:
        ranks = sys.modules.get("rolora.transport.ranks")  # whose import would load torch
        if ranks is None or not ranks.has_joined:
            raise
        # A rank does not tear its interpreter down: gloo's threads may hold the last tensors of a
        # collective still, and to let go of one then aborts the process (pytorch#179291).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def _run(command: click.Command, program: str) -> NoReturn:
    try:
        code = command.main(prog_name=program, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        sys.exit(0)
    except click.ClickException as error:
        fail(" ".join(error.format_message().split()))
    except BadInput as error:
        fail(str(error))
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except BrokenPipeError:  # who read our lines has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{str(error.filename)[:200]} cannot be used: {error.strerror}")


def _bear_any_text() -> None:
    """A terminal that cannot show a character is sent its number instead."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def wait_briefly() -> None:
    """Has OpenMP's threads spin a thousand times and then sleep while they wait, where the
    environment says nothing about it.

    By default they spin 300,000 times, and a neighbour that takes one core then holds up every
    step; where they sleep at once, the built-in model's rounds took 1.13 times as long on an idle
    machine (benchmarks/results/waiting.json). Must be called before torch is loaded.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "1000"


def fail(text: str) -> NoReturn:
    """One line on standard error, and the end; of several ranks the first speaks for all, unless it
    alone was lost.
    """
    if rank() == 0 or "lost another rank" in text:
        print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def rank() -> int:
    """This process's rank in a torchrun job; 0 without one."""
    return int(os.environ.get("RANK", 0)) if "WORLD_SIZE" in os.environ else 0
