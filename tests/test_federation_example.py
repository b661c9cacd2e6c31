"""examples/federation: the play runs where flwr is installed, and what Compose would run are its
commands.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from rolora import config
from rolora.worker import command as worker
from tests.rolora.commands import rows

FOLDER = Path(__file__).parent.parent / "examples" / "federation"
ADDRESS, CLIENTS = "superlink:9092", 5
needs_keys = pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")),
    reason="openssl or ssh-keygen is not installed",
)


@pytest.fixture(scope="module")
def play():
    """The module run.py, whose functions make the commands."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("federation_play", FOLDER / "run.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("prepare", None)


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def clients_of(compose):
    return sorted(int(name[4:]) for name in compose["services"] if name.startswith("node"))


def test_compose_runs_the_commands_of_the_play(play, compose):
    services = compose["services"]
    assert clients_of(compose) == list(range(CLIENTS))
    for client in clients_of(compose):
        words = services[f"node{client}"]["command"]
        assert tuple(words) == play.worker(client, ADDRESS)
        given = worker.make_context("worker", words[3:]).params  # every flag is one
        assert given["client"] == client and given["secure_key"] == f"node{client}"
    assert tuple(services["superlink"]["command"]) == play.superlink("0.0.0.0", 9092)
    shell, flags, script = services["register"]["command"]
    assert (shell, flags) == ("sh", "-ec")
    one = shlex.join(play.register(7)).replace("node7", "node$$client")
    numbers = " ".join(map(str, range(CLIENTS)))
    assert script == f"for client in {numbers}; do {one}; done"
    *words, options = play.start_run(Path("/federation"))
    *given, chosen = services["run"]["command"]
    assert given == [
        word.replace(str(play.APP), "/app/rolora/transport/flower_app") for word in words
    ]
    assert chosen.split()[0] == options.split()[0] and chosen.split()[1].startswith("gathering=")
    _, path, folder, address = services["prepare"]["command"]
    assert (FOLDER.parents[1] / path.removeprefix("/app/")).is_file()
    assert (folder, address) == ("/federation", ADDRESS)


def test_compose_is_whole(play, compose):
    services, (volume,) = compose["services"], compose["volumes"]
    for name, service in services.items():
        assert service["image"] == "rolora-federation", name
        assert service["volumes"] == [f"{volume}:/federation"]
        assert service["working_dir"] == "/federation"
        build = service["build"]
        assert (FOLDER / build["context"]).resolve() == FOLDER.parents[1]
        assert (FOLDER.parents[1] / build["dockerfile"]).is_file()
        for other, condition in service.get("depends_on", {}).items():
            assert other in services
            assert condition["condition"].startswith("service_")
            if condition["condition"] == "service_healthy":
                assert services[other]["healthcheck"]["test"][0] == "CMD"
    later = [name for name, service in services.items() if service.get("profiles")]
    assert later == [f"node{play.LATER}"], "`up` starts all but the one that joins"


def test_the_image_has_what_the_play_needs(play):
    text = (FOLDER / "Dockerfile").read_text()
    for name, value in play.QUIET.items():
        assert f"{name}={value}" in text
    assert '-c constraints-flower.txt ".[flower,secure]"' in text and "openssl" in text
    assert "FLWR_HOME=/federation/flwr" in text


@needs_keys
def test_what_is_prepared_fits_together(play, tmp_path):
    """The configuration is one, and every client's key is that of the roster."""
    masked = pytest.importorskip("rolora.run.masked")
    pytest.importorskip("cryptography")
    play.prepare(tmp_path / "fed", "superlink:9092")
    settled = config.resolve({}, str(tmp_path / "fed" / "run.toml"))
    assert settled.federation.clients == CLIENTS
    roster = settled.privacy.secure_roster
    assert Path(roster) == tmp_path / "fed" / "roster.txt"
    for client in range(CLIENTS):
        key = tmp_path / "fed" / f"node{client}"
        assert masked.identity(client, roster, str(key)).client == client
    assert settled.run.output_dir == str(tmp_path / "fed" / "run")
    with pytest.raises(SystemExit, match="has a federation already"):
        play.prepare(tmp_path / "fed", "superlink:9092")


@pytest.mark.slow
@needs_keys
@pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None,
    reason="flwr is not installed: pip install -c constraints-flower.txt '.[flower,secure]'",
)
def test_the_play_runs_and_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "federation"
    done = subprocess.run(
        [sys.executable, FOLDER / "run.py", folder],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, last = map(float, done.stdout.rpartition("held-out accuracy ")[2].split(" -> "))
    assert last > 2 * first
    found = rows(folder / "run")[1:]
    took_part = [row["took_part"] for row in found]
    assert min(map(len, took_part)) >= 3 and any(3 in clients for clients in took_part)
    assert took_part[-1] == [0, 1, 2, 4], "one is gone, another has come"
    assert any(3 in row.get("left", ()) for row in found)
    assert any(4 in row.get("joined", ()) for row in found)
    assert "client 4: round 10" in (folder / "node4.log").read_text()
    assert "client 3: round 10" not in (folder / "node3.log").read_text()
    left = [p.info for p in psutil.process_iter(["cmdline"]) if str(folder) in str(p.info)]
    assert left == []
