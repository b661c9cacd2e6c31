"""Runs on conversations and on preferences, from the command to the adapter; what the plan counts."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rolora import evaluate as evaluate_command
from rolora.recipes import packing
from tests import templates
from tests.rolora.commands import bits, rows, small


@pytest.fixture(scope="module")
def chatty(files, tmp_path_factory):
    """A small model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("chatty")
    words = AutoTokenizer.from_pretrained(files["llama"])
    names = ["start_header_id", "end_header_id", "eot_id"]
    words.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    words.chat_template = templates.LLAMA3
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words), max_position_embeddings=128, **size)
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def flags(files, chatty, tmp_path):
    """The flags of a short run on `name`'s file into a folder of that name."""

    def flags(name, *, into="run", **extra):
        given = {"train-file": files[name], "model": chatty, "max-length": 64, "rounds": 2}
        given |= {"output-dir": tmp_path / into} | extra
        made = small(files, **given)
        at = made.index("--eval-file")
        return made[:at] + made[at + 2 :]

    return flags


def evaluated(call, *args):
    code, out, err = call(*args, "--json", command=evaluate_command.command)
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("name, headline", [("chat", "loss"), ("pairs", "reward_accuracy")])
def test_a_run_its_adapter_and_its_resumption(name, headline, call, files, flags, tmp_path):
    code, out, err = call(*flags(name, rounds=4))
    assert code == 0, err
    described = {
        "chat": "the tokenizer's; the assistant's turns are where it says generation",
        "pairs": "none: texts are taken as they are",
    }
    assert f"chat template: {described[name]}\n" in out
    found = rows(tmp_path / "run")
    assert found[-1]["eval"]["loss"] < found[0]["eval"]["loss"]
    assert f"held-out {headline.replace('_', ' ')}: " in out
    folder = tmp_path / "run" / "adapter"
    assert (folder / "chat_template.jinja").exists(), "it goes along with the tokenizer it is of"
    metrics = evaluated(call, "--adapter", folder, "--eval-file", files[name])
    assert metrics["loss"] < found[0]["eval"]["loss"] and headline in metrics
    assert call(*flags(name, into="two", rounds=2))[0] == 0
    code, _, err = call("--resume", "--output-dir", tmp_path / "two", "--rounds", "4")
    assert code == 0, err
    assert bits(tmp_path / "two") == bits(tmp_path / "run")


def test_what_the_assistant_would_say_can_be_read(call, flags, tmp_path):
    assert call(*flags("chat", samples=2))[0] == 0
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [sample["round"] for sample in found] == [0, 0, 1, 1, 2, 2]
    said = (tmp_path / "run" / "config.toml").read_text()
    assert "samples = 2" in said and all(sample["reference"].strip() for sample in found)
    assert all(sample["reference"] not in sample["prompt"] for sample in found)


