"""Where a traceback once was: damaged models, folders that cannot be made, terminals that cannot
show a letter. One line each, or no error at all.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from rolora import compare, evaluate, export, report
from rolora.errors import BadInput
from rolora.recipes.causal_lm import CausalLM
from rolora.recipes.multiple_choice import MultipleChoice, columns
from rolora.run import examples
from tests.models import tokenizer
from tests.rolora.commands import command_line, rows, small

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def overwritten(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])


def configured(**options):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | options))

    return change


MODELS = {
    "weights by LFS": (overwritten("model.safetensors", POINTER), "is Git LFS's pointer"),
    "configuration by LFS": (overwritten("config.json", POINTER), "is Git LFS's pointer"),
    "tokenizer by LFS": (overwritten("tokenizer.json", POINTER), "is Git LFS's pointer"),
    "cut weights": (cut, "model.safetensors is damaged or cut"),
    "no weights": (overwritten("model.safetensors", b""), "model.safetensors is damaged or cut"),
    "half a configuration": (overwritten("config.json", b'{"a'), "is not a valid JSON file"),
    "half a tokenizer": (overwritten("tokenizer.json", b'{"a'), "cannot be loaded"),
    "a deep configuration": (overwritten("config.json", b"[" * 100_000), "cannot be loaded"),
    "width": (configured(hidden_size=64), "as [350, 32], its config.json asks for [350, 64]"),
    "inner width": (configured(intermediate_size=32), "its config.json asks for [32, 32]"),
    "more words": (
        configured(vocab_size=1000),
        "as [350, 32], its config.json asks for [1000, 32]",
    ),
    "fewer words": (configured(vocab_size=100), "its config.json asks for [100, 32]"),
    "more blocks": (configured(num_hidden_layers=5), "its checkpoint lacks model.layers.3."),
    "fewer blocks": (configured(num_hidden_layers=2), "checkpoint has model.layers.2."),
    "heads": (configured(num_attention_heads=5), "is not a multiple of the number of attention"),
    "a text as a width": (configured(hidden_size="big"), "expected int, got str"),
    "nothing as a width": (configured(hidden_size=None), "expected int, got NoneType"),
    "an unknown dtype": (configured(dtype="float99"), "no attribute 'float99'"),
    "a number as quantisation": (configured(quantization_config=3), "cannot be loaded"),
    "an unknown kind": (configured(model_type="nonsense"), "model type `nonsense`"),
}


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
@pytest.mark.parametrize("name", MODELS)
def test_models_that_do_not_fit_themselves(name, task, files, tmp_path, call):
    change, message = MODELS[name]
    shutil.copytree(files["llama"], tmp_path / "model")
    change(tmp_path / "model")
    flags = small(files, model=tmp_path / "model", **{"task-type": task})
    code, _, err = call(*flags, "--output-dir", tmp_path / "run")
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_positions_that_do_not_fit_are_no_head(files, tmp_path, call):
    """They would be drawn anew, and trained."""
    shutil.copytree(files["roberta"], tmp_path / "model")
    configured(max_position_embeddings=90)(tmp_path / "model")
    flags = small(files, model=tmp_path / "model")
    code, _, err = call(*flags, "--output-dir", tmp_path / "run")
    assert code == 2 and err.count("\n") == 1
    assert "position_embeddings.weight as [66, 32], its config.json asks for [90, 32]" in err


@pytest.mark.parametrize(
    "place, message",
    [
        ("file/run", "would lie in"),
        ("file", "is a file"),
        ("link", "is a link to nothing"),
        ("link/run", "would lie in"),
        ("loop", "is a link to nothing"),
        ("n" * 300, "File name too long"),
        (f"{'n' * 300}/run", "File name too long"),
        ("/".join(["n" * 200] * 30), "File name too long"),
    ],
)
def test_folders_that_cannot_be_made(place, message, files, tmp_path, call):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = tmp_path / place
    code, _, err = call(*small(files, **{"output-dir": path}))
    assert code == 2 and message in err and err.count("\n") == 1
    for command, flags in (
        (None, ("--resume", "--output-dir", path)),
        (None, small(files, model=path)),
        (None, small(files, **{"init-adapter": path})),
        (None, ("--config", path)),
        (evaluate.command, ("--adapter", path, "--eval-file", files["eval"])),
        (export.command, ("--adapter", path, "--output-dir", path)),
        (report.command, (path,)),
        (compare.command, (*small(files)[:-4], "--methods", "ffa", "--output-dir", path)),
    ):
        code, _, err = call(*flags, **({"command": command} if command else {}))
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {"file", "link", "loop"} and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_cannot_show_every_letter(encoding, files, tmp_path):
    """ε, and a folder's name in Greek."""
    flags = small(files, rounds=1, **{"dp-clip": 0.1, "dp-noise": 1.0})
    run = tmp_path / "δοκιμή"
    done = subprocess.run(
        command_line(*flags, "--output-dir", run),
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"(\u03b5 " in done.stdout and rb"\u03b4\u03bf\u03ba" in done.stdout
    assert rows(run)[-1]["round"] == 1


def test_a_reader_that_goes_away_is_no_traceback():
    words = [sys.executable, "-m", "rolora.train", "--help"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() in (0, 1) and b"Traceback" not in errors


def test_a_column_named_task_makes_no_metrics(files, tmp_path, call):
    flags = {"prompt-column": "prompt", "choices-column": "choices", "label-column": "answer"}
    data = [json.loads(line) for line in files["train"].read_text().splitlines()]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row | {"task": row["label"]}) + "\n" for row in data))
    words = small(files, rounds=1, **flags, **{"output-dir": tmp_path / "run"})
    for flag in ("--train-file", "--eval-file"):
        words[words.index(flag) + 1] = path
    assert call(*words)[0] == 0
    metrics = rows(tmp_path / "run")[-1]["eval"]
    assert not [name for name in metrics if name.startswith("accuracy/")]


def bare(end):
    """A tokenizer that adds nothing to a text, with an end token or without."""
    made = tokenizer(["the sea"], "llama").backend_tokenizer
    made.post_processor = processors.Sequence([])
    options = {"eos_token": "</s>"} if end else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<s>", **options)


def test_texts_without_tokens(files):
    """With a tokenizer that adds nothing an empty text has nothing to learn from."""
    filled, empty = {"p": "a", "r": "the sea"}, {"p": "", "r": ""}
    recipe = CausalLM(bare(end=True), 32, "r", "p")
    lacking = [e.measure().lacks for e in recipe.encode([empty, filled])]
    assert lacking == ["it has no tokens to learn", None]
    with pytest.raises(BadInput, match="there is nothing to learn from in any row: it has no tok"):
        examples.encode(recipe, [empty, empty], "drop", "rows")
    with pytest.raises(BadInput, match="rows: row 2: it has no tokens to learn: mend or remove"):
        bare_end = CausalLM(bare(end=False), 32, "r", "p")
        examples.encode(bare_end, [filled, empty], "refuse", "rows")
    question = {"p": "", "c": ["", "x"], "a": 0}
    asked = MultipleChoice(bare(end=False), 32, columns("p", "c", "a"))
    with pytest.raises(BadInput, match=r"row 1 .*: a choice has no token to predict"):
        asked.encode([question])
