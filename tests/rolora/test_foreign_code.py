"""A model folder's own code never runs, whatever is answered on standard input; pickle weights are
refused by name.
"""

import json

import pytest
import torch
import transformers as hf

from rolora import evaluate
from tests.models import make_files
from tests.rolora.commands import small

CODE = "open({marker!r}, 'w').close()\n"
CODE += "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
CODE += "class Config(LlamaConfig):\n    model_type = 'strange'\n"
CODE += "class Model(LlamaForCausalLM):\n    config_class = Config\n"
CODE += "class Tokens(PreTrainedTokenizerFast):\n    pass\n"


@pytest.fixture
def files(tmp_path):
    made = make_files(tmp_path)
    made["marker"] = tmp_path / "it-ran"
    (made["llama"] / "code.py").write_text(CODE.format(marker=str(made["marker"])))
    return made


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def run(python):
    def run(*words):
        code, _, err = python.run("-m", *words, typed="y\n" * 5)
        return code, [line for line in err.splitlines() if line.startswith("error:")], err

    return run


def data(files):
    return ["--train-file", files["train"], "--eval-file", files["eval"], "--max-length", 32]


def of_its_own(files):
    """A kind of model that only the folder's code knows."""
    edit(
        files["llama"] / "config.json",
        model_type="strange",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    )


def with_a_tokenizer(files):
    edit(
        files["llama"] / "tokenizer_config.json",
        tokenizer_class="Tokens",
        auto_map={"AutoTokenizer": ["code.Tokens", "code.Tokens"]},
    )


COMMANDS = {
    "train": ["rolora.train", "--dry-run", "--model"],
    "evaluate": ["rolora.evaluate", "--model"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("change", [of_its_own, with_a_tokenizer])
def test_code_of_a_model_folder_does_not_run(change, command, files, tmp_path, run):
    change(files)
    words = data(files) if command == "train" else data(files)[2:]
    code, errors, whole = run(*COMMANDS[command], files["llama"], *words)
    assert not files["marker"].exists()
    # A tokenizer that transformers can read without the folder's code is read so.
    assert code == 2 or change is with_a_tokenizer
    assert len(errors) == (code == 2) and "Traceback" not in whole, whole


def test_code_is_not_reached_through_an_adapter_s_base(files, tmp_path, run):
    of_its_own(files)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": 4,
                "lora_alpha": 8,
                "target_modules": ["q_proj"],
                "base_model_name_or_path": str(files["llama"]),
            }
        )
    )
    code, errors, whole = run("rolora.evaluate", "--adapter", adapter, *data(files)[2:])
    assert code == 2 and len(errors) == 1, whole
    assert not files["marker"].exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin"])
def test_pickled_weights_are_refused_by_name(name, files, run):
    model = hf.AutoModelForCausalLM.from_pretrained(files["llama"])
    for path in files["llama"].glob("*.safetensors"):
        path.unlink()
    torch.save(model.state_dict(), files["llama"] / name)
    code, errors, whole = run("rolora.train", "--model", files["llama"], *data(files))
    assert code == 2 and len(errors) == 1, whole
    assert name in errors[0] and "pickle" in errors[0] and "safetensors" in errors[0]


def test_a_program_that_an_adapter_names_does_not_run_unasked(files, tmp_path, call):
    adapter = tmp_path / "run" / "adapter"
    flags = small(files, rounds=1, **{"output-dir": tmp_path / "run"})
    assert call(*flags)[0] == 0
    program, sidecar = tmp_path / "recipe.py", adapter / "rolora.json"
    program.write_text(CODE.splitlines()[0].format(marker=str(files["marker"])))
    stored = json.loads(sidecar.read_text())
    stored["options"]["task_type"] = str(program)
    sidecar.write_text(json.dumps(stored))
    asked = ["--adapter", adapter, "--eval-file", files["eval"]]
    code, _, err = call(*asked, command=evaluate.command)
    assert code == 2 and err.count("\n") == 1 and "is not run unasked" in err
    assert not files["marker"].exists()
    call(*asked, "--task-type", program, command=evaluate.command)
    assert files["marker"].exists(), "named by the user, it runs"
