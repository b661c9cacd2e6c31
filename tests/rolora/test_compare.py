"""Comparisons and reports: what is trained is what `rolora.train` trains, nothing twice, and the
tables say what the runs say.
"""

import statistics

import pytest
import torch

from rolora import compare, config
from rolora.hf.shelf import Shelf
from rolora.reporting.runs import Run
from rolora.run import job
from tests.rolora.commands import bits, rows, small
from tests.rolora.comparisons import flags, read_csv


def test_models_of_a_shelf_are_those_that_are_loaded_alone(files):
    shelf = Shelf()
    for seed in (3, 4):
        flags = dict(
            model=str(files["roberta"]),
            train_file=str(files["train"]),
            eval_file=str(files["eval"]),
            seed=seed,
            max_length=32,
        )
        alone, shared, again = (
            job.prepare(config.resolve(flags), *extra) for extra in ((), (shelf,), (shelf,))
        )
        mine, theirs = alone.model.state_dict(), shared.model.state_dict()
        assert list(mine) == list(theirs) and all(
            torch.equal(mine[key], theirs[key]) for key in mine
        )
        bases, heads = (
            [m.get_parameter(name).data_ptr() for m in (shared.model, again.model)]
            for name in ("roberta.embeddings.word_embeddings.weight", "classifier.dense.weight")
        )
        assert bases[0] == bases[1] and heads[0] != heads[1], "the base is one, heads are not"


def test_a_comparison_trains_what_train_trains_and_repeats_nothing(
    files, tmp_path, call, monkeypatch
):
    args = (
        *flags(files),
        "--methods",
        "rolora,fedavg,rolora+balance+lr=0.02",
        "--seeds",
        2,
        "--rates",
        "0.01,0.005",
        "--tuning-seeds",
        1,
        "--long",
        2,
        "--output-dir",
        tmp_path / "all",
    )
    code, out, err = call(*args, command=compare.command)
    assert (code, err) == (0, "")
    lines = {line["method"]: line for line in read_csv(tmp_path / "all" / "compare.csv")}
    assert list(lines) == [
        "rolora",
        "fedavg",
        "rolora+balance+lr=0.02",
        *(f"{m}, 2 × the rounds" for m in ("rolora", "fedavg", "rolora+balance+lr=0.02")),
    ]
    assert float(lines["rolora+balance+lr=0.02"]["lr"]) == 0.02 and float(
        lines["rolora"]["lr"]
    ) in (0.01, 0.005)
    assert (tmp_path / "all" / "compare.png").stat().st_size > 5000 and len(
        list((tmp_path / "all" / "tuning").iterdir())
    ) == 4
    rate = lines["rolora"]["lr"]
    runs = [rows(tmp_path / "all" / "runs" / f"rolora-lr{rate}-seed{seed}") for seed in (0, 1)]
    finals = [run[-1]["eval"]["accuracy"] for run in runs]
    assert float(lines["rolora"]["accuracy"]) == pytest.approx(statistics.fmean(finals))
    assert float(lines["rolora"]["MB up"]) == pytest.approx(
        statistics.fmean(sum(r["bytes_up"] for r in run) for run in runs) / 1e6
    )
    assert lines["rolora, 2 × the rounds"]["rounds"] == "4" and lines["rolora"]["rounds"] == "2"

    given = [
        part
        for part in small(files, rounds=2, lr=rate, seed=1, **{"output-dir": tmp_path / "alone"})
    ]
    assert call(*given)[0] == 0
    assert bits(tmp_path / "alone") == bits(tmp_path / "all" / "runs" / f"rolora-lr{rate}-seed1")

    monkeypatch.setattr("rolora.run.session.Session", None)  # nothing may be trained again
    assert call(*args, command=compare.command)[1] == out
    monkeypatch.undo()
    code, _, err = call(*args, "--rank", 2, command=compare.command)
    assert code == 2 and "holds a comparison with --rank 4, now 2" in err and err.count("\n") == 1


