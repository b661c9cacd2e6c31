"""Presets do for models of any depth."""

import json

import pytest

from rolora import config
from rolora.config import presets
from rolora.config.parsing import parse_layers
from rolora.errors import BadInput
from rolora.hf import architecture
from tests.benchmark_files import write_commonsense, write_glue
from tests.rolora.commands import small


@pytest.mark.parametrize(
    "text, blocks, layers",
    [
        ("18-20", 24, (18, 19, 20)),
        ("0,2,4-5", 6, (0, 2, 4, 5)),
        ("last 6 of 24", 24, tuple(range(18, 24))),
        ("last 8 of 32", 32, tuple(range(24, 32))),
        ("last 8 of 32", 3, (2,)),
        ("last 8 of 32", 22, tuple(range(16, 22))),
        ("last 6 of 32", 1, (0,)),
        ("last 4 of 4", 7, tuple(range(7))),
        (None, 7, None),
    ],
)
def test_layers(text, blocks, layers):
    assert parse_layers(text, blocks) == layers


@pytest.mark.parametrize("text", ["last", "last 0 of 4", "last 5 of 4", "last 2 of", "5-3", "-1"])
def test_layers_that_are_none(text):
    with pytest.raises(BadInput, match="--layers"):
        parse_layers(text, 8)


# What the paper's recipes adapt, on the models that they are for.
PAPER = {
    "builtin": (6, range(3, 6)),
    "commonsense": (32, range(26, 32)),
    "alpaca": (32, range(24, 32)),
    "codealpaca": (32, range(24, 32)),
    "sst2": (24, range(18, 24)),
    "qnli": (24, range(15, 24)),
    "mnli": (24, range(15, 24)),
    "qqp": (24, range(15, 24)),
    "rte": (24, range(16, 24)),
    "flowertune": (32, range(32)),
}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_adapt_the_layers_that_their_models_had(name):
    depth, layers = PAPER[name.partition("-")[0]]
    adapted = parse_layers(presets.PRESETS[name].get("layers"), depth)
    assert adapted == (None if len(layers) == depth else tuple(layers))


def write_alpaca(folder):
    folder.mkdir()
    row = {"instruction": "Where is it?", "input": "", "output": "in the sea"}
    (folder / "train.jsonl").write_text(60 * (json.dumps(row) + "\n"))
    return folder


@pytest.mark.parametrize(
    "preset, family, write",
    [
        ("alpaca", "llama", write_alpaca),
        ("commonsense", "llama", lambda folder: write_commonsense(folder, rows=10)),
        ("rte-3-r4", "roberta", lambda folder: write_glue(folder, "rte")),
    ],
)
def test_a_preset_on_a_model_of_three_blocks(preset, family, write, files, tmp_path, call):
    data = write(tmp_path / "data")
    flags = ("--preset", preset, "--model", files[family], "--dataset", data, "--clients", 3)
    code, _, err = call(*flags, "--dry-run", "--max-length", 300)
    assert code == 2 and "--max-length 300 is over the model's" in err and err.count("\n") == 1
    code, out, err = call(*flags, "--dry-run", "--max-length", 64)
    assert (code, err) == (0, "")
    (adapted,) = [line for line in out.splitlines() if line.startswith("adapted modules: ")]
    assert ".2." in adapted and ".0." not in adapted


def test_a_part_of_an_unknown_number_of_blocks_is_refused(files, call, monkeypatch):
    monkeypatch.setattr(architecture, "blocks", lambda config: None)
    code, _, err = call(*small(files, layers="last 1 of 3"), "--dry-run")
    assert code == 2 and "does not say how many blocks" in err and err.count("\n") == 1


def test_the_papers_way_is_its_algorithm_without_what_we_add():
    from rolora.federated import compatibility

    for optimizer in ("sgd", "adamw"):
        found = config.resolve({"optimizer": optimizer}, preset="paper,builtin")
        values = compatibility.settle(found).values()
        assert values["method"] == "rolora" and values["schedule"] == "BA"
        assert values["weighting"] == "uniform"
        assert values["exchange_dtype"] == "fp32" and values["init"] == "kaiming"
        added = (
            *("carry_moments", "realign_moments", "local_coordinates"),
            *("control_variates", "balance", "equal_factors", "error_feedback"),
        )
        assert {name: values[name] for name in added} == dict.fromkeys(added, False)
        assert values["server_momentum"] == 0 and values["server_lr"] == 1
        assert values["lr"] == presets.PRESETS["builtin"]["lr"]


def test_a_way_stands_beside_what_is_trained_in_any_order():
    assert presets.values("paper,qnli-50-r4") == presets.values("qnli-50-r4, paper")
    assert presets.values("paper,qnli-50-r4")["layers"] == "last 9 of 24"
    assert (
        config.resolve({"exchange_dtype": "int8"}, preset="paper").exchange.exchange_dtype == "int8"
    )


@pytest.mark.parametrize(
    "preset, line",
    [
        ("builtin,rte-3-r4", "--preset builtin,rte-3-r4: expected one preset, and ways to train"),
        ("paper,paper", "--preset paper,paper: expected one preset, and ways to train"),
        ("papre", "did you mean paper?"),
        ("builtin,", "preset '' is not one of"),
    ],
)
@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_presets_that_are_none(preset, line, resume, tmp_path, call):
    code, _, err = call("--preset", preset, *resume, "--output-dir", tmp_path / "run")
    assert code == 2 and line in err and err.count("\n") == 1


def test_the_papers_way_without_a_preset_trains_what_is_implied(call, tmp_path):
    code, out, _ = call("--preset", "paper", "--dry-run", "--output-dir", tmp_path / "run")
    assert code == 0
    assert "exchange: fp32" in out and "moments: AdamW starts anew in every round" in out
    assert "clients: 10" in out


def test_the_plan_says_how_factors_are_handed_over(call, tmp_path):
    anew = "moments: AdamW starts anew in every round"
    for flags, equal, carried in (
        ((), True, True),
        (("--clients-per-round", 3), True, False),
        (("--clients-per-round", 3, "--no-equal-factors"), False, True),
        (("--balance",), False, False),
    ):
        code, out, _ = call(*flags, "--dry-run", "--output-dir", tmp_path / "run")
        assert code == 0 and ("handed over by --equal-factors" in out) is equal
        assert (anew in out) is not carried
