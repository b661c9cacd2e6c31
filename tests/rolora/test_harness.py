"""lm-evaluation-harness on our adapters: a task of one's own, and what cannot run says so."""

import importlib.util
import json

import pytest

from rolora import evaluate as evaluate_command
from tests.rolora.commands import small

TASK = """task: hills
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def adapter(files, tmp_path_factory):
    from rolora.train import command

    out = tmp_path_factory.mktemp("harness") / "run"
    command.main(
        [
            str(part)
            for part in small(
                files,
                rounds=2,
                **{
                    "prompt-column": "prompt",
                    "choices-column": "choices",
                    "label-column": "answer",
                    "output-dir": out,
                },
            )
        ]
        + ["--quiet"],
        standalone_mode=False,
    )
    return out / "adapter"


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra `eval`)"
)
def test_a_task_of_ones_own_gives_our_own_accuracy(adapter, files, tmp_path, call):
    held = [json.loads(line) for line in files["eval"].read_text().splitlines()]
    path = tmp_path / "hills.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "prompt": row["prompt"],
                    "choices": [f"{c}" for c in row["choices"]],
                    "answer": row["choices"].index(row["answer"])
                    if row["answer"] in row["choices"]
                    else int(row["answer"]),
                }
            )
            + "\n"
            for row in held
        )
    )
    (tmp_path / "hills.yaml").write_text(TASK.format(path=path))
    code, out, err = call(
        "--adapter",
        adapter,
        "--harness",
        "hills",
        "--harness-tasks",
        tmp_path,
        "--json",
        command=evaluate_command.command,
    )
    assert code == 0, err
    theirs = json.loads(out.splitlines()[-1])["hills/acc"]
    code, out, err = call(
        "--adapter",
        adapter,
        "--eval-file",
        files["eval"],
        "--json",
        command=evaluate_command.command,
    )
    assert theirs == pytest.approx(json.loads(out)["accuracy_unnormalised"])
    code, _, err = call(
        "--adapter", adapter, "--harness", "nonsense_task", command=evaluate_command.command
    )
    assert code == 2 and "lm-eval knows no such task" in err.splitlines()[-1]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_package_one_line_says_so(adapter, call):
    code, _, err = call("--adapter", adapter, "--harness", "mmlu", command=evaluate_command.command)
    assert code == 2 and "pip install '.[eval]' in your clone" in err and err.count("\n") == 1