def test_an_interrupted_comparison_goes_on(files, tmp_path, call, monkeypatch):
    args = (
        *flags(files, rounds=3),
        "--methods",
        "rolora,ffa",
        "--seeds",
        1,
        "--lr",
        0.01,
        "--output-dir",
        tmp_path / "cut",
    )
    whole = (*args[:-1], tmp_path / "whole")
    assert call(*whole, command=compare.command)[0] == 0
    from rolora.federated.server import Server

    advance = Server._round

    def cut(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return advance(self, number)

    monkeypatch.setattr(Server, "_round", cut)
    code, out, _ = call(*args, command=compare.command)
    assert code == 130 and "the same command goes on" in out
    monkeypatch.undo()
    assert call(*args, command=compare.command)[0] == 0
    for place in ("rolora-lr0.01-seed0", "ffa-lr0.01-seed0"):
        assert bits(tmp_path / "cut" / "runs" / place) == bits(tmp_path / "whole" / "runs" / place)


def test_a_run_that_diverges_counts_as_nothing_and_does_not_end_the_others(files, tmp_path, call):
    code, out, err = call(
        *flags(files, optimizer="sgd", **{"max-grad-norm": 0}),
        "--methods",
        "rolora",
        "--seeds",
        1,
        "--rates",
        "1e30,0.01",
        "--tuning-seeds",
        1,
        "--output-dir",
        tmp_path / "all",
        command=compare.command,
    )
    assert (
        (code, err) == (0, "")
        and "rolora: lr 1e+30: accuracy 0.0000, loss inf" in out
        and "lr 0.01, seed 0" in out
    )


@pytest.mark.parametrize(
    "headline, evaluations, best",
    [
        ("accuracy", {0.1: (0.5, 1.0), 0.2: (0.7, 2.0), 0.3: (0.6, 0.1)}, 0.2),
        ("exact_match", {0.1: (0.0, 1.0), 0.2: (0.0, 0.4), 0.3: (0.0, 2.0)}, 0.2),
        ("perplexity", {0.1: (9.0, 1.0), 0.2: (7.0, 0.9), 0.3: (8.0, 0.5)}, 0.2),
    ],
)
def test_the_rate_is_chosen_by_the_metric_its_way_and_ties_by_the_loss(
    headline, evaluations, best, tmp_path, monkeypatch, capsys
):
    def run(self, name, place, lr, **values):
        value, loss = evaluations[lr]
        made = [{"eval": {headline: v, "loss": loss}} for v in (9e9, value - 0.01, value + 0.01)]
        return Run(tmp_path, {}, made, headline)

    monkeypatch.setattr(compare.Comparison, "run", run)
    comparison = compare.Comparison(tmp_path, {}, None, None)
    assert comparison.best_rate("rolora", list(evaluations), 2) == best
    assert "the mean of the last two evaluations and of 2 seeds" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, message",
    [
        (("--methods", "rolora,prox"), "--method 'prox' is not one of"),
        (("--rates", "fast"), "expected positive numbers"),
        (("--seeds", 0), "--seeds 0: expected at least 1"),
        (("--rates", "0.1,0.2", "--lr", 0.1), "--lr and --rates exclude each other"),
        (("--methods", "rolora+seed=3"), "seed is not a variant's to say"),
        (("--methods", ","), "expected variants separated by commas"),
        (("--methods", "rolora+rank=many"), "rank 'many': expected a whole number"),
    ],
)
def test_bad_input_of_comparisons(args, message, files, tmp_path, call):
    code, _, err = call(
        *flags(files), *args, "--output-dir", tmp_path / "new", command=compare.command
    )
    assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "new").exists()


def test_methods_are_crossed_with_wires_and_the_front_is_what_the_runs_say(files, tmp_path, call):
    folder = tmp_path / "crossed"
    args = (
        *flags(files, rounds=3),
        *("--methods", "rolora,fedavg,ffa+exchange-dtype=fp32", "--wires", "bf16,int8"),
        *("--seeds", 2, "--rates", "0.01,0.02", "--tuning-seeds", 1, "--target", 0.1),
        *("--budget-bytes", "40e3", "--output-dir", folder),
    )
    code, out, err = call(*args, command=compare.command)
    assert (code, err) == (0, "")
    lines = read_csv(folder / "front.csv")
    assert [(line["method"], line["wire"]) for line in lines] == [
        ("rolora", "bf16"),
        ("rolora", "int8"),
        ("fedavg", "bf16"),
        ("fedavg", "int8"),
        ("ffa+exchange-dtype=fp32", "fp32"),
    ]
    assert (folder / "front.png").stat().st_size > 5000
    tuned = {path.name for path in (folder / "tuning").iterdir()}
    assert sum("exchange-dtype=int8" in name for name in tuned) == 0 and len(tuned) == 6, (
        "a method's rate is chosen once, at the first wire"
    )
    whole = {line["method"]: line for line in read_csv(folder / "compare.csv")}
    assert whole["rolora int8"]["lr"] == whole["rolora bf16"]["lr"]
    assert float(whole["rolora int8"]["MB up"]) < 0.75 * float(whole["rolora bf16"]["MB up"])
    for line in lines:
        place = f"{line['method']}+exchange-dtype={line['wire']}"
        place = line["method"] if line["method"].startswith("ffa") else place
        runs = [rows(path) for path in sorted((folder / "runs").glob(f"{place}-lr*"))]
        assert len(runs) == 2
        for way, keys in (("up", ["bytes_up"]), ("both", ["bytes_up", "bytes_down"])):
            sent = [[sum(row[key] for key in keys) for row in run] for run in runs]
            assert float(line[f"MB {way}"]) == pytest.approx(sum(map(sum, sent)) / 2e6)
            last = []
            for run, costs in zip(runs, sent, strict=True):
                fitting = [n for n in range(1, 4) if sum(costs[: n + 1]) <= 40e3]
                last.append(run[fitting[-1]]["eval"]["accuracy"] if fitting else None)
            told = line[f"within 0.04 MB {way}"]
            assert told == "" if None in last else float(told) == pytest.approx(sum(last) / 2)
    names = [line["method"] for line in lines if line["front, up"] == "yes"]
    assert names, "some point is beaten by none"


@pytest.mark.parametrize(
    "extra, told",
    [
        (("--wires", "int3"), "expected some of fp32, bf16, fp16, int8, int4"),
        (("--wires", ""), "expected some of"),
        (("--wires", "int8", "--exchange-dtype", "bf16"), "exclude each other"),
        (("--budget-bytes", "0"), "expected a positive number of bytes"),
    ],
)
def test_wires_and_budgets_that_cannot_be(extra, told, files, tmp_path, call):
    args = (*flags(files), "--methods", "rolora", "--output-dir", tmp_path / "x", *extra)
    code, _, err = call(*args, command=compare.command)
    assert code == 2 and told in err and err.count("\n") == 1 and not (tmp_path / "x").exists()
