"""What goes wrong while a run is going: one line, the run folder unharmed, and what can go on goes on."""

import json
import re
import shutil
import tomllib

import pytest
from filelock import FileLock

from rolora.federated.privacy import epsilon
from rolora.federated.server import QuorumMissed, Server
from tests.rolora.commands import bits, rows, small


def test_a_used_folder_is_left_alone(files, tmp_path, call):
    call(*small(files, rounds=1, **{"output-dir": tmp_path / "run"}))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    code, _, err = call(*small(files, rounds=1, **{"output-dir": tmp_path / "run"}))
    assert code == 2 and "holds another run: add --resume" in err
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    code, _, err = call(*small(files, **{"output-dir": tmp_path / "mine"}))
    assert (
        code == 2
        and "holds other files" in err
        and [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    )


def test_non_finite_loss_drops_the_client_and_names_it(files, tmp_path, call, monkeypatch):
    import torch

    from rolora.recipes.classification import Classification

    loss = Classification.loss

    def sometimes(self, model, batch):
        value = loss(self, model, batch)
        sometimes.calls += 1
        # The first call is the check that gradients arrive, two are client 0's steps.
        return value * torch.tensor(float("nan")) if sometimes.calls == 4 else value

    sometimes.calls = 0
    monkeypatch.setattr(Classification, "loss", sometimes)
    code, out, err = call(*small(files, **{"output-dir": tmp_path / "run"}))
    assert (code, err) == (
        0,
        "",
    ) and "not counted: client 1: non-finite loss: loss nan at local step 1" in out
    assert (
        rows(tmp_path / "run")[1]["rejected"] == {"non-finite loss": 1}
        and rows(tmp_path / "run")[1]["clients"] == 2
    )


def test_divergence_everywhere_ends_with_one_line(files, tmp_path, call):
    code, _, err = call(
        *small(
            files, lr=1e30, optimizer="sgd", **{"max-grad-norm": 0, "output-dir": tmp_path / "run"}
        )
    )
    assert (
        code == 2
        and "updates were accepted" in err
        and "lower --lr" in err
        and err.count("\n") == 1
    )


def test_too_little_memory_is_told_before_loading(files, tmp_path, call, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 1000})())
    code, _, err = call(*small(files, **{"output-dir": tmp_path / "run"}))
    assert code == 2 and "GiB are free on cpu" in err


def test_a_backend_that_cannot_run_is_one_line(files, tmp_path, call, monkeypatch):
    launch = pytest.importorskip("rolora_kernels.triton_ops.launch")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    code, _, err = call(
        *small(files, backend="triton", device="cpu", **{"output-dir": tmp_path / "run"})
    )
    assert (
        code == 2
        and "--backend: backend 'triton' is forced, but cannot run: x is on cpu" in err
        and err.count("\n") == 1
    )


def test_a_full_disk_is_one_line(files, tmp_path, call, monkeypatch):
    import errno

    from rolora import atomic

    written = atomic.write_bytes

    def full(path, data, mode=None):
        if "round-000002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written(path, data)

    monkeypatch.setattr(atomic, "write_bytes", full)
    code, _, err = call(*small(files, **{"output-dir": tmp_path / "run"}))
    assert code == 2 and "cannot be written (No space left on device)" in err and "--resume" in err
    monkeypatch.setattr(atomic, "write_bytes", written)
    code, _, _ = call("--resume", "--output-dir", tmp_path / "run")
    call(*small(files, **{"output-dir": tmp_path / "whole"}))
    assert code == 0 and bits(tmp_path / "run") == bits(tmp_path / "whole")


def test_gated_and_unknown_models_are_told_apart(monkeypatch):
    from huggingface_hub import errors

    from rolora.hf.explained import explain

    class Response:
        headers, status_code, request = {}, 401, None

    gated = OSError("x")
    gated.__cause__ = errors.GatedRepoError.__new__(errors.GatedRepoError)
    unknown = OSError("x")
    unknown.__cause__ = errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
    assert "is gated" in explain("a/b", gated) and "was not found" in explain("a/b", unknown)


