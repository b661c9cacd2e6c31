"""Accuracy against simulated time: what a run is said to have done, and the lines of the table."""

import json

from benchmarks import stragglers


def test_a_run_is_told_by_its_simulated_time():
    run = stragglers.measured("digits", "ffa, K = 5", 1.0, 0, "test", 16.0)
    assert run["answers"] == 5 * run["rounds"] > 0 and run["MB_up"] > 0
    assert len(run["curve"]) == 16 and run["until"] == 16.0
    # Tasks take 5 seconds, or 50: nothing can have counted before, and nothing slow has.
    assert len(set(run["curve"][:4])) == 1 and run["oldest"] <= 4
    again = stragglers.measured("digits", "ffa, K = 5", 1.0, 0, "test", 16.0)
    assert again == run


def planted(way, seed, curve, job="digits"):
    return {
        **{"job": job, "way": way, "rate": 0.5, "seed": seed, "on": "test", "until": 160.0},
        **{"rounds": 10, "answers": 50, "median_age": 1.0, "oldest": 3, "MB_up": 1.0},
        "curve": curve,
    }


def test_a_line_says_when_the_mean_is_where_waiting_ends(tmp_path, monkeypatch, capsys):
    slow = [n / 100 for n in range(1, 17)]
    fast = [2 * n / 100 for n in range(1, 17)]
    runs = [planted("rolora", seed, slow) for seed in (0, 1)]
    runs += [planted("rolora, K = 5", 0, fast), planted("rolora, K = 5", 1, [0.0] * 16)]
    runs += [planted("ffa", seed, slow) for seed in (0, 1)]
    path = tmp_path / "stragglers.json"
    path.write_text(json.dumps({"runs": runs}))
    monkeypatch.setattr(stragglers, "RESULTS", path)
    stragglers.table()
    lines = [line for line in capsys.readouterr().out.splitlines() if "digits" in line]
    assert [line.split(" | ")[1] for line in lines] == ["rolora", "rolora, K = 5", "ffa"]
    cells = lines[0].split(" | ")
    assert cells[2:8] == ["0.5*", *(f"{n:.3f} ± 0.000" for n in (0.02, 0.04, 0.08, 0.16)), "160"]
    # The mean of both is (0.32 + 0) / 2 at the end, where the waiting one ends.
    assert lines[1].split(" | ")[7] == "160"


def test_the_recorded_runs_are_those_of_the_table():
    recorded = json.loads(stragglers.RESULTS.read_text())["runs"]
    for job, ways in stragglers.SHOWN.items():
        for way in ways:
            runs = [r for r in recorded if (r["job"], r["way"], r["on"]) == (job, way, "test")]
            assert sorted(run["seed"] for run in runs) == list(stragglers.SEEDS[job]), (job, way)
            assert {run["until"] for run in runs} == {stragglers.UNTIL[job]}
            assert len({run["rate"] for run in runs}) == 1
