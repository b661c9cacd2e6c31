"""Tables of the suite say what its records do."""

import pytest

from benchmarks.suite import goals, records, tables
from benchmarks.suite.jobs import JOBS, chosen
from tests.benchmarks.suite_records import record

MNIST = "mnist-iid"  # judges, in 30 rounds


def test_differences_are_paired_by_seed():
    mine = [tables.Recorded(record(seed=s, final=v)) for s, v in ((0, 0.6), (1, 0.8), (7, 0.1))]
    theirs = [tables.Recorded(record(seed=s, final=v)) for s, v in ((1, 0.5), (0, 0.5), (3, 1.0))]
    gap, error = tables.paired(mine, theirs)
    assert gap == pytest.approx(0.2)  # of .1 and .3
    assert error == pytest.approx(0.1)  # their standard deviation is .1 √2, over √2


def test_a_lower_loss_is_the_better_one():
    one, other = ([tables.Recorded(record(headline="loss", final=value))] for value in (1.0, 1.5))
    assert tables.paired(one, other) == (0.5, None)


def test_the_summary_has_the_median_over_jobs_of_a_kind_and_the_front(tmp_path, capsys):
    gaps = {"builtin": 0.4, "digits-10x1": 0.1, "digits-iid": 0.3, "digits-5x2": -0.2}
    for job, gap in gaps.items():
        curve = [[0, 0.0, 0.0, 0.1], [20, 4.0, 5.0, 0.5 + gap]]
        for seed in (0, 1):
            records.add(record(job=job, seed=seed, final=0.5), tmp_path)
            records.add(record(job=job, seed=seed, method="fedavg", curve=curve), tmp_path)
        records.add(record(job=job, method="ffa", final=0.0), tmp_path)
    tables.summary(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    # fedavg sends twice as much: on the front where it is better.
    assert "| choose | SGD, all | fedavg | bf16 | 1 | 3 | +0.1000 | -0.2000 | 2 |" in lines
    assert "| choose | SGD, all | rolora | bf16 | 1 | 3 | +0.0000 | +0.0000 | 3 |" in lines
    assert "| choose | AdamW, all | fedavg | bf16 | 1 | 1 | +0.4000 | +0.4000 | 1 |" in lines
    assert not any("ffa" in line for line in lines), "it ran once"


def test_the_kinds_of_jobs():
    kinds = {job.name: job.kind for job in JOBS}
    assert kinds["mnist-iid"] == "SGD, all"
    assert kinds["verses-d.1-all-30"] == "AdamW, all"
    assert kinds["builtin-d.1-tenth"] == "AdamW, some"


def test_figures_of_a_text(tmp_path):
    for seed, values in enumerate(((0.5, 0.6), (0.7, 0.9))):
        for method, final in zip(("rolora", "fedavg"), values, strict=True):
            records.add(record(seed=seed, method=method, final=final), tmp_path)
    found = tables.figures(tmp_path)
    assert found["suite builtin rolora bf16"] == ".600"
    assert found["suite builtin rolora bf16 MB"] == "2.00"
    assert found["suite builtin fedavg bf16 - rolora bf16"] == "+0.150 ± 0.050"


def test_a_run_that_was_repeated_under_another_configuration_counts_once(tmp_path):
    records.add(record(final=0.1), tmp_path)
    records.add(record(final=0.2, digest="1"), tmp_path)
    (runs,) = tables.held_out("builtin", tmp_path).values()
    assert [run.final for run in runs] == [0.2]


def of_mnist(place, method, wire, finals, *, rounds=30, MB=1.0, job=MNIST):
    for seed, final in enumerate(finals):
        curve = [[0, 0.0, 0.0, 0.1], [rounds, MB, 2 * MB, final]]
        own = record(job=job, method=method, wire=wire, seed=seed, curve=curve, rounds=rounds)
        records.add(own | {"digest": f"{method}{wire}{rounds}{seed}"}, place)


def test_runs_of_more_rounds_are_told_apart_from_those_of_the_jobs_own(tmp_path, capsys):
    of_mnist(tmp_path, "rolora", "bf16", (0.5, 0.6))
    of_mnist(tmp_path, "rolora", "bf16", (0.7, 0.9), rounds=45)
    found = tables.figures(tmp_path)
    assert found[f"suite {MNIST} rolora bf16"] == ".550"
    assert found[f"suite {MNIST} rolora bf16 in 45"] == ".800"
    assert found[f"suite {MNIST} rolora bf16 in 45 - rolora bf16"] == "+0.250 ± 0.050"
    tables.summary(tmp_path)
    assert "| judge | SGD, all | rolora | bf16 | 1.5 | 1 | +0.2500 | +0.2500 |" in (
        capsys.readouterr().out
    )


def test_goals_are_held_against_the_best_rival_with_as_many_runs_as_any(tmp_path):
    of_mnist(tmp_path, "rolora", "int8", (0.5, 0.7), MB=1.0)
    of_mnist(tmp_path, "rolora+alpha=8", "bf16", (0.9, 0.9))  # ours: no rival
    of_mnist(tmp_path, "fedavg", "bf16", (0.4, 0.5), MB=4.0)
    of_mnist(tmp_path, "ffa", "bf16", (0.3, 0.3), MB=2.0)
    of_mnist(tmp_path, "fedex", "bf16", (0.99,), MB=2.0)  # one seed
    of_mnist(tmp_path, "flora", "bf16", (0.8, 0.8), rounds=60)  # not the job's rounds
    job = chosen(None, MNIST)[0]
    groups = tables.held_out(MNIST, tmp_path)
    found = goals.beside(job, groups, ("rolora", "int8", 30), "bf16")
    assert (found.rival, found.share) == ("fedavg", 0.25)
    assert found.gap == pytest.approx(0.15) and found.error == pytest.approx(0.05)
    assert goals.beside(job, groups, ("rolora", "int8", 30), "int8") is None


def test_of_losses_the_lowest_rival_is_the_best(tmp_path):
    for method, final in (("rolora", 2.0), ("fedavg", 3.0), ("ffa", 2.5)):
        for seed in (0, 1):
            own = dict(job=MNIST, method=method, seed=seed, final=final, headline="loss")
            records.add(record(**own), tmp_path)
    job, groups = chosen(None, MNIST)[0], tables.held_out(MNIST, tmp_path)
    found = goals.beside(job, groups, ("rolora", "bf16", 30), "bf16")
    assert (found.rival, found.gap) == ("ffa", 0.5)


@pytest.mark.parametrize("ours, rival", [((0.5, 0.6), (0.4,)), ((0.5,), (0.4, 0.5))])
def test_what_ran_once_is_not_compared(tmp_path, ours, rival):
    of_mnist(tmp_path, "rolora", "int8", ours)
    of_mnist(tmp_path, "fedavg", "bf16", rival)
    job, groups = chosen(None, MNIST)[0], tables.held_out(MNIST, tmp_path)
    assert goals.beside(job, groups, ("rolora", "int8", 30), "bf16") is None


def test_medians_do_not_mix_losses_with_accuracies(tmp_path, capsys):
    for job, headline in (("verses-tokens-6", "loss"), ("verses-d.1-tenth-6", "accuracy")):
        for seed in (0, 1):
            records.add(record(job=job, headline=headline, seed=seed), tmp_path)
    tables.summary(tmp_path)
    said = capsys.readouterr().out
    for kind in ("AdamW, some", "AdamW, some, loss"):
        assert f"| judge | {kind} | rolora | bf16 | 1 | 1 | +0.0000 | +0.0000 | 1 |" in said


def test_the_table_of_goals_has_judging_jobs_and_medians_over_them(tmp_path, capsys):
    for job, ours in ((MNIST, (0.5, 0.7)), ("mnist-5x2", (0.7, 0.7))):
        for wire in goals.RIVALS_WIRES:
            of_mnist(tmp_path, "fedavg", wire, (0.4, 0.5), MB=4.0, job=job)
        of_mnist(tmp_path, "rolora", "int8", ours, MB=1.0, job=job)
    of_mnist(tmp_path, "rolora*2", "int8", (0.6, 0.6))  # on one job: no median
    records.add(record(wire="int8"), tmp_path)  # chooses
    goals.table(tmp_path)
    _, _, *rows = capsys.readouterr().out.splitlines()
    first, second = "fedavg | 25% | +0.1500 ± 0.0500", "fedavg | 25% | +0.2500 ± 0.0500"
    assert rows == [
        f"| mnist-5x2 | rolora | int8 | 1 | {second} | {second} |",
        f"| {MNIST} | rolora | int8 | 1 | {first} | {first} |",
        f"| {MNIST} | rolora*2 | int8 | 1 | {first} | {first} |",
        "| median of 2, SGD, all | rolora | int8 | 1 |  |  | +0.2000 |  |  | +0.2000 |",
    ]
