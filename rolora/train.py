"""`python -m rolora.train`: a federated run from one command.

Without flags it trains the built-in model.
"""

from __future__ import annotations

import errno
import shlex
import signal
from pathlib import Path
from typing import Any

from rolora import cli, config
from rolora.cli import rank
from rolora.config import Config
from rolora.errors import BadInput
from rolora.run import identity
from rolora.run.folder import RunFolder, default_path, refuse_used, stored_values

HELP = """Federated LoRA fine-tuning: each round trains and exchanges one factor.

Without flags: the built-in tiny Llama on the built-in text, about a minute on two CPU cores. With
--model ID of a causal LM and
no data: the paper's commonsense recipe."""

_DATA = ("train_file", "eval_file", "dataset")  # may lie elsewhere when a run is resumed
_FREE = ("track", "cuda_graphs")  # may differ then
FLAGS = [
    cli.Flag(
        ["--config", "config_file"],
        metavar="FILE.toml",
        group="Configuration",
        help="options as TOML; flags win over it",
    ),
    cli.Flag(
        ["--preset"],
        metavar="NAME,…",
        group="Configuration",
        help="a named set of options; TOML and flags win: "
        "builtin, commonsense, alpaca, codealpaca, TASK-CLIENTS-rRANK of GLUE, such as qnli-50-r4, "
        "or flowertune-general, -finance, -medical, -code; and paper, alone or beside one of them: "
        "the paper's algorithm as it is printed, without what we add",
    ),
    *cli.config_flags(),
    cli.Flag(["--resume"], is_flag=True, group="Run", help="go on with the run in --output-dir"),
    cli.Flag(["--quiet"], is_flag=True, group="Run", help="print the last line only"),
    cli.Flag(["--dry-run"], is_flag=True, group="Run", help="print the plan and stop"),
]


def train(
    config_file: str | None,
    preset: str | None,
    resume: bool,
    quiet: bool,
    dry_run: bool,
    **given: Any,
) -> None:
    flags = {name: value for name, value in given.items() if value is not None}
    settled = (
        resumed(flags, config_file, preset) if resume else resolved(flags, config_file, preset)
    )
    path = (
        Path(settled.run.output_dir)
        if settled.run.output_dir
        else default_path(settled.federation.method)
    )
    if not resume and not dry_run and rank() == 0:
        refuse_used(path)
    settled = settled.with_values(output_dir=str(path))
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a cluster's notice ends a run as Ctrl-C does
    folder = RunFolder(path)
    try:
        _train(settled, folder, resume, quiet, dry_run)
    except KeyboardInterrupt:
        if (path / "config.toml").exists() and rank() == 0:
            print(
                "\ninterrupted; to go on: python -m rolora.train --resume --output-dir "
                f"{shlex.quote(str(path))}",
                flush=True,
            )
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise BadInput(
            f"{error.filename or path} cannot be written ({error.strerror}): what was saved before "
            "is intact; mend it and "
            f"go on with --resume --output-dir {path}"
        ) from None


def resolved(flags: dict[str, Any], file: str | None, preset: str | None) -> Config:
    """The configuration of a new run, with the preset that its model and data imply where none is
    named.
    """
    named = (config.read_toml(file) if file else {}) | flags
    if config.presets.names_data(preset) or {"train_file", "dataset", "benchmark"} & set(named):
        return config.resolve(flags, file, preset)
    implied = "builtin"
    if named.get("model") is not None:
        config.check(
            Config().with_values(**named)
        )  # wrong flags are told before anything is fetched
        from rolora.hf import architecture, reading

        reading.quieten()
        if not architecture.is_causal_lm(
            reading.read_config(named["model"], named.get("revision"))
        ):
            raise BadInput(
                f"--model {named['model']} is no causal LM and no data are named: give --task-type "
                "classification "
                "--train-file FILE (and --eval-file), --text-column and --label-column"
            )
        implied = "commonsense"
    return config.resolve(flags, file, config.presets.added(implied, preset))


def resumed(flags: dict[str, Any], file: str | None, preset: str | None) -> Config:
    """The stored configuration; what is given beside it must agree, but for a larger number of
    rounds (none with --dp-epsilon, which is spent by then), other trackers, and for where the data
    lie now: that they are the same is seen when they are encoded.
    """
    given = config.presets.values(preset) | (config.read_toml(file) if file else {}) | flags
    if given.get("output_dir") is None:
        raise BadInput("--resume needs --output-dir: the folder of the run to go on with")
    folder = str(Path(given["output_dir"]).expanduser())
    stored = identity.BEFORE | stored_values(Path(folder))
    known = config.options()
    before = config.check(Config().with_values(**{k: v for k, v in stored.items() if k in known}))
    before = config.whole_paths(before)
    now = config.whole_paths(config.check(before.with_values(**given))).values()
    for name, value in before.values().items():
        if (
            name in ("output_dir", *_DATA)
            or now[name] in (value, "auto")
            or (name == "rounds" and now[name] > value and now["dp_epsilon"] is None)
            or name in _FREE
        ):
            continue
        hint = "; only a larger number can be given" if name == "rounds" else ""
        if name == "rounds" and now[name] > value:
            hint = f", which spend --dp-epsilon {now['dp_epsilon']:g} whole"
        raise BadInput(
            f"--{name.replace('_', '-')} {now[name]} differs from the run's {value}{hint}: leave "
            "it out, or start a new run"
        )
    moved = {name: now[name] for name in _DATA if now[name] is not None}
    moved |= {name: now[name] for name in ("rounds", *_FREE)}
    return before.with_values(output_dir=folder, **moved)


def _train(settled: Config, folder: RunFolder, resume: bool, quiet: bool, dry_run: bool) -> None:
    from rolora.run.session import (
        Session,
    )  # torch and transformers are loaded here, after every flag has been checked

    session = Session(settled, folder, resume, quiet, weights=not dry_run)
    if dry_run:
        session.print_plan()
    else:
        session.run()


command = cli.command("train", HELP, FLAGS, train)

if __name__ == "__main__":
    cli.run(command)
