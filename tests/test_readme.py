"""Every command and program in the README that needs no network runs as printed.

A fence says how: ```bash runs, ```bash network and ```text do not; ```python runs. What installs,
clones or is this very test run is left out line by line.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import make_files

README = Path(__file__).parent.parent / "README.md"
_LEFT_OUT = ("pip install", "git clone", "cd rolora", "pytest")
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks():
    for number, (language, flags, body) in enumerate(
        FENCE.findall(README.read_text(encoding="utf-8")), 1
    ):
        if "network" in flags or language not in ("bash", "python"):
            continue
        if language == "bash":
            body = "\n".join(
                line for line in body.splitlines() if not line.strip().startswith(_LEFT_OUT)
            )
        if body.strip():
            yield pytest.param(language, body, id=f"{number}-{language}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all blocks, in order: later ones use what earlier ones wrote.

    It holds the files that the README's examples name.
    """
    path = tmp_path_factory.mktemp("readme")
    made = make_files(path)
    made["llama"].rename(path / "my-llama")
    made["roberta"].rename(path / "my-roberta")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("language, body", blocks())
def test_block(language, body, folder):
    command = (
        ["bash", "-euo", "pipefail", "-c", body]
        if language == "bash"
        else [sys.executable, "-c", body]
    )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = inherited | {"PYTHONPATH": str(README.parent), "PATH": path}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_table_and_figure_is_what_was_measured():
    from benchmarks import place

    for path in place.TEXTS:
        text = path.read_text(encoding="utf-8")
        assert "<!-- table" in text and place.placed(text) == text, (
            f"run `python -m benchmarks.place`: {path.name} is stale"
        )


def test_a_stale_figure_is_noticed():
    from benchmarks import place

    text = README.read_text(encoding="utf-8")
    spoilt = re.sub(r"(<!--= .+? -->)[^<]*", r"\1.999", text, count=1)
    assert spoilt != text and place.placed(spoilt) == text
    with pytest.raises(KeyError):
        place.placed("<!--= a figure that nobody measured -->1<!--/-->")
