"""Runs that are gone on with elsewhere: copies, other folders, moved files; and what must not have
changed.
"""

import json
import shutil
import tomllib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rolora import compare, config
from rolora.federated import methods, sampling
from rolora.federated.server import Server
from rolora.run import digest
from tests.rolora.commands import bits, rows, small


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def whole(files, tmp_path, call):
    """A run of 4 rounds; (bits of one that was never interrupted)."""
    assert call(*small(files, **{"output-dir": tmp_path / "whole"}))[0] == 0
    return bits(tmp_path / "whole")


def test_a_copy_goes_on_in_the_copy(files, tmp_path, call, whole):
    run, copy = tmp_path / "run", tmp_path / "copy"
    assert call(*small(files, rounds=2, **{"output-dir": run}))[0] == 0
    before = contents(run)
    shutil.copytree(run, copy)
    code, _, err = call("--resume", "--output-dir", copy, "--rounds", 4)
    assert (code, err) == (0, "") and contents(run) == before
    assert bits(copy) == whole
    stored = tomllib.loads((copy / "config.toml").read_text())
    assert stored["run"]["output_dir"] == str(copy)


def test_relative_paths_mean_the_same_from_another_folder(
    files, tmp_path, call, monkeypatch, whole
):
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir(), away.mkdir()
    shutil.copytree(files["llama"], home / "llama")
    for name in ("train", "eval"):
        shutil.copy(files[name], home / f"{name}.jsonl")
    monkeypatch.chdir(home)
    names = {"model": "llama", "train-file": "train.jsonl", "eval-file": "eval.jsonl"}
    assert call(*small(files, rounds=2, **names, **{"output-dir": "run"}))[0] == 0
    monkeypatch.chdir(away)
    code, _, err = call("--resume", "--output-dir", "../home/run", "--rounds", 4)
    assert (code, err) == (0, "") and bits(home / "run") == whole
    assert not list(away.iterdir()), "nothing is begun here"


