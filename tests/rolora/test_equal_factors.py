"""Who hands over factors of equal size without being asked, and what goes with it."""

import pytest

from rolora.errors import BadInput
from rolora.federated import compatibility
from rolora.run import defaults, identity, memory, plan
from rolora.run.federation import build_server
from rolora.run.job import prepare
from tests.rolora.cohorts import prepared
from tests.rolora.commands import bits, small

EVERYBODY = {"clients": 4}
SOME = EVERYBODY | {"clients_per_round": 3}
BY_ROWS = {"partition": "column", "client_column": "label"}
NOT = (False, False)  # factors of equal size, moments that follow
BOTH = (True, True)
ANEW = (True, False)  # moments start anew


def decided(files, **options):
    made = prepared(files, **options).config
    o = made.optimisation
    assert not o.realign_moments or o.carry_moments  # nothing else could follow
    return made.federation.equal_factors, o.realign_moments


@pytest.mark.parametrize(
    "options, wanted",
    [
        (EVERYBODY, BOTH),
        (EVERYBODY | {"clients_per_round": 4}, BOTH),
        (EVERYBODY | {"schedule": "BBA"}, BOTH),
        (EVERYBODY | {"carry_moments": True}, BOTH),
        (EVERYBODY | {"realign_moments": True}, BOTH),
        (EVERYBODY | {"exchange_dtype": "int4", "error_feedback": True}, BOTH),
        (EVERYBODY | {"aggregation": "median"}, BOTH),
        (BY_ROWS, BOTH),
        (BY_ROWS | {"clients_per_round": 3, "clients": 10}, BOTH),
        (BY_ROWS | {"clients_per_round": 2, "clients": 2}, ANEW),
        (SOME, ANEW),
        (EVERYBODY | {"clients_per_round": 4, "sampling": "poisson"}, ANEW),
        (EVERYBODY | {"membership": "2:-0"}, ANEW),
        (EVERYBODY | {"equal_factors": False}, NOT),
        (EVERYBODY | {"carry_moments": False}, NOT),
        (EVERYBODY | {"realign_moments": False}, NOT),
        (EVERYBODY | {"balance": True}, NOT),
        (EVERYBODY | {"local_coordinates": True}, NOT),
        (EVERYBODY | {"control_variates": True}, NOT),
        (EVERYBODY | {"buffer": 2}, NOT),
        (EVERYBODY | {"dp_clip": 1.0, "dp_noise": 1.0}, NOT),
        (EVERYBODY | {"optimizer": "sgd"}, NOT),
        (EVERYBODY | {"schedule": "B"}, NOT),
        (EVERYBODY | {"method": "ffa"}, NOT),
        (EVERYBODY | {"method": "fedavg"}, NOT),
        (EVERYBODY | {"method": "lora-a2"}, NOT),
        (SOME | {"carry_moments": False}, ANEW),
        (SOME | {"realign_moments": False}, ANEW),
        (SOME | {"realign_moments": False, "carry_moments": True}, NOT),
        # What was asked for before drawn clients kept nothing stays what it was.
        (SOME | {"carry_moments": True}, NOT),
        (SOME | {"realign_moments": True}, (False, True)),
        (SOME | {"exchange_dtype": "int4", "error_feedback": True}, NOT),
        (SOME | {"equal_factors": False}, NOT),
        (SOME | {"balance": True}, NOT),
        (SOME | {"control_variates": True}, NOT),
        (SOME | {"dp_clip": 1.0, "dp_noise": 1.0}, NOT),
        (SOME | {"optimizer": "sgd"}, NOT),
        (SOME | {"method": "fedavg"}, NOT),
        (SOME | {"equal_factors": True}, ANEW),
        (SOME | {"equal_factors": True, "carry_moments": True}, BOTH),
        # Asked for, with whatever clients and optimizer there are.
        (EVERYBODY | {"equal_factors": True, "carry_moments": True}, BOTH),
        (EVERYBODY | {"equal_factors": True, "carry_moments": False}, (True, False)),
        (EVERYBODY | {"equal_factors": True, "realign_moments": False}, (True, False)),
        (EVERYBODY | {"equal_factors": True, "optimizer": "sgd"}, (True, False)),
        (EVERYBODY | {"equal_factors": True, "method": "lora-a2"}, (True, False)),
        (EVERYBODY | {"equal_factors": False, "realign_moments": True}, (False, True)),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_who_hands_over_unasked(options, wanted, files):
    assert decided(files, **options) == wanted


def test_a_method_of_ones_own_that_trains_both_factors_at_times_is_left_alone(files, tmp_path):
    """Moments of a round that trains both belong to no factor that rests."""
    own = tmp_path / "own.py"
    own.write_text(
        "CARRIES_MOMENTS = True\n\n\n"
        "def phase(round, schedule):\n    return ('B', 'A', 'BOTH')[round % 3]\n"
    )
    method = EVERYBODY | {"method": str(own)}
    assert decided(files, **method) == NOT
    assert decided(files, **method, equal_factors=True) == (True, False)
    made = prepared(files, **method, rounds=3, local_steps=1)
    build_server(made, on_round=lambda row: None).run()
    assert prepare(made.config).config == made.config  # settling twice changes nothing
    own.write_text(own.read_text().replace("('B', 'A', 'BOTH')[round % 3]", "'BA'[round % 2]"))
    assert decided(files, **method) == BOTH


def test_moments_that_do_not_follow_a_hand_over_are_refused(files):
    with pytest.raises(BadInput, match=r"^--carry-moments does not go with .*hand-over"):
        prepared(files, equal_factors=True, carry_moments=True, realign_moments=False)


def test_what_clients_have_no_room_for_is_not_handed_over_unasked(files, monkeypatch):
    """Moments and the factors that rested are more than moments alone."""
    made = prepared(files, **EVERYBODY)
    alone, both = (
        defaults.carried_bytes(made.layout, len(made.clients), follow) for follow in (False, True)
    )
    assert alone < both
    for room, wanted in ((both, BOTH), (both - 1, NOT), (0, NOT)):
        monkeypatch.setattr(defaults, "_CARRIED", room)
        assert decided(files, **EVERYBODY) == wanted
        assert prepared(files, **EVERYBODY).config.optimisation.carry_moments is (room >= alone)
    assert decided(files, **EVERYBODY, equal_factors=True) == (True, False)
    assert decided(files, **EVERYBODY, carry_moments=True) == BOTH
    assert decided(files, **EVERYBODY, realign_moments=True) == BOTH


FEEDBACK = {"error_feedback": True}


@pytest.mark.parametrize(
    "options, moments, left",
    [
        ({}, True, None),
        ({"equal_factors": False}, False, None),
        (FEEDBACK, True, False),
        (FEEDBACK | {"equal_factors": True, "realign_moments": False}, None, True),
        (FEEDBACK | {"equal_factors": False, "carry_moments": False}, None, False),
    ],
    ids=lambda value: (
        " ".join(f"{k}={v}" for k, v in value.items()) or "default"
        if isinstance(value, dict)
        else ""
    ),
)
def test_what_the_plan_counts_is_what_clients_keep(options, moments, left, files):
    """Whether the factors that rested are counted with AdamW's moments and with what rounding left;
    None where there are none of these. Counts of steps are left out.
    """
    made = prepared(files, **EVERYBODY, **options)
    lines = dict(plan.rows(made, compatibility.load(made.config)))
    assert ("error feedback" in lines) is (left is not None)
    assert ("MiB at most" in lines["moments"]) is (moments is not None)
    counted, clients = 0, len(made.clients)
    if moments is not None:
        counted += memory.carried_bytes(made.layout, clients, moments)
    if left is not None:
        counted += memory.left_bytes(made.layout, clients, left)
    server = build_server(made, on_round=lambda row: None)
    server.run()
    states = server.transport.client_states
    kept = [states[client] for client in range(clients)]
    sizes = [v.nbytes for own in kept for k, v in own.items() if not k.startswith("step.")]
    assert sum(sizes) == counted


def test_unasked_is_as_asked_for(files, tmp_path, call):
    flags = {"unasked": {}, "asked": {"equal-factors": True, "realign-moments": True}}
    flags["without"] = {"no-equal-factors": True}
    for name, own in flags.items():
        run = small(files, rounds=4, **own)
        assert call(*run, "--output-dir", tmp_path / name)[0] == 0
    assert bits(tmp_path / "unasked") == bits(tmp_path / "asked") != bits(tmp_path / "without")


def test_a_served_run_from_before_is_not_turned_on_its_way(files):
    """Its TOML is read anew, and says nothing of options that came later."""
    made = prepared(files, **EVERYBODY)
    later = ("equal_factors", "realign_moments", "control_variates")
    begun = {name: v for name, v in identity.of(made.config).items() if name not in later}
    with pytest.raises(BadInput, match="equal_factors = True, the run was begun with False"):
        identity.require_same(made.config, begun)
    identity.require_same(prepared(files, **EVERYBODY, equal_factors=False).config, begun)


def test_a_run_from_before_they_were_there_goes_on_without(files, tmp_path, call):
    longer = ("--resume", "--rounds", 4, "--output-dir")
    ends = {}
    for name in ("without", "before"):
        folder = tmp_path / name
        run = small(files, rounds=2, **{"no-equal-factors": True})
        assert call(*run, "--output-dir", folder)[0] == 0
        if name == "before":  # as a version that did not know the options wrote it
            text = (folder / "config.toml").read_text()
            for option in ("equal_factors", "realign_moments"):
                assert f"{option} = false\n" in text
                text = text.replace(f"{option} = false\n", "")
            (folder / "config.toml").write_text(text)
        assert call(*longer, folder)[0] == 0
        ends[name] = bits(folder)
    assert ends["before"] == ends["without"]
