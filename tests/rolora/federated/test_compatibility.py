"""What a method cannot be combined with: by its facts, for shipped methods and files of one's own
alike.
"""

import pytest

from rolora import config
from rolora.errors import BadInput
from rolora.federated import compatibility, methods
from rolora.federated.privacy import Privacy
from tests.rolora.federated import toy

OPTIONS = {
    "median": {"aggregation": "median"},
    "trimmed": {"aggregation": "trimmed-mean"},
    "momentum": {"server_momentum": 0.5},
    "server-lr": {"server_lr": 0.5},
    "private": {"dp_clip": 1.0, "dp_noise": 1.0},
    "balance": {"balance": True},
    "equal": {"equal_factors": True},
    "coordinates": {"local_coordinates": True},
    "pissa": {"init": "pissa"},
    "carry": {"carry_moments": True},
    "ranks": {"client_ranks": "2,4"},
    "realign": {"realign_moments": True},
    "feedback": {"error_feedback": True},
    "buffer": {"buffer": 3},
    "control": {"control_variates": True},
}
# By hand, from what each method's paper does: what must be refused.
_PRODUCTS = {"median", "trimmed", "momentum", "server-lr", "private", "balance", "coordinates"}
_PRODUCTS |= {"equal", "buffer", "control"}
_BOTH = {
    "balance",
    "equal",
    "coordinates",
    "ranks",
    "realign",
}  # factors train at the same time
REFUSED = {
    "rolora": {"ranks"},
    "fedavg": _BOTH,
    "ffa": {"balance", "equal", "ranks"},
    "flexlora": _PRODUCTS | {"feedback", "carry", "realign"},
    "fedsvd": {"feedback", "balance", "equal", "carry", "ranks", "buffer", "control"},
    "flora": _PRODUCTS | {"feedback", "carry", "pissa", "realign"},
    "fedex": _PRODUCTS | {"pissa", "ranks", "realign"},
    "fedsa": _BOTH | {"private", "buffer"},
    "lora-a2": {"feedback", "median", "trimmed", "private", "control"},
    "fedrot": _BOTH | {"buffer", "control"},
    "la-lora": _BOTH,
    "fed-sb": {"balance", "equal", "ranks", "pissa", "private"},
}
RE_EXPORTED = "from rolora.federated.methods.{module} import *\n"


def settled(method, **options):
    values = {"method": str(method), "rank": 4} | options
    return compatibility.settle(config.check(config.Config().with_values(**values)))


def refused(method):
    """The options that cannot go with a method."""
    found = set()
    for name, options in OPTIONS.items():
        try:
            settled(method, **options)
        except BadInput as error:
            assert "does not go with --method" in str(error) and "\n" not in str(error)
            found.add(name)
    return found