@pytest.mark.parametrize("name", ["chat", "pairs"])
def test_both_engines_train_alike(name, call, flags, tmp_path):
    for engine in ("sequential", "batched"):
        code, _, err = call(*flags(name, into=engine, engine=engine, dropout=0.1))
        assert code == 0, err
    one, other = (rows(tmp_path / engine) for engine in ("sequential", "batched"))
    for mine, theirs in zip(one[1:], other[1:], strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert mine["eval"]["loss"] == pytest.approx(theirs["eval"]["loss"], rel=1e-3)
        assert mine["tokens"] == theirs["tokens"]


def test_a_template_of_ones_own_goes_with_the_adapter(call, files, flags, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(templates.PHI3)
    code, out, err = call(*flags("chat", rounds=1, **{"chat-template": path}))
    assert code == 0, err
    assert "chat template: --chat-template; " in out
    path.unlink()
    adapter = tmp_path / "run" / "adapter"
    assert (adapter / "chat_template.jinja").read_text() == templates.PHI3
    own = evaluated(call, "--adapter", adapter, "--eval-file", files["chat"])
    flag = ("--chat-template", templates.LLAMA3)
    other = evaluated(call, "--adapter", adapter, "--eval-file", files["chat"], *flag)
    assert own["loss"] != other["loss"]
    code, _, err = call("--resume", "--output-dir", tmp_path / "run", "--rounds", "2")
    assert code == 0, err


def broken(files, tmp_path):
    """The conversations with three that nothing can be learned from: rows 2, 5 and 7."""
    found = [json.loads(line) for line in files["chat"].read_text().splitlines()]
    found[1]["messages"] = []
    found[4]["messages"] = found[4]["messages"][:1]
    found[6]["messages"][0]["content"] = "the old ship " * 40
    path = tmp_path / "broken.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_what_nothing_can_be_learned_from_is_counted_and_dropped(call, files, flags, tmp_path):
    path = broken(files, tmp_path)
    given = {"train-file": path, "eval-file": path}
    everything = [*flags("chat", **given), "--eval-file", path, "--validation-fraction", "0"]
    code, out, err = call(*everything, "--dry-run")
    assert code == 0, err
    counted = next(line for line in out.splitlines() if line.startswith("examples: "))
    assert "160 of 0 / " in counted and "--max-length cuts 1 (0.6%) and " in counted
    assert "1 dropped (it has no messages: row 2)" in counted
    assert "1 dropped (it has no turn of the assistant's: row 5)" in counted
    assert "1 dropped (its answer is cut away by --max-length: row 7)" in counted
    assert "157 to evaluate on" in out
    columns = ["--partition", "column", "--client-column", "owner"]
    code, out, err = call(*everything, *columns)
    assert code == 0, err
    assert all(row["eval"]["loss"] > 0 for row in rows(tmp_path / "run"))
    adapter = tmp_path / "run" / "adapter"
    assert evaluated(call, "--adapter", adapter, "--eval-file", path)["dropped"] == 3


def test_what_nothing_can_be_learned_from_is_refused_where_that_is_asked(
    call, files, flags, tmp_path
):
    path = broken(files, tmp_path)
    given = {"train-file": path, "unlearnable": "refuse"}
    code, _, err = call(*flags("chat", **given), "--dry-run")
    assert code == 2 and f"{path}: row 2: it has no messages: mend or remove it, or give " in err
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"messages": []}\n' * 5)
    code, _, err = call(*flags("chat", **{"train-file": empty}), "--dry-run")
    assert (
        code == 2 and "there is nothing to learn from in any row: it has no messages (row " in err
    )


def test_rows_are_numbered_as_in_the_file(call, files, flags, tmp_path):
    """Though a tenth of them is held out before they are read."""
    for number in (1, 80, 160):
        found = files["chat"].read_text().splitlines()
        found[number - 1] = '{"messages": [{"role": "narrator", "content": "a"}]}'
        path = tmp_path / "one.jsonl"
        path.write_text("\n".join(found))
        code, _, err = call(*flags("chat", **{"train-file": path}), "--dry-run")
        assert code == 2 and f"{path}: row {number}: message 1 has the role text 'narrator'" in err


def test_causal_lm_counts_what_is_cut_too(call, files, flags):
    columns = {"prompt-column": "prompt", "response-column": "response", "max-length": 9}
    code, out, err = call(*flags("train", **columns), "--dry-run")
    assert code == 0, err
    counted = next(line for line in out.splitlines() if line.startswith("examples: "))
    assert counted.startswith("examples: 144 of 10 / 10 / 10 / 10 / 10 tokens ")
    assert counted.endswith("; --max-length cuts 144 (100.0%) and 10.0% of all tokens")
    held = next(line for line in out.splitlines() if line.startswith("held-out examples: "))
    assert held.startswith("held-out examples: 16 of ")


def of_all_lengths(files, name, tmp_path):
    """The rows with questions of one to ten times their length."""
    found = [json.loads(line) for line in files[name].read_text().splitlines()]
    for number, row in enumerate(found):
        asked = row["messages"][0] if name == "chat" else row
        column = "content" if name == "chat" else "prompt"
        asked[column] = asked[column] * (1 + 3 * (number % 4))
    path = tmp_path / "lengths.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.mark.parametrize("name", ["chat", "train"])
def test_packing_trains_the_same_and_is_refused_by_the_batched_engine(
    name, call, files, flags, tmp_path, monkeypatch
):
    handed = []
    monkeypatch.setattr(packing, "laid_out", counted(packing.laid_out, handed))
    columns = {"prompt-column": "prompt", "response-column": "response"} if name == "train" else {}
    columns |= {"train-file": of_all_lengths(files, name, tmp_path), "optimizer": "sgd"}
    columns |= {"max-length": 96}
    for into, given in (("padded", {}), ("packed", {"packing": True})):
        code, _, err = call(*flags(name, into=into, **columns, **given))
        assert code == 0, err
    assert 1 < max(handed) <= 8 and sum(handed) < 7 * len(handed), "rows for eight examples"
    padded, packed = (rows(tmp_path / into) for into in ("padded", "packed"))
    for mine, theirs in zip(padded, packed, strict=True):
        assert mine["eval"]["loss"] == pytest.approx(theirs["eval"]["loss"], rel=1e-4)
        assert (mine["tokens"], mine["clients"]) == (theirs["tokens"], theirs["clients"])
    code, _, err = call(*flags(name, packing=True, engine="batched", **columns))
    assert code == 2 and "--engine batched: rows of --packing are several examples" in err


def counted(call, handed):
    """`call`, which notes how many rows it is handed."""

    def noted(packed, *args):
        handed.append(len(packed))
        return call(packed, *args)

    return noted
