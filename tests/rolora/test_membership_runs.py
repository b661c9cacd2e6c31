"""`--membership`: the plan, the record, bad input, and a run that goes on."""

import pytest

from tests.rolora.commands import bits, rows, small

EVENTS = {"clients": 4, "membership": "2:+3,3:-0"}


def test_the_record_says_who_took_part_when_and_a_resumed_run_goes_on(files, tmp_path, call):
    flags = small(files, **EVENTS)
    code, out, _ = call(*flags, "--dry-run")
    assert code == 0
    assert "3 clients at first; some come or go in round 2, 3; fewest in round 1: 3" in " ".join(
        out.split()
    )
    assert call(*flags, "--output-dir", tmp_path / "whole")[0] == 0
    found = rows(tmp_path / "whole")[1:]
    assert [row["took_part"] for row in found] == [[0, 1, 2], [0, 1, 2, 3], [1, 2, 3], [1, 2, 3]]
    assert [row["members"] for row in found] == [3, 4, 3, 3]
    assert found[1]["joined"] == [3] and found[2]["left"] == [0]
    events = tmp_path / "events.txt"
    events.write_text("2:+3   # a new one\n\n3:-0\n")
    shorter = [2 if flags[i - 1] == "--rounds" else part for i, part in enumerate(flags)]
    shorter = [events if flags[i - 1] == "--membership" else part for i, part in enumerate(shorter)]
    assert call(*shorter, "--output-dir", tmp_path / "parts")[0] == 0
    events.unlink()  # the run keeps what was in it
    assert call("--resume", "--output-dir", tmp_path / "parts", "--rounds", 4)[0] == 0
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"membership": "2:+0,3:+0"}, "client 0 comes in round 3, and is there"),
        ({"membership": "2:-0,3:-0"}, "client 0 leaves in round 3, and is not there"),
        ({"membership": "2:+7"}, "there is no client 7: there are 0 to 2"),
        ({"membership": "2:-0-2"}, "leaves no client for round 2"),
        ({"membership": "2:-0", "quorum": 3}, "leaves 2 clients for round 2, and a round needs 3"),
        ({"membership": "nowhere.txt"}, "'nowhere.txt' is no event: expected rounds and clients"),
        ({"membership": "2:-0", "buffer": 2}, "--membership does not go with --buffer"),
        ({"membership": "open"}, "open needs --clients-per-round"),
        ({"membership": "open", "client-speeds": "tail"}, "--client-speeds does not go with"),
        ({"membership": "open", "clients-per-round": 2}, "open needs --max-weight"),
        (
            {"membership": "open", "clients-per-round": 2, "max-weight": 5},
            "open is for clients elsewhere",
        ),
        (
            {"membership": "open", "clients-per-round": 2, "sampling": "poisson"},
            "--sampling poisson does not go with --membership open",
        ),
    ],
)
def test_bad_input_is_one_line(flags, message, files, tmp_path, call):
    code, _, err = call(*small(files, **flags), "--output-dir", tmp_path / "run")
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()
