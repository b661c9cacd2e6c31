"""Every command and program in the README and in docs/ that needs no network runs as printed.

A fence says how: ```bash runs, ```bash network and ```text do not; ```python runs. What installs,
clones or is this very test run is left out line by line.
"""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rolora import config
from tests.mixtures import mixture
from tests.models import make_files

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
# In this order: later pages use what earlier ones wrote. Pages that are not named come last.
FIRST = ("own-data", "benchmarks", "large-models", "run-folder", "layer", "serving", "compare")


def pages() -> list[Path]:
    """The README, then every page of docs/."""
    found = sorted((ROOT / "docs").rglob("*.md"))
    order = {name: number for number, name in enumerate(FIRST)}
    return [README, *sorted(found, key=lambda path: order.get(path.stem, len(order)))]


_LEFT_OUT = ("pip install", "git clone", "cd rolora", "pytest")
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks():
    for page in pages():
        for number, (language, flags, body) in enumerate(
            FENCE.findall(page.read_text(encoding="utf-8")), 1
        ):
            if "network" in flags or language not in ("bash", "python"):
                continue
            if language == "bash":
                lines = body.splitlines()
                body = "\n".join(row for row in lines if not row.strip().startswith(_LEFT_OUT))
            if body.strip():
                yield pytest.param(language, body, id=f"{page.stem}-{number}-{language}")


def networked():
    """Commands of ours that a reader runs with a network, as argument lists."""
    for page in [*pages(), ROOT / "examples" / "README.md", ROOT / "CONTRIBUTING.md"]:
        for language, flags, body in FENCE.findall(page.read_text(encoding="utf-8")):
            if language != "bash" or "network" not in flags:
                continue
            for line in body.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:2] == ["python", "-m"] and words[2].startswith("rolora."):
                    yield pytest.param(
                        words[2], words[3:], id=f"{page.stem}: {' '.join(words[2:])}"
                    )


@pytest.mark.parametrize("module, arguments", networked())
def test_a_command_that_needs_a_network_is_one_that_would_begin(module, arguments):
    """Its flags are parsed, and those of a run resolved and checked; nothing is fetched."""
    command = importlib.import_module(module).command
    given = command.make_context(command.name, list(arguments)).params
    if module == "rolora.train":
        values = {name: given[name] for name in config.options() if given[name] is not None}
        preset = given["preset"]
        if preset is None and not {"train_file", "dataset", "benchmark"} & set(values):
            preset = "commonsense"  # what a causal LM without data takes
        settled = config.resolve(values, given["config_file"], preset)
        assert settled.values()["model"] is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all blocks, in order: later ones use what earlier ones wrote.

    It holds the files that the README's examples name.
    """
    path = tmp_path_factory.mktemp("readme")
    made = make_files(path)
    made["llama"].rename(path / "my-llama")
    made["roberta"].rename(path / "my-roberta")
    mixture(path / "my-llama", path / "my-mixture")
    return path


@pytest.fixture(scope="module")
def programs(tmp_path_factory, users_python):
    """A folder for PATH with a `python` that has loaded torch and transformers already."""
    path = tmp_path_factory.mktemp("bin")
    users_python.on_path(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("language, body", blocks())
def test_block(language, body, folder, programs):
    command = (
        ["bash", "-euo", "pipefail", "-c", body]
        if language == "bash"
        else [programs / "python", "-c", body]
    )
    own = [str(programs), str(Path(sys.executable).parent)]
    path = os.pathsep.join([*own, os.environ["PATH"]])
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = inherited | {"PYTHONPATH": str(README.parent), "PATH": path}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr[-8000:]


def test_every_table_and_figure_is_what_was_measured():
    from benchmarks import place

    for path in place.TEXTS:
        text = path.read_text(encoding="utf-8")
        assert place.placed(text) == text, f"run `python -m benchmarks.place`: {path.name} is stale"
    tables = [path for path in place.TEXTS if "<!-- table" in path.read_text(encoding="utf-8")]
    assert {"README.md", "STUDY.md", "results.md"} <= {path.name for path in tables}


def test_the_front_page_is_short_and_sets_up_everything_in_two_lines():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and "<!--=" not in text
    commands = re.findall(r"^python3 -m venv .*$", text, re.MULTILINE)
    assert len(commands) == 2
    assert all(" && .venv/bin/pip install -q -c constraints.txt " in line for line in commands)
    assert commands[0].endswith("-m rolora.train")
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert commands[1].partition("&& ")[2] in run, "CI runs the README's test command"


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.stem)
def test_links_between_pages_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_a_stale_figure_is_noticed():
    from benchmarks import place

    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    spoilt = re.sub(r"(<!--= .+? -->)[^<]*", r"\1.999", text, count=1)
    assert spoilt != text and place.placed(spoilt) == text
    with pytest.raises(KeyError):
        place.placed("<!--= a figure that nobody measured -->1<!--/-->")
