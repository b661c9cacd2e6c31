"""A cohort trained together gives every client what it would have got alone."""

import tomllib

import pytest
import torch

from rolora.adapter.model import adapted_layers
from rolora.cohort.batched import Batched, why_not
from rolora.cohort.choose import CannotBatch, choose
from rolora.cohort.sequential import Sequential
from rolora.federated.local import TrainingFailed
from tests.rolora.cohorts import compare, prepared, started
from tests.rolora.commands import bits, rows, small


@pytest.mark.parametrize("family", ["llama", "roberta"])
@pytest.mark.parametrize("phase", ["A", "B", "BOTH"])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"dropout": 0.2, "optimizer": "sgd"},
        {"gradient_accumulation": 2, "max_grad_norm": 0.01},
        {"local_epochs": 1, "local_steps": 1, "weight_decay": 0.1},
        {"train_head": False, "optimizer": "sgd", "max_grad_norm": 0.0},
    ],
    ids=["plain", "dropout", "accumulated and clipped", "ragged epochs", "frozen head, SGD"],
)
def test_client_by_client_as_alone(family, phase, extra, files):
    targets = (
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj" if family == "llama" else "query,key,value"
    )
    own = extra | {"target_modules": targets, "method": "fedavg" if phase == "BOTH" else "rolora"}
    # Adam divides by the square root of tiny second moments, so that rounding of 1e-7 in a
    # gradient can be 1e-4 of a step.
    made = prepared(files, family, partition="dirichlet", **own)
    compare(made, phase, chunk=5, gate=1e-4 if extra.get("optimizer") == "sgd" else 3e-3)


@pytest.mark.parametrize(
    "extra",
    [
        {"prompt_column": "prompt", "response_column": "response"},
        {"prompt_column": "prompt", "choices_column": "choices", "label_column": "answer"},
    ],
    ids=["causal LM", "multiple choice"],
)
@pytest.mark.parametrize("chunk", [2, 3])
def test_other_tasks_and_chunks(extra, chunk, files):
    compare(prepared(files, optimizer="sgd", **extra), "B", chunk, gate=1e-4)


@pytest.mark.parametrize("phase", ["A", "B"])
@pytest.mark.parametrize(
    "extra",
    [
        {"local_coordinates": True},
        {"method": "lora-a2"},
        {"method": "lora-a2", "client_ranks": "1,2"},
    ],
    ids=["local coordinates", "chosen ranks", "chosen ranks of each client"],
)
def test_what_a_client_does_around_its_training(extra, phase, files):
    compare(prepared(files, **{"optimizer": "sgd"} | extra), phase, 5, gate=1e-4)


@pytest.mark.parametrize("optimizer, carried", [("sgd", False), ("adamw", False), ("adamw", True)])
def test_factors_that_take_turns_within_a_round(optimizer, carried, files):
    made = prepared(files, method="la-lora", optimizer=optimizer, carry_moments=carried)
    compare(made, "BOTH", 5, gate=1e-4 if optimizer == "sgd" else 3e-3)


REALIGNED = {"realign_moments": True, "beta2": 0.9}


@pytest.mark.parametrize(
    "phase, extra",
    [
        ("A", {"equal_factors": False}),
        ("BOTH", {"method": "fedavg"}),
        ("A", REALIGNED),
        ("B", REALIGNED | {"local_coordinates": True}),
    ],
    ids=["A", "BOTH", "A, realigned", "B, realigned, local coordinates"],
)
def test_clients_carry_their_own_moments(phase, extra, files):
    """Some have none yet, and the others have taken different numbers of steps.

    Every one's bias correction is its own.
    """
    made = prepared(
        files,
        carry_moments=True,
        partition="dirichlet",
        local_epochs=1,
        local_steps=1,
        weight_decay=0.1,
        **extra,
    )
    orders, trainer = started(made, phase), made.trainer()
    before = {client: state for client, _, state in Sequential(trainer).train(orders[:3])}
    assert len({float(state[f"step.{phase[0]}"]) for state in before.values()}) > 1
    if "realign_moments" in extra:  # what rested has moved since
        orders = started(made, phase, seed=4)
    again = [(task, published, before.get(task.client, {})) for task, published, _ in orders]
    alone = {client: rest for client, *rest in Sequential(trainer).train(again)}
    together = {
        client: rest for client, *rest in Batched(trainer, made.report.heads, 5).train(again)
    }
    for client, (update, state) in alone.items():
        mine, kept = together[client]
        assert set(kept) == set(state)
        assert (mine.change - update.change).norm() <= 3e-3 * update.change.norm()
        for name, value in state.items():
            assert (
                torch.equal(kept[name], value)
                if name.startswith("step")
                else (kept[name] - value).norm() <= 1e-4 * value.norm()
            ), name


def test_clients_that_are_not_alike_are_not_batched(files):
    for extra, reason in (
        ({"method": "fedsa"}, "every client holds factors of its own"),
        ({"method": "flexlora", "client_ranks": "1,3"}, "clients train different ranks"),
    ):
        made = prepared(files, **extra)
        assert why_not(made.trainer(), made.report.heads) == reason
        with pytest.raises(CannotBatch, match=reason):
            Batched(made.trainer(), made.report.heads, 2)


@pytest.mark.parametrize("dtype, gate", [("bf16", 0.05), ("fp16", 0.05)])
def test_16_bit_bases(dtype, gate, files):
    compare(prepared(files, optimizer="sgd", dtype=dtype), "A", 5, gate)


