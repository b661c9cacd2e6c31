"""`rolora <command>` and `python -m rolora <command>`: the commands under one name.

Each is also `python -m rolora.<command>`. A command's module is loaded when it is asked for.
"""

from __future__ import annotations

from importlib import import_module

import click

from rolora import cli, config
from rolora.errors import BadInput

HELP = """Federated LoRA fine-tuning that trains and exchanges one factor a round.

`rolora COMMAND --help` tells the options of a command."""
COMMANDS = {
    "train": "a federated run from one command; without options the built-in job",
    "evaluate": "metrics of an adapter, or of a bare model, on held-out examples",
    "compare": "methods side by side, over seeds: a table and a picture",
    "report": "run folders side by side: a table and a picture",
    "export": "an adapter for PEFT, vLLM or llama.cpp, merged into its base, or to the hub",
    "worker": "one client that stays resident and answers on a Unix socket",
}


class Commands(click.Group):
    """The commands by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        if name not in COMMANDS:
            raise BadInput(
                f"{name!r} is not one of {', '.join(COMMANDS)}{config.nearest(name, COMMANDS)}"
            )
        return import_module(f"rolora.{name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


command = Commands(
    "rolora",
    help=HELP,
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    params=[cli.version_flag()],
)


def main() -> None:
    """The console script."""
    cli.run(command, "rolora")


if __name__ == "__main__":
    cli.run(command, "python -m rolora")
