"""One clear line for everything that is wrong, and nothing written or lost."""

import json

import pytest

from rolora import config
from tests.rolora.commands import small


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
    "private rounds after a gradient that is not": (
        bad(method="fed-sb", **{"dp-clip": 1, "dp-epsilon": 3}),
        "--dp-clip does not go with --method fed-sb .its factors come from a gradient",
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
    "second moments of none": (
        bad(optimizer="sgd", beta2=0.9),
        "--beta2 0.9 does not go with --optimizer sgd",
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
    "epsilon and noise": (
        bad(**{"dp-clip": 1, "dp-noise": 1, "dp-epsilon": 3}),
        "--dp-epsilon 3 and --dp-noise 1 exclude each other",
    ),
    "epsilon without clip": (
        bad(**{"dp-epsilon": 3}),
        "--dp-clip and --dp-noise are given together or not at all, or --dp-epsilon",
    ),
    "an epsilon that nothing has": (
        bad(**{"dp-clip": 1, "dp-epsilon": 1e-4}),
        "--dp-epsilon 0.0001: expected at least 0.00",
    ),
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
        bad(**{"exchange-dtype": "int3"}),
        "--exchange-dtype 'int3' is not one of fp32, bf16, fp16, int8, int4",
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
        ("local_alternation = true\n", "local_alternation is gone, because it lost"),
    ],
)
def test_bad_toml(text, message, files, tmp_path, call):
    import re

    (tmp_path / "c.toml").write_text(text)
    flags = small(files)
    del flags[flags.index("--rounds") : flags.index("--rounds") + 2]
    code, _, err = call("--config", tmp_path / "c.toml", *flags)
    assert code == 2 and re.search(message, err) and err.count("\n") == 1


def test_a_run_from_when_an_option_was_there_and_not_used_goes_on(tmp_path):
    (tmp_path / "config.toml").write_text(
        "[optimisation]\nlr = 0.1\nlocal-alternation = false\n"
        "[federation]\nserver_dampening = 0.0\nserver_nesterov = false\n"
    )
    assert config.read_toml(tmp_path / "config.toml") == {"lr": 0.1}


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