def test_a_comparison_of_relative_paths_goes_on(files, tmp_path, call, monkeypatch):
    shutil.copytree(files["llama"], tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    given = small(files, rounds=3, model="llama", **{"output-dir": "all"})
    words = (*given, "--methods", "ffa", "--seeds", 1)
    advance = Server._round

    def cut(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return advance(self, number)

    monkeypatch.setattr(Server, "_round", cut)
    assert call(*words, command=compare.command)[0] == 130
    monkeypatch.setattr(Server, "_round", advance)
    code, _, err = call(*words, command=compare.command)
    assert (code, err) == (0, "")
    (run,) = (tmp_path / "all" / "runs").iterdir()
    assert [row["round"] for row in rows(run)] == [0, 1, 2, 3]


def test_files_may_have_moved_but_not_changed(files, tmp_path, call, whole):
    run = tmp_path / "run"
    for name in ("train", "eval"):
        shutil.copy(files[name], tmp_path / f"{name}.jsonl")
    given = {f"{name}-file": tmp_path / f"{name}.jsonl" for name in ("train", "eval")}
    assert call(*small(files, rounds=2, **given, **{"output-dir": run}))[0] == 0
    (tmp_path / "train.jsonl").rename(tmp_path / "moved.jsonl")
    code, _, err = call("--resume", "--output-dir", run, "--rounds", 4)
    assert code == 2 and "train.jsonl does not exist" in err and err.count("\n") == 1

    before = contents(run)
    data = [json.loads(line) for line in files["train"].read_text().splitlines()]
    for name, changed in (
        ("a label", [data[0] | {"label": "sea" if data[0]["label"] != "sea" else "hill"}]),
        ("a text", [data[0] | {"text": "other words"}]),
        ("the order", [data[1], data[0], *data[2:]]),
        ("a row less", data[:-1]),
    ):
        rest = changed if len(changed) > 1 else [*changed, *data[1:]]
        (tmp_path / "moved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rest))
        words = ("--resume", "--output-dir", run, "--train-file", tmp_path / "moved.jsonl")
        code, _, err = call(*words, "--rounds", 4)
        assert code == 2 and "examples are not those" in err and err.count("\n") == 1, name
        assert contents(run) == before, name
    shutil.copy(files["train"], tmp_path / "moved.jsonl")
    shutil.copy(files["train"], tmp_path / "other.jsonl")
    code, _, err = call(*words, "--rounds", 4, "--eval-file", tmp_path / "other.jsonl")
    assert code == 2 and "examples are not those" in err and contents(run) == before
    code, _, err = call(*words, "--rounds", 4)
    assert (code, err) == (0, "") and bits(run) == whole
    # The new place is remembered.
    (tmp_path / "other.jsonl").unlink()
    assert call("--resume", "--output-dir", run)[0] == 0


def test_another_base_under_the_same_name_is_refused(files, tmp_path, call):
    """One value of the base model's files that differs by one bit."""
    run, base = tmp_path / "run", tmp_path / "llama"
    shutil.copytree(files["llama"], base)
    assert call(*small(files, rounds=2, model=base, **{"output-dir": run}))[0] == 0
    before = contents(run)
    tensors = load_file(base / "model.safetensors")
    changed = tensors["model.layers.0.mlp.up_proj.weight"].view(torch.int32)
    changed[3, 5] ^= 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    code, _, err = call("--resume", "--output-dir", run, "--rounds", 4)
    assert code == 2 and "are not those that the run was begun with" in err
    assert str(base) in err and err.count("\n") == 1 and contents(run) == before
    changed[3, 5] ^= 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert call("--resume", "--output-dir", run, "--rounds", 4)[0] == 0


def test_a_tilde_in_toml_is_the_home(files, tmp_path, call, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    shutil.copy(files["train"], tmp_path / "home" / "t.jsonl")
    shutil.copytree(files["llama"], tmp_path / "home" / "llama")
    (tmp_path / "c.toml").write_text(
        'model = "~/llama"\ntrain_file = "~/t.jsonl"\n[run]\noutput_dir = "~/run"\n'
    )
    monkeypatch.chdir(tmp_path)
    flags = small(files, rounds=1)
    del flags[:6]  # the model and the data
    code, _, err = call("--config", tmp_path / "c.toml", *flags)
    assert (code, err) == (0, "") and (tmp_path / "home" / "run" / "adapter").is_dir()
    assert not (tmp_path / "~").exists()
    assert call("--resume", "--config", tmp_path / "c.toml")[0] == 0
    for name in config.PLACES:
        made = config.resolve({name: "~/x", "secure_aggregation": name == "secure_roster"})
        made = made.values()[name]
        assert made == str(tmp_path / "home" / "x"), name


@pytest.mark.parametrize("method", methods.NAMES)
def test_an_empty_round_of_poisson_sampling_passes(method, files, tmp_path, call):
    """It moves nothing and is recorded; the run goes on to the end and resumes to the same bits."""
    seed = next(
        s for s in range(99) if not all(sampling.cohort(s, n, 3, 1, 0, True) for n in (2, 3))
    )
    given = {"method": method, "sampling": "poisson", "clients-per-round": 1, "seed": seed}
    run = tmp_path / "run"
    code, out, err = call(*small(files, **given, **{"output-dir": run}))
    assert (code, err) == (0, "") and "nobody took part" in out
    found = rows(run)
    empty = [row for row in found[1:] if row["clients"] == 0]
    assert len(found) == 5 and empty
    for row in empty:
        assert row["train_loss"] is None and row["bytes_up"] == row["bytes_down"] == 0
        assert row["attempts"] == 1 and row["rejected"] == {}
        if not methods.load(method).turns:
            assert row["eval"] == found[row["round"] - 1]["eval"]
    code, _, err = call(*small(files, rounds=2, **given, **{"output-dir": tmp_path / "half"}))
    assert (code, err) == (0, "")
    assert call("--resume", "--output-dir", tmp_path / "half", "--rounds", 4)[0] == 0
    assert bits(tmp_path / "half") == bits(run)


@dataclass(frozen=True)
class Example:
    ids: list[int]
    label: int


class Bare:
    def __init__(self, value):
        self.value = value


class FakeJob:
    def __init__(self, train, clients=(), labels=None):
        self.train, self.evaluation, self.test = train, [], None
        self.clients, self.recipe = list(clients), type("R", (), {"labels": labels})


VALUES = [
    [],
    [Example([1, 2], 0)],
    [Example([1, 2], 1)],
    [Example([1], 0), Example([2], 0)],
    [Example([2], 0), Example([1], 0)],
    [[1], [2]],
    [[1, 2]],
    [["1", "2"]],
    [["12"]],
    [[True, False]],
    [[1.0, 2.0]],
    [[2**70]],
    [torch.tensor([[1, 2]])],
    [torch.tensor([1, 2], dtype=torch.int32)],
    [{"a": 1}],
    [{"a": 2}],
    [{"b": 1}],
    [Bare(1)],
    [Bare(2)],
    [None],
    ["None"],
]


def test_a_digest_tells_all_examples_apart_and_none_from_itself():
    found = [digest.of(FakeJob(value)) for value in VALUES]
    assert len(set(found)) == len(VALUES)
    assert digest.of(FakeJob([Bare(1)])) == digest.of(FakeJob([Bare(1)])), "no addresses"
    assert digest.of(FakeJob([Example([1, 2], 0)])) == digest.of(FakeJob([Example([1, 2], 0)]))
    owners = [[np.array([0, 1]), np.array([2])], [np.array([0]), np.array([1, 2])]]
    assert len({digest.of(FakeJob([1, 2, 3], clients)) for clients in owners}) == 2
    assert len({digest.of(FakeJob([1], labels=names)) for names in (["a", "b"], ["b", "a"])}) == 2
