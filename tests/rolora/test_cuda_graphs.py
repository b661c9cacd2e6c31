"""CUDA graphs of local steps, judged by the same steps operation by operation."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rolora import config
from rolora.errors import BadInput
from rolora.federated.cuda_graphs import Graphs
from rolora.recipes import long_vocabulary
from rolora.run import cuda_graphs
from tests.rolora.cohorts import prepared, started
from tests.rolora.commands import small
from tests.rolora.recorded import Recorder


def trained(made, rounds, graphs=None):
    """The updates of every client in these rounds, one trainer for all."""
    trainer, updates = made.trainer(graphs), []
    for task, published, state in (order for orders in rounds for order in orders):
        update, _ = trainer.train(task, published, state)
        updates.append((update.change.clone(), update.loss, update.examples, update.tokens))
    return updates


def named(files, options):
    """Options with the files that they mean."""
    data = ("train_file", "eval_file")
    return options | {n: str(files[options[n]]) for n in data if n in options}


def captured(made, said):
    return Graphs(
        made.model, made.recipe, made.layout.trainable(made.model), Recorder(), said.append
    )


CHAT = {"task_type": "chat", "max_length": 128, "train_file": "chat", "eval_file": "chat"}
PAIRS = {"task_type": "preference", "train_file": "pairs", "eval_file": "pairs"}
CASES = {
    "llama": {},
    "roberta": {"family": "roberta"},
    "dropout": {"dropout": 0.25},
    "accumulated and clipped": {"gradient_accumulation": 2, "max_grad_norm": 0.1},
    "both factors": {"method": "fedavg"},
    "factors in turn": {"method": "la-lora"},
    "a method of one matrix": {"method": "fed-sb"},
    "moments": {"carry_moments": True, "weight_decay": 0.1},
    "conversations": CHAT,
    "packed": CHAT | {"packing": True},
    "preferences": PAIRS,
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_graphs_train_to_the_same_bits(options, files):
    options = {"local_steps": 5, "pad_to_multiple_of": 16} | named(files, options)
    made, said = prepared(files, **options), []
    phases = ["BOTH"] * 2 if made.config.federation.method != "rolora" else ["B", "A", "B"]
    graphs = captured(made, said)
    rounds = [started(made, phase, seed) for seed, phase in enumerate(phases)]
    ours, plain = trained(made, rounds, graphs), trained(made, rounds)
    assert not said and graphs.replayed > 20 and graphs.capturer.captures >= 1
    for (change, *rest), (wanted, *others) in zip(ours, plain, strict=True):
        assert rest == others and wanted.norm() > 0
        torch.testing.assert_close(change, wanted, rtol=0, atol=0)


def test_a_long_vocabulary_has_as_many_tokens_as_a_graph_wants(files, monkeypatch):
    monkeypatch.setattr(long_vocabulary, "LONG", 8)
    made = prepared(files, local_steps=5, pad_to_multiple_of=16, **named(files, CHAT))
    assert long_vocabulary.applies(made.model)
    rounds, said = [started(made, phase) for phase in "BA"], []
    graphs = captured(made, said)
    ours, plain = trained(made, rounds, graphs), trained(made, rounds)
    assert not said and graphs.replayed > 20
    for (change, *_), (wanted, *_) in zip(ours, plain, strict=True):
        # other rows beside them, so other bits
        assert (change - wanted).norm() < 1e-4 * wanted.norm()


def test_what_gets_no_gradient_does_not_move(files):
    """A factor that no loss depends on is left alone by AdamW, whose decay would shrink it."""
    made = prepared(files, local_steps=5, pad_to_multiple_of=16, weight_decay=0.5)
    made.model.model.layers[-1].forward = lambda hidden, *arguments, **options: hidden
    rounds, graphs = [started(made, "B")], captured(made, [])
    ours, plain = trained(made, rounds, graphs), trained(made, rounds)
    assert graphs.replayed > 0
    for (change, *_), (wanted, *_) in zip(ours, plain, strict=True):
        assert (wanted == 0).sum() > 0 and torch.equal(change, wanted)


def test_a_step_that_cannot_be_captured_runs_as_before_and_says_why(files):
    made, said = prepared(files, local_steps=5), []
    whole = made.recipe.loss

    def looking(model, batch):
        loss = whole(model, batch)
        return loss * (1 if loss > 0 else 2)  # the host looks at a value

    made.recipe.loss = looking
    rounds, graphs = [started(made, "B")], captured(made, said)
    ours, plain = trained(made, rounds, graphs), trained(made, rounds)
    assert graphs.replayed == 0
    assert said and all("the host looks at a value" in line for line in said)
    for (change, *_), (wanted, *_) in zip(ours, plain, strict=True):
        assert torch.equal(change, wanted)


def test_too_many_shapes_and_a_term_are_said_once(files, monkeypatch):
    made, said = prepared(files, local_steps=6), []
    monkeypatch.setattr("rolora.federated.cuda_graphs._MOST", 1)
    graphs = captured(made, said)
    trained(made, [started(made, "B"), started(made, "A")], graphs)
    assert graphs.capturer.captures == 1 and graphs.replayed > 0
    assert len(said) == 1 and "more than 1 shapes" in said[0]
    made, said = prepared(files, local_steps=4, method="flora"), []
    layer = next(iter(made.report.layers.values()))
    layer.set_call(
        replace(
            layer.call, term=(torch.ones(layer.out_features, 1), torch.ones(1, layer.in_features))
        )
    )
    graphs = captured(made, said)
    trained(made, [started(made, "BOTH")], graphs)
    assert graphs.replayed == 0 and len(said) == 1 and "frozen term" in said[0]


REFUSED = {
    "cpu is no CUDA device": {},
    "--engine batched": {"engine": "batched", "device": "cuda"},
    "--gradient-checkpointing": {"gradient_checkpointing": True, "device": "cuda"},
    "--base-sharding": {"base_sharding": True, "device": "cuda"},
    "flash_attention_2": {"attn": "flash_attention_2", "device": "cuda"},
    "mixture of experts": {"device": "cuda", "experts": ["mlp.experts"]},
}


@pytest.mark.parametrize("reason, options", REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_captured_is_refused_by_name(reason, options):
    values = {"engine": "sequential"} | options
    device, experts = torch.device(values.pop("device", "cpu")), values.pop("experts", [])
    report = SimpleNamespace(experts=experts, parameters=[])
    job = SimpleNamespace(device=device, report=report, model=torch.nn.Linear(2, 2))
    said = []
    auto = config.Config().with_values(**values, cuda_graphs="auto")
    assert cuda_graphs.settled_for(auto, job, said.append).system.cuda_graphs == "off"
    assert len(said) == 1 and reason in said[0]
    with pytest.raises(BadInput, match=r"--cuda-graphs on: .* use --cuda-graphs off"):
        cuda_graphs.settled_for(auto.with_values(cuda_graphs="on"), job, said.append)


def test_where_nothing_forbids_it_graphs_are_on():
    report = SimpleNamespace(experts=[], parameters=[])
    job = SimpleNamespace(device=torch.device("cuda"), report=report, model=torch.nn.Linear(2, 2))
    auto = config.Config().with_values(engine="sequential", cuda_graphs="auto")
    assert cuda_graphs.settled_for(auto, job, lambda line: None).system.cuda_graphs == "on"


def test_the_command_says_what_it_does(files, tmp_path, call):
    flags = small(files, rounds=1, **{"output-dir": tmp_path / "run"})
    code, _, err = call(*flags, "--cuda-graphs", "on")
    assert code == 2 and err == (
        "error: --cuda-graphs on: cpu is no CUDA device: use --cuda-graphs off\n"
    )
    code, out, _ = call(*flags, "--cuda-graphs", "auto")
    assert code == 0 and "cuda graphs: off (cpu is no CUDA device)" in out
    assert "pad_to_multiple_of = 1\n" in (tmp_path / "run" / "config.toml").read_text()
    resumed = "--resume", "--output-dir", tmp_path / "run", "--rounds", 2
    assert call(*resumed, "--cuda-graphs", "off")[0] == 0