@pytest.mark.parametrize("name", methods.NAMES)
def test_a_shipped_method_and_a_file_that_re_exports_it_are_refused_the_same(name, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(RE_EXPORTED.format(module=name.replace("-", "_")))
    assert refused(name) == REFUSED[name]
    assert refused(own) == REFUSED[name]


def test_every_hand_over_has_its_option():
    for name in methods.HAND_OVERS:
        assert settled("rolora", **{name: True}).federation.hand_over == name
    assert settled("rolora").federation.hand_over is None


def test_a_collector_alone_is_enough_to_be_refused(tmp_path):
    """A file that states no fact at all but takes every client's change."""
    own = tmp_path / "own.py"
    own.write_text(
        "from rolora.federated.methods.flexlora import collect\n\n\n"
        "def phase(round, schedule):\n    return 'BOTH'\n"
    )
    assert refused(own) == _PRODUCTS | {"feedback", "carry", "ranks", "realign"}


def test_defaults_that_depend_on_the_method():
    assert settled("rolora", optimizer="sgd").optimisation.local_coordinates is True
    assert settled("ffa", optimizer="sgd").optimisation.local_coordinates is False
    assert settled("rolora").optimisation.carry_moments is None  # by their size, later
    assert settled("fedavg").optimisation.carry_moments is False
    assert settled("rolora", balance=True).optimisation.carry_moments is False
    for extra in ({}, {"balance": True}, {"equal_factors": True}, {"local_coordinates": True}):
        assert settled("rolora", realign_moments=True, **extra).optimisation.carry_moments is True
    for extra in ({"carry_moments": False}, {"optimizer": "sgd"}):
        with pytest.raises(BadInput, match="--realign-moments"):
            settled("rolora", realign_moments=True, **extra)
    for extra in ({"balance": True}, {"equal_factors": True}):
        assert settled("rolora", error_feedback=True, **extra).exchange.error_feedback
        with pytest.raises(BadInput, match="leave --local-coordinates out"):
            settled("rolora", error_feedback=True, local_coordinates=True, **extra)
    with pytest.raises(BadInput, match="exclude each other"):
        settled("rolora", balance=True, equal_factors=True)
    once = settled("rolora", optimizer="sgd")
    assert compatibility.settle(once) == once


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "defines no phase"),
        ("def phase(round, schedule):\n    return 'C'\n", "a phase is 'A', 'B' or 'BOTH'"),
        ("def phase(round, schedule):\n    return None\n", "a phase is 'A', 'B' or 'BOTH'"),
        ("def phase(round):\n    return 'A'\n", "phase.round, schedule. raises"),
        ("def phase(round, schedule)\n", "cannot be loaded"),
    ],
)
def test_a_file_that_is_no_method_is_one_line(text, why, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(text)
    with pytest.raises(BadInput, match=why) as error:
        settled(own)
    assert "\n" not in str(error.value)


GROWN = "def phase(round, schedule):\n    return 'B'\n\n\n"
GROWN += "def transform(context, client, change):\n    return {body}\n"


def moved(server):
    """How far the published B is from where it started, after one round."""
    start = server.state.published["B"].clone(), server.state.published["head"].clone()
    server.run()
    ends = server.state.master["B"], server.state.master["head"]
    return (
        sum((end - begin).square().sum().item() for begin, end in zip(start, ends, strict=True))
        ** 0.5
    )


def test_a_transformed_change_is_clipped_all_the_same(tmp_path):
    """Whatever a method makes of a client's change, the private mean clips it: n clients move 1 /
    planned of the clip each.
    """
    own = tmp_path / "own.py"
    own.write_text(GROWN.format(body="40.0 * change.sign()"))
    privacy = Privacy(clip=0.5, noise=0.0, delta=1e-5, probability=1.0)
    private = toy.server(str(own), rounds=1, options=dict(privacy=privacy, quorum=0))
    assert 0.1 < moved(private) <= 0.5
    assert moved(toy.server(str(own), rounds=1)) > 20.0


@pytest.mark.parametrize("method", ["flexlora", "fedex", "flora", "lora-a2", "fedsa"])
def test_a_private_server_cannot_be_made_with_a_method_that_sees_more_than_the_mean(method):
    privacy = Privacy(clip=0.5, noise=1.0, delta=1e-5, probability=1.0)
    with pytest.raises(ValueError, match="cannot be private"):
        toy.server(method, options=dict(privacy=privacy))


@pytest.mark.parametrize(
    "body", ["change[1:]", "change / 0", "change * 1e6", "change.double()[:, None]"]
)
def test_a_transform_that_no_sum_can_take_is_said(body, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(GROWN.format(body=body))
    with pytest.raises(ValueError, match=r"transform must return fp32 \[\d+\], finite"):
        toy.server(str(own), rounds=1).run()


def test_a_transform_that_changes_nothing_gives_the_same_bits(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(GROWN.format(body="change * 1.0"))
    mine, shipped = toy.server(str(own), rounds=3), toy.server("ffa", rounds=3)
    mine.run(), shipped.run()
    for kind, flat in shipped.state.master.items():
        assert (mine.state.master[kind] == flat).all()


@pytest.mark.parametrize(
    "other",
    [
        {"balance": True},
        {"equal_factors": True},
        {"buffer": 3},
        {"server_momentum": 0.5},
        {"server_lr": 0.5},
        {"dp_clip": 1.0, "dp_noise": 1.0},
    ],
    ids=lambda other: next(iter(other)),
)
def test_control_variates_need_the_mean_as_it_is(other):
    flag = "--" + next(iter(other)).replace("_", "-")
    with pytest.raises(BadInput, match=rf"^--control-variates does not go with .*{flag} "):
        settled("rolora", control_variates=True, **other)
