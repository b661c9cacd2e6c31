"""One clear line for everything that is wrong, and nothing written or lost."""

import json

import pytest
from filelock import FileLock

from tests.rolora.commands import bits, rows, small


def bad(*args, **flags):
    return args, flags


BAD_INPUT = {
    "unknown flag": (
        bad("--lora-rank", 4),
        "No such option '--lora-rank'|No such option: --lora-rank",
    ),
    "nearest flag": (bad("--locl-steps", 4), "--local-steps"),
    "not a number": (bad(rounds="many"), "'many' is not a valid integer"),
    "zero rounds": (bad(rounds=0), "--rounds 0: expected at least 1"),
    "unknown method": (bad(method="rolara"), "'rolara' is not one of .*did you mean rolora"),
    "unknown preset": (bad(preset="comonsense"), "did you mean commonsense"),
    "wrong model path": (
        bad(model="/nowhere/llama"),
        "/nowhere/llama does not exist: give a Hugging Face folder",
    ),
    "no model folder": (bad(model="ROOT"), "is not a model folder: it has no config.json"),
    "hub without network": (
        bad(model="meta-llama/Llama-2-7b-hf"),
        "could not be fetched: no network.*give --model FOLDER, --train-file",
    ),
    "missing file": (bad(**{"train-file": "gone.jsonl"}), "gone.jsonl does not exist"),
    "missing column": (
        bad(**{"text-column": "texts"}),
        "has no column 'texts'.*did you mean --text-column text",
    ),
    "no targets": (
        bad(**{"target-modules": "q_prj"}),
        "'q_prj' matches no module; nearest linear layers: q_proj",
    ),
    "layers out of range": (
        bad(layers="2-5"),
        "layers 2-5 given, but the matched modules lie in layers 0-2",
    ),
    "layers no numbers": (bad(layers="a-b"), "expected indices and ranges"),
    "rank too large": (bad(rank=64), "rank 64 does not fit a 32x32 linear"),
    "more clients than examples": (
        bad(clients=500),
        "160 examples cannot be split over 500 clients",
    ),
    "more a round than there are": (
        bad(**{"clients-per-round": 9}),
        "--clients-per-round 9 is over the 3 clients",
    ),
    "quorum out of reach": (bad(quorum=4), "--quorum 4 can never be met by 3"),
    "column without its name": (bad(partition="column"), "needs --client-column"),
    "skew without labels": (
        bad(partition="dirichlet", **{"response-column": "response"}),
        "splits by label, which causal-lm data",
    ),
    "too long": (bad(**{"max-length": 500}), "--max-length 500 is over the model's 128 positions"),
    "unknown device": (bad(device="abacus"), "--device abacus cannot be used"),
    "no adapter": (bad(**{"init-adapter": "gone"}), r"gone is not an adapter folder"),
    "config missing": (bad(config="gone.toml"), "--config gone.toml does not exist"),
    "median of products": (
        bad(method="flexlora", aggregation="median"),
        "--aggregation median does not go with --method flexlora",
    ),
    "momentum of products": (
        bad(method="flexlora", **{"server-momentum": 0.9}),
        "--server-momentum does not go with --method flexlora",
    ),
    "private products": (
        bad(method="flexlora", **{"dp-clip": 1, "dp-noise": 1}),
        "--dp-clip does not go with --method flexlora",
    ),
    "median of a stack": (
        bad(method="fedex", aggregation="median"),
        "--aggregation median does not go with --method fedex",
    ),
    "median of chosen ranks": (
        bad(method="lora-a2", aggregation="median"),
        "does not go with --method lora-a2 .clients send different",
    ),
    "private choice of ranks": (
        bad(method="lora-a2", **{"dp-clip": 1, "dp-noise": 1}),
        "--dp-clip does not go with --method lora-a2",
    ),
    "balance of one factor": (
        bad(method="ffa", balance=True),
        "--balance does not go with --method ffa .it hands no factor over",
    ),
    "coordinates of both": (
        bad(method="fedavg", **{"local-coordinates": True}),
        "--local-coordinates does not go with --method fedavg",
    ),
    "moments that turn": (
        bad(method="fedsvd", **{"carry-moments": True}),
        "--carry-moments does not go with --method fedsvd",
    ),
    "moments of none": (
        bad(optimizer="sgd", **{"carry-moments": True}),
        "--carry-moments does not go with --optimizer sgd",
    ),
    "ranks of a common factor": (
        bad(**{"client-ranks": "2,4"}),
        "--client-ranks does not go with --method rolora",
    ),
    "ranks over the rank": (
        bad(method="flora", **{"client-ranks": "2,5"}),
        "--client-ranks 2,5: 5 is over --rank 4",
    ),
    "ranks that are none": (
        bad(method="flora", **{"client-ranks": "2,few"}),
        "--client-ranks '2,few': expected whole numbers",
    ),
    "clip without noise": (bad(**{"dp-clip": 1}), "--dp-clip and --dp-noise are given together"),
    "private median": (
        bad(aggregation="median", **{"dp-clip": 1, "dp-noise": 1}),
        "--aggregation median does not go with --dp-clip",
    ),
    "private and weighted": (
        bad(weighting="examples", **{"dp-clip": 1, "dp-noise": 1}),
        "weights are uniform",
    ),
    "private and bounded": (
        bad(**{"max-update-norm": 3, "dp-clip": 1, "dp-noise": 1}),
        "would leak",
    ),
    "private and a quorum": (
        bad(quorum=2, **{"dp-clip": 1, "dp-noise": 1}),
        "must not decide what is released",
    ),
    "poisson of all": (bad(sampling="poisson"), "--sampling poisson needs --clients-per-round"),
    "trims nothing": (
        bad(aggregation="trimmed-mean", **{"trim-fraction": 0}),
        "--trim-fraction 0 trims nothing",
    ),
    "trims all": (bad(**{"trim-fraction": 0.5}), "--trim-fraction 0.5: expected at most 0.49"),
    "unknown wire": (
        bad(**{"exchange-dtype": "int4"}),
        "--exchange-dtype 'int4' is not one of fp32, bf16, fp16, int8",
    ),
    "schedule": (bad(schedule="BAC"), "expected letters A and B"),
    "resume nothing": (bad("--resume", **{"output-dir": "gone"}), "gone holds no run"),
    "resume where": (bad("--resume"), "--resume needs --output-dir"),
    "model without data": (
        bad("--model", "ROBERTA", only=True),
        "is no causal LM and no data are named",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_writes_nothing(name, files, tmp_path, call, monkeypatch):
    (args, flags), message = BAD_INPUT[name]
    monkeypatch.chdir(tmp_path)
    flags = {k: files["root"] if v == "ROOT" else v for k, v in flags.items()}
    if flags.pop("only", False):
        args = [files["roberta"] if a == "ROBERTA" else a for a in args]
    elif "--resume" not in args:
        args = [*args, *small(files, **flags)]
    else:
        args = [*args, *(part for k, v in flags.items() for part in (f"--{k}", v))]
    code, out, err = call(*args)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    import re

    assert re.search(message, err), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, message",
    [
        ("rouns = 3\n", "unknown key 'rouns'; did you mean rounds?"),
        ("[federatoin]\nrounds = 3\n", r"unknown table \[federatoin\]; did you mean federation?"),
        ('rounds = "3"\n', "--rounds '3': expected a whole number"),
        ("rounds = \n", "is not valid TOML"),
        ("dropout = 1.5\n", "--dropout 1.5: expected at most 1"),
    ],
)
def test_bad_toml(text, message, files, tmp_path, call):
    import re

    (tmp_path / "c.toml").write_text(text)
    flags = small(files)
    del flags[flags.index("--rounds") : flags.index("--rounds") + 2]
    code, _, err = call("--config", tmp_path / "c.toml", *flags)
    assert code == 2 and re.search(message, err) and err.count("\n") == 1


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


def test_a_label_seen_only_in_evaluation(files, tmp_path, call):
    (tmp_path / "odd.jsonl").write_text(json.dumps({"text": "the moon", "label": "space"}) + "\n")
    code, _, err = call(
        *small(files, **{"eval-file": tmp_path / "odd.jsonl", "output-dir": tmp_path / "run"})
    )
    assert (
        code == 2
        and "label 'space' (row 1) does not occur in the training data" in err
        and not (tmp_path / "run").exists()
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
    epsilons = [row["epsilon"] for row in rows(tmp_path / "run")[1:]]
    assert code == 0 and len(epsilons) == 3 and epsilons == sorted(epsilons)
    ledger = tmp_path / "run" / "privacy.json"
    assert ledger.stat().st_mode & 0o777 == 0o600
    for path in (tmp_path / "run" / "checkpoints").rglob("state.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o600
    ledger.unlink()
    code, _, err = call("--resume", "--output-dir", tmp_path / "run", "--rounds", 4)
    assert code == 2 and "privacy.json is missing" in err and err.count("\n") == 1


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


@pytest.mark.parametrize(
    "flag, value",
    [
        ("seed", 2**64), ("threads", 100_000), ("dp-clip", "inf"), ("dp-clip", 1e300), ("lr", 1e300),
        ("lr", "nan"), ("lr", "inf"), ("alpha", "nan"), ("alpha", 1e300), ("rank", 10**12),
        ("rounds", 10**30), ("clients", 10**30), ("batch-size", 10**18), ("max-length", 10**18),
        ("server-lr", "inf"), ("weight-decay", 1e300), ("deadline", "inf"), ("max-weight", 2**31),
        ("dropout", "nan"), ("dp-noise", 1e300), ("trim-fraction", "nan"), ("text-column", "\ud800"),
    ],
)  # fmt: skip
def test_extreme_options_are_one_line(flag, value, files, tmp_path, call):
    flags = small(files, **{flag: value, "output-dir": tmp_path / "run"})
    code, _, err = call(*flags)
    assert code == 2 and f"--{flag}" in err and "expected" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