def test_resume_does_not_change_a_private_runs_promise(files, tmp_path, call):
    flags = small(
        files, rounds=2, **{"output-dir": tmp_path / "run", "dp-clip": 0.1, "dp-noise": 1.0}
    )
    code, out, _ = call(*flags)
    assert code == 0 and "privacy: client-level (ε" in out and "  ε " in out
    code, _, err = call("--resume", "--output-dir", tmp_path / "run", "--dp-noise", 0.5)
    assert code == 2 and "--dp-noise 0.5 differs from the run's 1.0" in err
    code, out, _ = call("--resume", "--output-dir", tmp_path / "run", "--rounds", 3)
    assert f"(ε {epsilon(1.0, 1.0, 3, 1e-5):.3g}, δ 1e-05) after 3 rounds" in out
    epsilons = [row["epsilon"] for row in rows(tmp_path / "run")[1:]]
    assert code == 0 and len(epsilons) == 3 and epsilons == sorted(epsilons)
    ledger = tmp_path / "run" / "privacy.json"
    assert ledger.stat().st_mode & 0o777 == 0o600
    for path in (tmp_path / "run" / "checkpoints").rglob("state.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o600
    ledger.write_text('{"releases": 4}\n')  # a round was charged, and lost
    code, out, _ = call("--resume", "--output-dir", tmp_path / "run", "--rounds", 4)
    assert code == 0 and f"(ε {epsilon(1.0, 1.0, 5, 1e-5):.3g}, δ 1e-05) after 4 rounds" in out
    ledger.unlink()
    code, _, err = call("--resume", "--output-dir", tmp_path / "run", "--rounds", 5)
    assert code == 2 and "privacy.json is missing" in err and err.count("\n") == 1


def test_a_run_within_an_epsilon_ends_where_it_is_spent(files, tmp_path, call):
    run = tmp_path / "run"
    private = {"dp-clip": 0.1, "dp-epsilon": 3, "sampling": "poisson", "clients-per-round": 2}
    flags = small(files, rounds=3, **private, **{"output-dir": run})
    code, out, _ = call("--dry-run", *flags)
    assert code == 0 and "(the least that keeps --dp-epsilon 3; " in out and not run.exists()
    code, out, _ = call(*flags)
    stored = tomllib.loads((run / "config.toml").read_text())["privacy"]
    told = re.search(r"noise multiplier ([\d.]+) \(the least", out)[1]
    assert code == 0 and float(told) == pytest.approx(stored["dp_noise"], rel=1e-5)
    spent = epsilon(stored["dp_noise"], 2 / 3, 3, 1e-5)
    assert rows(run)[-1]["epsilon"] == spent and 2.9999 < spent <= 3 == stored["dp_epsilon"]

    for more, said in (
        (("--rounds", 4), "--rounds 4 differs from the run's 3, which spend --dp-epsilon 3 whole"),
        (("--dp-epsilon", 8), "--dp-epsilon 8.0 differs from the run's 3.0"),
        (("--dp-noise", 1), "--dp-epsilon 3 and --dp-noise 1 exclude each other"),
    ):
        code, _, err = call("--resume", "--output-dir", run, *more)
        assert code == 2 and said in err and err.count("\n") == 1
    # Killed within round 3, after it was charged: it stands after round 2, and nothing is left.
    shutil.rmtree(run / "checkpoints" / "round-000003")
    code, out, _ = call("--resume", "--output-dir", run)
    assert code == 0 and "charged again: round 2 is the last one" in out
    assert "client-level (ε 3, δ 1e-05) after 2 rounds" in out, "the plan says so too"
    assert [row["round"] for row in rows(run)] == [0, 1, 2]
    assert json.loads((run / "privacy.json").read_text())["releases"] == 3
    card = (run / "adapter" / "README.md").read_text()
    assert "(ε 3, δ 1e-05) after 2 rounds" in card, "of all that was charged"
    # The file of a run is one that a new run may be begun with.
    again = tmp_path / "again"
    assert call("--config", run / "config.toml", "--output-dir", again, "--resume")[0] == 2
    assert call("--config", run / "config.toml", "--output-dir", again)[0] == 0
    fresh = tomllib.loads((again / "config.toml").read_text())["privacy"]
    assert fresh["dp_noise"] == stored["dp_noise"]


def test_a_private_run_whose_last_attempt_fails_says_that_nothing_is_left(
    files, tmp_path, call, monkeypatch
):
    def failed(self, number):
        while not self.ledger.is_spent:
            self.ledger.charge()
        raise QuorumMissed(f"round {number}: 0 of 3 updates were accepted")

    monkeypatch.setattr(Server, "_round", failed)
    private = {"dp-clip": 0.1, "dp-epsilon": 3, "output-dir": tmp_path / "run"}
    code, _, err = call(*small(files, rounds=2, **private))
    assert code == 2 and "updates were accepted; --dp-epsilon is spent; " in err
    assert err.count("\n") == 1


def test_a_run_folder_that_was_edited_cut_or_is_in_use(files, tmp_path, call):
    """One line each, and the folder is as it was."""
    run = tmp_path / "run"
    assert call(*small(files, rounds=2, **{"output-dir": run}))[0] == 0
    good = {name: (run / name).read_bytes() for name in ("config.toml", "metrics.jsonl")}
    lines = good["metrics.jsonl"].splitlines(keepends=True)
    lr = b"lr = 0.01"
    assert lr in good["config.toml"]

    def resumed(name, data):
        (run / name).write_bytes(data)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        code, _, err = call("--resume", "--output-dir", run, "--rounds", 3)
        assert code == 2 and err.count("\n") == 1, err
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        (run / name).write_bytes(good[name])
        return err

    config = good["config.toml"]
    assert "lr = 0.5, the run was begun with 0.01" in resumed(
        "config.toml", config.replace(lr, b"lr = 0.5")
    )
    assert "seed = 7, the run was begun with 0" in resumed(
        "config.toml", config.replace(b"seed = 0", b"seed = 7")
    )
    assert "is not valid TOML" in resumed("config.toml", config[:-20] + b"[[[")
    assert "cannot be read" in resumed("config.toml", b"\xff\xfe" + config)
    assert "expected a number" in resumed("config.toml", config.replace(lr, b"lr = {a = 1}"))
    assert "unknown key 'deeper'" in resumed("config.toml", config + b"\n[data.deeper]\nx = 1\n")
    assert "is not valid TOML" in resumed("config.toml", b"a = " + b"[" * 100_000)
    assert "lacks round 1" in resumed("metrics.jsonl", lines[0] + lines[1][:30] + b"\n" + lines[2])
    assert "lacks round 2" in resumed("metrics.jsonl", lines[0] + lines[1] + lines[2][:30])
    assert "lacks round 0, 1, 2" in resumed("metrics.jsonl", b"\x00\xff\n[1]\n{}\n")
    with FileLock(run / ".lock"):
        assert "is in use by another process" in resumed("config.toml", config)
    (run / "metrics.jsonl").write_bytes(good["metrics.jsonl"] + lines[2][:17])
    code, _, err = call("--resume", "--output-dir", run, "--rounds", 3)
    assert (code, err) == (0, ""), "half a line of a round that is run again is nothing"
    assert [row["round"] for row in rows(run)] == [0, 1, 2, 3]


def test_two_runs_with_the_same_options_have_names_of_their_own(files, tmp_path, call):
    """An answer to one run is none to the other; a run that goes on keeps its name."""

    def name(folder):
        newest = sorted((folder / "checkpoints").iterdir())[-1]
        return json.loads((newest / "state.json").read_text())["run"]

    for folder in ("a", "b"):
        assert call(*small(files, rounds=1, **{"output-dir": tmp_path / folder}))[0] == 0
    first, second = name(tmp_path / "a"), name(tmp_path / "b")
    assert first != second and len(first) == 16
    assert call("--resume", "--output-dir", tmp_path / "a", "--rounds", 2)[0] == 0
    assert name(tmp_path / "a") == first
