"""An adapter's folder is all that is needed elsewhere: PEFT and transformers judge, from other
folders and without ours.
"""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rolora import builtin, evaluate, export
from rolora.errors import BadInput
from rolora.run import adapter_folder
from tests.rolora.commands import rows, small


@pytest.fixture(scope="module")
def place(files, tmp_path_factory):
    """A folder with the models and the data, where paths are relative."""
    root = tmp_path_factory.mktemp("place")
    for name in ("llama", "roberta"):
        shutil.copytree(files[name], root / name)
    tokenizer = AutoTokenizer.from_pretrained(root / "llama")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(root / "llama")
    return root


def trained(files, call, run, **options):
    flags = small(files, rounds=1, **{"model": "llama", "output-dir": run} | options)
    assert call(*flags)[0] == 0
    return run / "adapter"


def metrics(call, *args):
    code, out, err = call(*args, "--json", command=evaluate.command)
    assert (code, err) == (0, "")
    return json.loads(out)


def test_a_relative_base_is_found_from_elsewhere(files, place, tmp_path, call, monkeypatch):
    monkeypatch.chdir(place)
    adapter = trained(files, call, tmp_path / "run")
    stored = json.loads((adapter / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(place / "llama")
    monkeypatch.chdir("/")
    expected = pytest.approx(rows(tmp_path / "run")[-1]["eval"])
    assert metrics(call, "--adapter", adapter, "--eval-file", files["eval"]) == expected
    moved = tmp_path / "elsewhere"
    shutil.copytree(adapter, moved / "adapter")
    shutil.copytree(place / "llama", moved / "llama")
    for name in ("/nowhere/llama", "./llama", "llama", "../llama"):
        stored["base_model_name_or_path"] = name
        (moved / "adapter" / "adapter_config.json").write_text(json.dumps(stored))
        args = ("--adapter", moved / "adapter", "--eval-file", files["eval"])
        assert metrics(call, *args) == expected
    shutil.rmtree(moved / "llama")
    for name in ("/nowhere/llama", "./llama", "../llama"):
        stored["base_model_name_or_path"] = name
        (moved / "adapter" / "adapter_config.json").write_text(json.dumps(stored))
        code, _, err = call(*args, command=evaluate.command)
        assert code == 2 and "its base" in err and "give --model" in err and err.count("\n") == 1
        assert metrics(call, *args, "--model", place / "llama") == expected


def test_a_hub_s_name_stays_as_it_is(tmp_path):
    assert adapter_folder.find_base(tmp_path, "meta-llama/Llama-2-7b-hf") == (
        "meta-llama/Llama-2-7b-hf"
    )
    assert adapter_folder.to_record("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"
    with pytest.raises(BadInput, match="is not here"):
        adapter_folder.find_base(tmp_path, "a/b/c")


def test_the_built_in_model_is_found_by_its_name(files, tmp_path, call):
    flags = [f for f in small(files, rounds=1, **{"output-dir": tmp_path / "run"})]
    del flags[flags.index("--model") : flags.index("--model") + 2]
    assert call(*flags)[0] == 0
    path = tmp_path / "run" / "adapter" / "adapter_config.json"
    stored = json.loads(path.read_text())
    assert stored["base_model_name_or_path"] == str(builtin.MODEL)
    stored["base_model_name_or_path"] = "/other/site-packages/rolora/builtin/model"
    path.write_text(json.dumps(stored))
    args = ("--adapter", path.parent, "--eval-file", files["eval"])
    assert metrics(call, *args) == pytest.approx(rows(tmp_path / "run")[-1]["eval"])
    merged = ("--adapter", path.parent, "--to", "merged", "--output-dir", tmp_path / "merged")
    assert call(*merged, command=export.command)[0] == 0
    exported = ("--adapter", path.parent, "--output-dir", tmp_path / "peft")
    assert call(*exported, command=export.command)[0] == 0
    again = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert again["base_model_name_or_path"] == str(builtin.MODEL)


@pytest.mark.parametrize("family", ["llama", "roberta"])
@pytest.mark.parametrize("exported", [False, True])
def test_the_card_loads_the_adapter_and_its_tokenizer(
    family, exported, files, place, tmp_path, call, monkeypatch
):
    """The card's own program, run in the adapter's folder, predicts what we measured."""
    monkeypatch.chdir(place)
    adapter = trained(files, call, tmp_path / "run", model=family)
    if exported:
        args = ("--adapter", adapter, "--output-dir", tmp_path / "again")
        assert call(*args, command=export.command)[0] == 0
        adapter = tmp_path / "again"
    card = (adapter / "README.md").read_text()
    assert "`num_labels=3`" in card and "0. `hill`\n1. `sea`\n2. `town`" in card
    (program,) = re.findall(r"```python\n(.*?)```", card, re.S)
    monkeypatch.chdir(adapter)
    known = {}
    exec(program, known)
    model, tokenizer, right = known["model"].eval(), known["tokenizer"], 0
    held = [json.loads(line) for line in files["eval"].read_text().splitlines()]
    for row in held:
        ids = tokenizer(row["text"], truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            guess = int(model(**ids).logits.argmax())
        right += model.config.id2label[guess] == row["label"]
    assert right / len(held) == rows(tmp_path / "run")[-1]["eval"]["accuracy"]
    if family == "llama":
        shown = tokenizer.apply_chat_template([{"role": "u", "content": "x"}], tokenize=False)
        assert shown == "<u>x"


def test_the_card_of_a_causal_lm(files, place, tmp_path, call, monkeypatch):
    monkeypatch.chdir(place)
    options = {"prompt-column": "prompt", "response-column": "response"}
    adapter = trained(files, call, tmp_path / "run", **options)
    (program,) = re.findall(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.S)
    monkeypatch.chdir(adapter)
    known = {}
    exec(program, known)
    assert known["model"].peft_config["default"].r == 4


def test_a_checkpoint_s_own_head_goes_along(files, tmp_path, call):
    """PEFT asks a classifier's adapter for its head, be the head the checkpoint's own."""
    import peft
    from safetensors.torch import load_file

    own = tmp_path / "own"
    model = AutoModelForSequenceClassification.from_pretrained(files["roberta"], num_labels=3)
    model.save_pretrained(own)
    AutoTokenizer.from_pretrained(files["roberta"]).save_pretrained(own)
    flags = small(files, "roberta", rounds=1, model=own, **{"output-dir": tmp_path / "run"})
    assert call(*flags)[0] == 0
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    head = "classifier.out_proj.weight"
    assert torch.equal(saved[f"base_model.model.{head}"], model.state_dict()[head])
    base = AutoModelForSequenceClassification.from_pretrained(own)
    served = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    answer = served.load_adapter(tmp_path / "run" / "adapter", "again")
    assert not [key for key in answer.missing_keys if "again" in key] and not answer.unexpected_keys


@pytest.mark.parametrize("text", ["{", "[]", '{"options": 3, "labels": []}'])
def test_a_damaged_sidecar_is_one_line(text, files, place, tmp_path, call, monkeypatch):
    monkeypatch.chdir(place)
    adapter = trained(files, call, tmp_path / "run")
    (adapter / "rolora.json").write_text(text)
    for command, more in (
        (evaluate.command, ("--eval-file", files["eval"])),
        (export.command, ("--to", "merged", "--output-dir", tmp_path / "m")),
    ):
        code, _, err = call("--adapter", adapter, *more, command=command)
        assert code == 2 and "is damaged: remove it" in err and err.count("\n") == 1
