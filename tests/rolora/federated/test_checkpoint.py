"""Checkpoints are whole or ignored, and a run that goes on ends with the same bits."""

import errno
import json
import shutil
from dataclasses import replace

import pytest
import torch

from rolora.federated.checkpoint import load_newest, save_checkpoint
from rolora.federated.privacy import Privacy
from tests.rolora.federated import toy


def with_own(snapshot):
    """A snapshot with what one client keeps for itself."""
    return replace(snapshot, client_states={3: {"own": torch.arange(4.0)}})


KINDS = {
    "rolora": dict(method="rolora"),
    "flexlora": dict(method="flexlora"),
    "int8": dict(dtype="int8"),
    "balanced, with momentum": dict(hand_over="balance", options=dict(server_momentum=0.9)),
    "equal factors": dict(hand_over="equal_factors"),
    "fedsvd": dict(method="fedsvd"),
    "flora": dict(method="flora"),
    "fedex": dict(method="fedex"),
    "momentum, bounded": dict(options=dict(server_momentum=0.9), bound=1.5),
    # Noise is never drawn twice alike, so what can be the same is a run that clips only.
    "clipped": dict(options=dict(privacy=Privacy(0.5, 0.0, 1e-5, 1.0), quorum=0)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_round", [None, 2])
@pytest.mark.parametrize("stop", range(1, 6))
def test_a_run_that_goes_on_ends_with_the_same_bits(kind, per_round, stop, tmp_path):
    rows, again, options = [], [], KINDS[kind]
    whole = toy.server(rounds=6, per_round=per_round, on_round=rows.append, **options)
    whole.run()
    first = toy.server(
        rounds=stop,
        per_round=per_round,
        on_round=again.append,
        **options,
        on_checkpoint=lambda s: save_checkpoint(tmp_path, with_own(s)),
    )
    first.run()
    second = toy.server(rounds=6, per_round=per_round, on_round=again.append, **options)
    loaded, problems = load_newest(tmp_path, second.layout.hash)
    assert not problems and loaded.state.round == stop
    second.state, second.held, second.norms.medians = loaded.state, loaded.held, loaded.norms
    second.transport.restore(loaded.state, loaded.held, loaded.client_states)
    second.run()
    for group in ("master", "published"):
        for kind in whole.state.master:
            assert torch.equal(
                getattr(whole.state, group)[kind], getattr(second.state, group)[kind]
            )
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in rows] == [
        {k: v for k, v in r.items() if k != "seconds"} for r in again
    ]
    assert torch.equal(loaded.client_states[3]["own"], torch.arange(4.0))


@pytest.mark.parametrize("damage", ["torn", "flipped", "numbers", "missing"])
def test_a_damaged_checkpoint_is_passed_over(damage, tmp_path):
    server = toy.server(rounds=3, on_checkpoint=lambda s: save_checkpoint(tmp_path, with_own(s)))
    server.run()
    newest = tmp_path / "round-000003" / "state.safetensors"
    data = newest.read_bytes()
    if damage == "torn":
        newest.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        newest.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "numbers":
        (newest.parent / "state.json").write_text("{")
    else:
        newest.unlink()
    loaded, problems = load_newest(tmp_path, server.layout.hash)
    assert loaded.state.round == 2 and problems[0].startswith("round-000003: ")


def test_three_are_kept_and_other_adapters_are_refused(tmp_path):
    server = toy.server(rounds=6, on_checkpoint=lambda s: save_checkpoint(tmp_path, with_own(s)))
    server.run()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "round-000004",
        "round-000005",
        "round-000006",
    ]
    loaded, problems = load_newest(tmp_path, "0" * 16)
    assert loaded is None and len(problems) == 3 and "other adapters" in problems[0]
    assert load_newest(tmp_path / "nowhere", "0" * 16) == (None, [])


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch):
    from rolora import atomic

    server = toy.server(rounds=2)
    server.run()
    save_checkpoint(tmp_path, with_own(server.snapshot()))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    server.state = server.state.apply({})
    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, with_own(server.snapshot()))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert json.loads((tmp_path / "round-000002" / "state.json").read_text())["round"] == 2


def flipped(data, bit):
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def test_no_bit_may_be_another(tmp_path):
    server = toy.server(rounds=1, on_checkpoint=lambda s: save_checkpoint(tmp_path, with_own(s)))
    server.run()
    shutil.rmtree(tmp_path / "round-000000")
    folder = tmp_path / "round-000001"
    whole, _ = load_newest(tmp_path, server.layout.hash)
    assert whole.state.round == 1
    for name, step in (("state.json", 1), ("state.safetensors", 101)):
        data = (folder / name).read_bytes()
        for bit in range(0, 8 * len(data), step):
            (folder / name).write_bytes(flipped(data, bit))
            loaded, problems = load_newest(tmp_path, server.layout.hash)
            assert loaded is None and len(problems) == 1, (name, bit)
        (folder / name).write_bytes(data)
    assert load_newest(tmp_path, server.layout.hash)[1] == []


def test_a_checkpoint_of_before_the_whole_digest_is_refused_by_one_line(tmp_path):
    server = toy.server(rounds=1, on_checkpoint=lambda s: save_checkpoint(tmp_path, with_own(s)))
    server.run()
    shutil.rmtree(tmp_path / "round-000000")
    path = tmp_path / "round-000001" / "state.json"
    numbers = json.loads(path.read_text())
    del numbers["digest"]
    path.write_text(json.dumps(numbers | {"sha256": "0" * 64}, indent=1))
    loaded, problems = load_newest(tmp_path, server.layout.hash)
    assert loaded is None and problems == [
        "round-000001: it has no digest over all of it, as an older version wrote it: "
        "start a new run"
    ]


def test_folders_of_other_names_never_count(tmp_path):
    junk = ["round-9abc", "round-", "round-0000009", "round-99", "round-000009.old", "round-9e9999"]
    for name in junk:
        (tmp_path / name).mkdir()
    (tmp_path / "round-000099").write_text("a file")
    server = toy.server(rounds=5, on_checkpoint=lambda s: save_checkpoint(tmp_path, with_own(s)))
    server.run()
    kept = {"round-000003", "round-000004", "round-000005"}
    assert {p.name for p in tmp_path.iterdir()} == kept | {"round-000099"} | set(junk)
    loaded, problems = load_newest(tmp_path, server.layout.hash)
    assert loaded.state.round == 5 and not problems
