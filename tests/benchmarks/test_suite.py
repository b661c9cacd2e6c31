"""The suite: what is written down beforehand holds, runs are not repeated, and every method
has as many tries.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.suite import images, records, running, tables, texts
from benchmarks.suite.__main__ import main
from benchmarks.suite.jobs import CHOOSE, JOBS, JUDGE, SIDES, chosen
from benchmarks.suite.running import HELD_OUT, VALIDATION, Contender, Runner
from rolora.errors import BadInput
from rolora.run.job import prepare
from tests.benchmarks.suite_records import record

DIGITS = chosen(None, "digits-5x2")[0]


# Jobs


def test_jobs_have_names_of_their_own_and_each_side_has_every_kind():
    assert len({job.name for job in JOBS}) == len(JOBS)
    for side in SIDES:
        found = chosen(side, None)
        steps = {job.options.get("local_steps") for job in found if job.text}
        assert {1, 6, 30} <= steps
        assert {job.options.get("clients_per_round") for job in found} >= {None, 5}
        splits = {
            (job.options.get("partition"), job.options.get("dirichlet_alpha")) for job in found
        }
        assert {("dirichlet", 0.1), ("dirichlet", 0.3), ("column", None)} <= splits
        assert any(job.options.get("task_type") == "causal-lm" for job in found)


def test_what_judges_was_not_seen_when_defaults_were_chosen():
    judging = chosen(JUDGE, None)
    assert not {job.text for job in judging if job.text} & {
        job.text for job in chosen(CHOOSE, None) if job.text
    }
    # The first study chose on the digits and on the built-in text's labels.
    assert not any(job.split and job.images == "digits" for job in judging)
    on_builtin = [job for job in judging if job.text is None and job.split is None]
    assert not any("task_type" not in job.options for job in on_builtin)


def test_a_job_that_there_is_not_is_named(capsys):
    assert main(["--jobs", "nowhere"]) == 2
    assert "--jobs nowhere" in capsys.readouterr().err


def test_a_job_of_texts_says_how_to_get_them(capsys, tmp_path):
    assert main(["--jobs", "reviews-d.1-all", "--list", "--texts", str(tmp_path / "none")]) == 2
    assert "--fetch" in capsys.readouterr().err


def test_a_whole_name_is_that_job_and_a_part_is_all_that_hold_it():
    assert [job.name for job in chosen(None, "builtin")] == ["builtin"]
    assert {job.name for job in chosen(None, "builtin,5x2")} == {
        *("builtin", "digits-5x2", "mnist-5x2")
    }


def test_a_job_of_images_says_how_to_get_them(capsys, tmp_path):
    for own in ([], ["--texts", str(tmp_path / "none")]):
        assert main(["--jobs", "mnist-iid", "--list", *own]) == 2
        assert "--fetch" in capsys.readouterr().err


# Images


def test_images_are_cut_into_three_parts_that_share_no_row():
    rows = [[i % 256, *[i % 7] * 783, i % 10] for i in range(250)]
    found = images.mnist("\n".join(",".join(map(str, row)) for row in rows).encode())
    parts = (found.train, found.held, found.test)
    assert [len(labels) for _, labels in parts] == [160, 40, 50]
    seen = np.concatenate([np.rint(x[:, 0] * 255).astype(int) for x, _ in parts])
    assert sorted(seen) == list(range(250))
    for x, labels in parts:
        assert x.dtype == np.float32 and x.shape[1] == 784 and 0 <= x.min() and x.max() <= 1
        np.testing.assert_array_equal(np.rint(x[:, 0] * 255).astype(int) % 10, labels)


# Texts


def test_reviews_are_held_out_as_a_whole_and_told_by_their_mean_rating():
    lines = ["4_1\t0.51\tgood", "5_1\t-0.51\tbad", "5_2\t0.5\tit is", "7_1\t-0.5\tso so"]
    train, held = texts.reviews("\n".join(lines).encode())
    assert [(row["text"], row["label"], row["owner"]) for row in train] == [
        ("good", "positive", "owner 00"),
        ("so so", "neutral", "owner 01"),
    ]
    assert [(row["text"], row["label"]) for row in held] == [
        ("bad", "negative"),
        ("it is", "neutral"),
    ]


def test_verses_are_told_by_their_part_and_every_fourth_is_taken():
    books = ["Genesis", "1 John", "John", "2 Kings"] * 4 + ["Song of Solomon"]
    data = "\n".join(json.dumps({"book": b, "text": f"{i}"}) for i, b in enumerate(books)).encode()
    train, held = texts.verses(data)
    assert [row["text"] for row in train] == ["0", "4", "8", "16"]
    assert [row["text"] for row in held] == ["12"]
    assert train[-1]["label"] == "poetry"
    parts = [texts.part_of(book) for book in ("1 John", "John", "2 Kings", "Titus", "Acts")]
    assert parts == [
        *("letters and revelation", "gospels and acts", "history"),
        *("letters and revelation", "gospels and acts"),
    ]
    with pytest.raises(ValueError, match="Judith"):
        texts.part_of("Judith")


# Records

BY_ROWS = {"partition": "column", "client_column": "label"}
SOME_BY_ROWS = BY_ROWS | {"clients_per_round": 5}


def test_a_digest_tells_configurations_apart_but_not_where_files_lie():
    options = {"lr": 0.1, "model": "/one/place", "engine": "batched"}
    same = records.digest(options | {"model": "/another", "engine": "sequential"}, "data")
    assert records.digest(options, "data") == same
    assert records.digest(options | {"lr": 0.2}, "data") != same
    assert records.digest(options, "other data") != same


def test_an_option_that_came_later_leaves_old_records_as_they_are():
    old = {"lr": 0.1}
    assert "beta2" not in json.loads(records._DEFAULTS.read_text())
    younger = old | {"beta2": 0.999, "batch_size": 16}
    assert records.digest(younger, "data") == records.digest(old, "data")
    for changed in ({"beta2": 0.95}, {"batch_size": 8}):
        assert records.digest(old | changed, "data") != records.digest(old, "data")


FOLLOW = "rolora+equal-factors+realign-moments+carry-moments"
ANEW = "rolora+equal-factors+realign-moments=false+carry-moments=false"


@pytest.mark.parametrize(
    "own, everybody",
    [({}, True), ({"clients_per_round": 3}, False), (BY_ROWS, True), (SOME_BY_ROWS, False)],
    ids=["all", "some", "all of a column's", "some of a column's"],
)
def test_a_default_that_a_job_decides_by_its_size_is_what_it_is_by_name(own, everybody):
    job = next(job for job in JOBS if job.name == "builtin")
    job = replace(job, options={**job.options, **own})

    def digest(method):
        return Runner(None)._digest(job, Contender(method, "int8"), 0.02, 0, HELD_OUT)

    by_default = digest(FOLLOW if everybody else ANEW)
    assert digest("rolora") == digest("rolora+equal-factors") == by_default
    assert (digest("rolora+realign-moments") == by_default) is everybody
    assert digest("rolora+equal-factors+realign-moments") == digest(FOLLOW)
    without = digest("rolora+equal-factors=false")
    assert len({digest(FOLLOW), digest(ANEW), without}) == 3
    assert (digest("rolora+carry-moments=false") == by_default) is not everybody
    assert digest("fedavg") == digest("fedavg+equal-factors=false")
    made = Runner(None).configuration(job, Contender("rolora", "int8"), 0.02, 0, HELD_OUT)
    made = prepare(made, weights=False).config
    assert made.federation.equal_factors is True
    assert made.optimisation.realign_moments is made.optimisation.carry_moments is everybody


@pytest.mark.parametrize(
    "job", [job for job in JOBS if job.text is None and job.split is None], ids=lambda job: job.name
)
def test_records_are_of_what_their_method_is_called_today(job):
    """A default that changed since has its records under another name."""
    found = records.read(job.name)
    assert found
    for one in found:
        run = Runner(None, length=one["rounds"] / job.options["rounds"])
        who = Contender(one["method"], one["wire"])
        assert run._digest(job, who, one["rate"], one["seed"], one["on"]) == one["digest"], who


def test_a_default_that_changes_does_not_pass_for_what_it_was(monkeypatch):
    before = records.digest({"batch_size": 16}, "data")
    monkeypatch.setattr(records.Config, "values", lambda self: {"batch_size": 32})
    records._usual.cache_clear()
    assert records.digest({"batch_size": 32}, "data") != before
    records._usual.cache_clear()


@pytest.mark.parametrize("line", ["{", "[]", '{"job": "builtin"}', "1"])
def test_a_damaged_record_is_named_by_its_line(tmp_path, line):
    records.add(record(), tmp_path)
    path = tmp_path / "builtin.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(BadInput, match="line 2 is damaged"):
        records.read("builtin", tmp_path)


# Runs


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """A runner whose runs are counted and reach (what the test says of a method and a rate)."""
    runner, done = Runner(None, tmp_path), []

    def run(job, who, rate, seed, on):
        done.append((who.text, who.wire, rate, seed, on))
        value = {0.03: 0.1, 0.1: 0.2, 0.5: 0.4, 2.0: 0.9, 8.0: 0.7}[rate]
        keys = ("headline", "rounds", "curve", "loss", "diverged")
        made = record(final=0.0 if who.text == "fedavg" and rate == 2.0 else value)
        return {key: made[key] for key in keys}

    monkeypatch.setattr(runner, "_two_layer_run", run)
    return runner, done


def test_the_best_rate_on_the_validation_slice_and_as_many_tries_for_all(counted):
    runner, done = counted
    assert runner.rate(DIGITS, Contender("rolora", "bf16")) == 2.0
    assert runner.rate(DIGITS, Contender("fedavg", "bf16")) == 8.0
    tries = [text for text, *_ in done]
    assert tries.count("rolora") == tries.count("fedavg") == len(DIGITS.rates) * DIGITS.tuning
    assert {on for *_, on in done} == {VALIDATION}
    assert not {seed for *_, seed, _ in done} & set(range(100)), "no result uses a tuning seed"


def test_what_is_recorded_is_not_repeated_even_by_another_process(counted):
    runner, done = counted
    who = Contender("rolora", "bf16")
    runner.run(DIGITS, who, 0.5, 0, HELD_OUT)
    again = Runner(None, runner.folder)
    assert again.run(DIGITS, who, 0.5, 0, HELD_OUT)["curve"][-1][-1] == 0.4
    assert len(done) == 1
    for other in (Contender("rolora", "int8"), Contender("rolora*2", "bf16")):
        assert runner.known(DIGITS, other, 0.5, 0, HELD_OUT) is None


def test_twice_the_rank_has_twice_the_alpha_unless_it_names_its_own(counted):
    runner, _ = counted
    job = chosen(None, "builtin")[0]
    for text, alpha in (("rolora", 16), ("rolora*2", 32), ("rolora+alpha=16*2", 16)):
        made = runner.configuration(job, Contender(text, "int8"), 0.02, 0, HELD_OUT).adapter
        assert (made.rank, made.alpha) == (8 if "*2" in text else 4, alpha)


def test_an_option_without_effect_on_a_job_is_recorded_under_its_own_name(counted):
    runner, done = counted
    runner.run(DIGITS, Contender("rolora", "bf16"), 0.5, 0, HELD_OUT)
    same = Contender("rolora+carry-moments=false", "bf16")  # SGD has none
    assert runner.run(DIGITS, same, 0.5, 0, HELD_OUT)["method"] == same.text
    assert len(done) == 1
    assert len(tables.held_out(DIGITS.name, runner.folder)) == 2


def test_a_method_that_a_job_cannot_have_is_told(counted):
    runner, _ = counted
    reason = runner.why_not(DIGITS, Contender("fedavg+carry-moments", "bf16"))
    assert reason is not None and "--carry-moments" in reason
    assert runner.why_not(DIGITS, Contender("fedavg", "bf16")) is None


def test_a_run_that_diverged_counts_as_one_of_the_rounds_it_should_have_had():
    federation = SimpleNamespace(rounds=30, clients=5)
    made = SimpleNamespace(headline="accuracy", config=SimpleNamespace(federation=federation))
    row = {"round": 12, "bytes_up": 1, "bytes_down": 1, "eval": {"accuracy": 0.5, "loss": 9.0}}
    kept = running._record([row], made, True)
    assert (kept["rounds"], kept["diverged"], kept["loss"]) == (30, True, None)


# All of it


@pytest.mark.slow
def test_every_step_works(capsys):
    assert main(["--smoke"]) == 0
    said = capsys.readouterr().out
    for job in ("builtin", "digits-5x2", "tokens-iid-all"):
        for contender in ("rolora*2 | bf16", "rolora*2 | int8", "fedavg | bf16", "fedavg | int8"):
            assert f"| {job} | choose | {contender} | 2 |" in said