def test_a_client_whose_loss_is_not_finite_fails_alone(files, monkeypatch):
    made = prepared(files, optimizer="sgd")
    orders, trainer = started(made, "B"), made.trainer()
    honest = {
        client: update for client, update, _ in Batched(trainer, made.report.heads, 5).train(orders)
    }
    losses = type(made.recipe).losses

    def poisoned(self, model, batch):
        value = losses(self, model, batch)
        return torch.cat(
            [value[:4], value[4:8] * float("nan"), value[8:]]
        )  # client 1's four examples

    monkeypatch.setattr(type(made.recipe), "losses", poisoned)
    results = {
        client: update for client, update, _ in Batched(trainer, made.report.heads, 5).train(orders)
    }
    assert (
        isinstance(results[1], TrainingFailed)
        and str(results[1]) == "non-finite loss: loss nan at local step 1"
    )
    for client in (0, 2, 3, 4):
        assert torch.equal(results[client].change, honest[client].change)


def test_a_lack_of_memory_halves_the_chunk_and_loses_nobody(files, monkeypatch):
    made = prepared(files, optimizer="sgd")
    orders, trainer, told = started(made, "B"), made.trainer(), []
    losses = type(made.recipe).losses

    def limited(self, model, batch):
        if batch.examples > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(self, model, batch)

    monkeypatch.setattr(type(made.recipe), "losses", limited)
    cohort = Batched(trainer, made.report.heads, 5, told.append)
    results = list(cohort.train(orders))
    assert (
        [client for client, _, _ in results] == list(range(5)) and told == [2] and cohort.chunk == 2
    )
    assert all(
        layer.call.clients is None and layer.call.masks is None
        for _, layer in adapted_layers(made.model)
    )
    monkeypatch.setattr(type(made.recipe), "losses", losses)
    for client, update, _ in Sequential(trainer).train(orders):
        assert (results[client][1].change - update.change).norm() <= 1e-4 * update.change.norm()


def test_models_that_mix_examples_are_refused_by_name(files):
    made = prepared(files)
    assert why_not(made.trainer(), made.report.heads) is None
    made.model.model.layers[1].add_module("norm_of_all", torch.nn.BatchNorm1d(32))
    assert (
        why_not(made.trainer(), ())
        == "model.layers.1.norm_of_all is a BatchNorm1d, which mixes examples"
    )
    with pytest.raises(
        ValueError,
        match="a cohort of 20 examples is trained together, but an adapted layer was called with",
    ):
        compare_reordered(prepared(files))


def compare_reordered(made):
    """A model that folds examples into one sequence would train clients on each other's tokens."""
    attention = made.model.model.layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: (
            args,
            kwargs | {"hidden_states": kwargs["hidden_states"].transpose(0, 1)},
        ),
        with_kwargs=True,
    )
    list(Batched(made.trainer(), made.report.heads, 5).train(started(made, "B")))


def test_the_command_batches_resumes_and_stores_what_it_chose(files, tmp_path, call):
    flags = small(files, engine="batched", **{"cohort-chunk": 2, "dropout": 0.1})
    code, out, err = call(*flags, "--output-dir", tmp_path / "whole")
    assert (code, err) == (0, "")
    shorter = [2 if flags[i - 1] == "--rounds" else part for i, part in enumerate(flags)]
    call(*shorter, "--output-dir", tmp_path / "parts")
    assert (
        call("--resume", "--output-dir", tmp_path / "parts", "--rounds", 4, "--engine", "auto")[0]
        == 0
    )
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")
    alone = small(files, dropout=0.1, **{"output-dir": tmp_path / "alone"})
    call(*alone)
    for ours, theirs in zip(rows(tmp_path / "whole"), rows(tmp_path / "alone"), strict=True):
        assert (ours["train_loss"] is None) or abs(ours["train_loss"] - theirs["train_loss"]) < 2e-3
        assert (ours["examples"], ours["tokens"]) == (theirs["examples"], theirs["tokens"])
        assert abs(ours["bytes_up"] - theirs["bytes_up"]) < 64, "a loss may be a digit longer"


@pytest.mark.parametrize("engine", ["auto", "batched"])
def test_the_engine_is_measured_printed_and_stored(engine, files, tmp_path, call):
    code, out, _ = call(*small(files, engine=engine, rounds=1, **{"output-dir": tmp_path / "run"}))
    (line,) = [line for line in out.splitlines() if line.startswith("engine: ")]
    stored = tomllib.loads((tmp_path / "run" / "config.toml").read_text())["system"]
    assert code == 0 and stored["engine"] in line and stored["engine"] != "auto"
    assert ("measured: " in line) == (engine == "auto") and (stored["engine"] == "batched") == (
        "cohort_chunk" in stored
    )
    assert engine == "auto" or (
        stored["cohort_chunk"] == 3 and "as asked, 3 of 3 clients at a time" in line
    )


def test_a_measurement_leaves_the_factors_as_they_were(files):
    made = prepared(files)
    before = made.initial_factors()
    for wanted in ("auto", "batched"):
        assert choose(wanted, None, made.trainer(), made.report.heads, "B", 1e-2, 5).chunk >= 1
    after = made.initial_factors()
    assert all(torch.equal(before[kind], after[kind]) for kind in before)


def test_a_model_that_reorders_examples_runs_sequentially_under_auto_and_is_refused_as_batched(
    files,
):
    made = prepared(files)
    made.model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (
            args,
            kwargs | {"hidden_states": kwargs["hidden_states"][::2]},
        ),
        with_kwargs=True,
    )
    with pytest.raises(CannotBatch, match="this model reorders or mixes examples"):
        choose("batched", 4, made.trainer(), made.report.heads, "B", 1e-2, 5)
    engine = choose("auto", None, made.trainer(), made.report.heads, "B", 1e-2, 5)
    assert engine.name == "sequential" and "reorders or mixes examples" in engine.reason
