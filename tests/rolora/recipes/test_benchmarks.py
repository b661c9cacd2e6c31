"""The paper's benchmarks: the files as they are distributed, prompts and metrics as defined, and
every preset end to end.
"""

import json

import numpy as np
import pytest
import torch
import transformers as hf

from rolora import config
from rolora import evaluate as evaluate_command
from rolora.config import presets
from rolora.errors import BadInput
from rolora.recipes import commonsense, glue, instructions
from rolora.recipes.answer_sentence import AnswerSentence, parse
from rolora.recipes.benchmarks import BENCHMARKS
from rolora.recipes.classification import PART, Classification
from rolora.recipes.multiple_choice import SET
from tests.rolora.commands import rows
from tests.rolora.recipes.test_recipes import COMMONSENSE, write_commonsense

HUB_COLUMNS = {  # as in nyu-mll/glue
    "sst2": ("sentence",),
    "qnli": ("question", "sentence"),
    "mnli": ("premise", "hypothesis"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
}
OWN_FILES = {  # as GLUE itself distributes them
    "sst2": 'sentence\tlabel\nit \'s "great\tgood fun\t1\n"a mess\t0\n',
    "qnli": 'index\tquestion\tsentence\tlabel\n0\tWho "left?\tHe did.\tentailment\n1\tWhen?\tIt rained.\tnot_entailment\n',
    "mnli": "index\tpromptID\tsentence1\tsentence2\tgold_label\n"
    '0\t1\tHe "ate.\tHe was full.\tneutral\n1\t2\tA\tB\tcontradiction\n2\t3\tA\tB\t-\n',
    "qqp": 'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWhy "sky?\tWhy?\t0\n1\t3\t4\tA\tA?\t1\nbroken line\n',
    "rte": "index\tsentence1\tsentence2\tlabel\n0\tIt rained.\tIt was "
    "wet.\tentailment\n1\tA.\tB.\tnot_entailment\n",
}


def write_glue(folder, task, count=40):
    """Files with the hub's columns: labels are numbers, and follow a word of the text, so that
    something can be learnt.
    """
    folder.mkdir(parents=True)
    classes, texts = len(glue.TASKS[task].labels), HUB_COLUMNS[task]
    stems = [
        "train",
        *(("validation_matched", "validation_mismatched") if task == "mnli" else ("validation",)),
    ]
    for stem in stems:
        found = [
            {name: f"{['red', 'green', 'blue'][i % classes]} thing {i}" for name in texts}
            | {"label": i % classes, "idx": i}
            for i in range(count)
        ]
        (folder / f"{stem}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in [*found, {**found[0], "label": -1}])
        )
    return folder


@pytest.mark.parametrize("task", HUB_COLUMNS)
def test_glue_from_the_hub_s_files_and_from_glue_s_own(task, tmp_path, capsys):
    train, held = glue.load(task, str(write_glue(tmp_path / "hub", task)))
    assert len(train) == 40 and len(held) == (80 if task == "mnli" else 40), (
        "rows without a label are left out"
    )
    assert train[1] == {"text": "green thing 1", "label": glue.TASKS[task].labels[1]} | (
        {"text_pair": "green thing 1"} if len(HUB_COLUMNS[task]) == 2 else {}
    )
    own = tmp_path / "own"
    own.mkdir()
    for stem in ("train", *(("dev_matched", "dev_mismatched") if task == "mnli" else ("dev",))):
        (own / f"{stem}.tsv").write_text(OWN_FILES[task])
    train, held = glue.load(task, str(own))
    said = capsys.readouterr().out
    assert len(train) == (1 if task == "sst2" else 2), (
        "quotes are text, and so are lines with a tab too many wrong"
    )
    assert (
        ("1 of 2 rows" in said)
        if task == "sst2"
        else ("1 of 3 rows" in said)
        if task == "qqp"
        else not said
    )
    assert '"' in (train[0]["text"] + train[0].get("text_pair", "")) or task == "rte"
    assert {row.get(PART) for row in held} == ({None, "mismatched"} if task == "mnli" else {None})


def test_glue_says_what_is_wrong(tmp_path):
    (tmp_path / "bad").mkdir()
    with pytest.raises(BadInput, match="has no train file"):
        glue.load("rte", str(tmp_path / "bad"))
    for stem in ("train", "validation"):
        (tmp_path / "bad" / f"{stem}.jsonl").write_text('{"premise": "a", "label": 0}\n')
    with pytest.raises(
        BadInput, match="has columns premise, label, expected sentence1 and sentence2, label"
    ):
        glue.load("rte", str(tmp_path / "bad"))


def test_accuracy_f1_and_the_mismatched_half():
    class Guesses(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return type(
                "Out", (), {"logits": torch.nn.functional.one_hot(input_ids[:, 0], 3).float()}
            )

    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    texts = {f"t{i}": [int(g)] for i, g in enumerate(guess)}
    tokenizer = lambda batch, pairs, **_: {"input_ids": [texts[t] for t in batch]}  # noqa: E731
    tokenizer.pad_token_id = 0
    recipe = Classification(tokenizer, ["a", "b", "c"], 8, "text", "label", positive="b")
    found = [
        {"text": f"t{i}", "label": "abc"[t]} | ({PART: "mismatched"} if i % 3 == 0 else {})
        for i, t in enumerate(truth)
    ]
    metrics = recipe.evaluate(Guesses(), recipe.encode(found), 7)
    first = np.arange(60) % 3 != 0
    assert metrics["accuracy"] == pytest.approx((truth == guess)[first].mean())
    assert metrics["accuracy/mismatched"] == pytest.approx((truth == guess)[~first].mean())
    precision, recall = (
        ((truth == 1) & (guess == 1)).sum() / (guess == 1).sum(),
        ((truth == 1) & (guess == 1)).sum() / (truth == 1).sum(),
    )
    assert metrics["f1"] == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize(
    "text, choice",
    [
        ("the correct answer is answer2", 1),
        ("answer1, or answer2", 0),
        ("Answer2", None),
        ("nothing", None),
        ("answer10", 9),
    ],
)
def test_the_answer_is_the_first_that_is_named(text, choice):
    assert parse(text, [f"answer{i}" for i in range(1, 11)]) == choice


def test_what_is_written_is_greedy_decoding_and_is_judged_by_what_it_names(files, monkeypatch):
    model = hf.AutoModelForCausalLM.from_pretrained(files["llama"]).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(files["llama"])
    tokenizer.pad_token = tokenizer.eos_token
    recipe = AnswerSentence(tokenizer, 120, commonsense.read)
    found = [{**row, SET: name} for name, (row, _) in COMMONSENSE.items()]
    questions = recipe.encode(found)
    written = recipe.write(model, questions, batch_size=3)
    room = max(len(c.ids) - c.start for q in questions for c in q.choices) + 4
    for question, text in zip(
        questions, written, strict=True
    ):  # one by one, without padding or cache
        ids, new = list(question.choices[0].ids[: question.choices[0].start]), []
        while len(new) < room and len(ids) < model.config.max_position_embeddings:
            with torch.no_grad():
                best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if best == tokenizer.eos_token_id:
                break
            ids.append(best), new.append(best)
        mine = tokenizer.decode(new, skip_special_tokens=True)
        assert mine.startswith(text) or text.startswith(mine)
    answers = [recipe.named(row)[1][recipe.named(row)[2]] for row in found]
    said = [f"the correct answer is {a}" if i % 2 else "no idea" for i, a in enumerate(answers)]
    monkeypatch.setattr(recipe, "write", lambda *_: said)
    metrics = recipe.evaluate(model, questions, 4)
    assert (
        metrics["accuracy"] == metrics["answered"] == 0.5
        and metrics["accuracy/piqa"] == 1.0
        and metrics["accuracy/boolq"] == 0.0
    )
    assert 0 <= metrics["likelihood_accuracy"] <= 1


def test_alpaca_s_two_prompts(tmp_path):
    (tmp_path / "train.jsonl").write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in (
                {"instruction": "Add.", "input": "1 2", "output": "3"},
                {"instruction": "Hi", "input": "", "output": "Hello"},
            )
        )
    )
    (first, second), none = instructions.load("alpaca", str(tmp_path))
    assert none is None and first["response"] == "3"
    assert first["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert "paired with an input" in first["prompt"]
    assert "### Input" not in second["prompt"] and second["prompt"].endswith(
        "### Instruction:\nHi\n\n### Response:\n"
    )
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(BadInput, match="columns text, expected instruction, input, output"):
        instructions.load("alpaca", str(tmp_path))


def test_the_names_are_the_configuration_s():
    assert tuple(BENCHMARKS) == config.BENCHMARKS
    for name, options in presets.PRESETS.items():
        config.resolve({}, preset=name)
        assert options.get("benchmark") in (None, *BENCHMARKS)
    assert {
        clients * options["rounds"]
        for clients in (3, 20, 50)
        for name, options in presets.PRESETS.items()
        if name.startswith(f"mnli-{clients}-")
    } == {1500}, "rounds × clients is constant"


SMALL = (
    "--clients",
    4,
    "--rounds",
    2,
    "--local-steps",
    2,
    "--layers",
    "1-2",
    "--engine",
    "sequential",
)


@pytest.mark.parametrize("task", HUB_COLUMNS)
def test_glue_presets_end_to_end(task, files, tmp_path, call):
    data = write_glue(tmp_path / "data", task)
    code, _, err = call(
        "--preset",
        f"{task}-20-r4",
        "--model",
        files["roberta"],
        "--dataset",
        data,
        *SMALL,
        "--max-length",
        32,
        "--batch-size",
        4,
        "--eval-every",
        1,
        "--output-dir",
        tmp_path / "run",
    )
    assert (code, err) == (0, "")
    last = rows(tmp_path / "run")[-1]["eval"]
    assert set(last) == {"accuracy", "loss"} | (
        {"f1"} if task == "qqp" else {"accuracy/mismatched"} if task == "mnli" else set()
    )
    code, out, err = call(
        "--adapter",
        tmp_path / "run" / "adapter",
        "--dataset",
        data,
        "--json",
        command=evaluate_command.command,
    )
    assert (code, err) == (0, "") and json.loads(out) == pytest.approx(last)


@pytest.mark.parametrize("name", ["commonsense", "alpaca", "codealpaca"])
def test_llama_presets_end_to_end(name, files, tmp_path, call):
    if name == "commonsense":
        data = write_commonsense(tmp_path / "data", rows=4)
    else:
        data = tmp_path / "data"
        data.mkdir()
        data.joinpath("train.jsonl").write_text(
            "".join(
                json.dumps(
                    {"instruction": f"Say {i}.", "input": "loudly" * (i % 2), "output": str(i)}
                )
                + "\n"
                for i in range(60)
            )
        )
    code, _, err = call(
        "--preset",
        name,
        "--model",
        files["llama"],
        "--dataset",
        data,
        *SMALL,
        "--max-length",
        100,
        "--eval-every",
        1,
        "--output-dir",
        tmp_path / "run",
    )
    assert (code, err) == (0, "")
    last = rows(tmp_path / "run")[-1]["eval"]
    assert (
        ("answered" in last and "likelihood_accuracy/piqa" in last)
        if name == "commonsense"
        else "perplexity" in last
    )
    if name == "commonsense":
        code, out, err = call(
            "--adapter",
            tmp_path / "run" / "adapter",
            "--dataset",
            data,
            "--json",
            command=evaluate_command.command,
        )
        assert (code, err) == (0, "") and json.loads(out) == pytest.approx(last)


@pytest.fixture(scope="module")
def shapes(files, tmp_path_factory):
    """Folders with the configurations of RoBERTa-large and Llama-2-7B and a small tokenizer: no
    weights, which a plan does not need.
    """
    made = {}
    for name, family, settings in (
        (
            "roberta",
            "roberta",
            hf.RobertaConfig(
                hidden_size=1024,
                num_hidden_layers=24,
                num_attention_heads=16,
                intermediate_size=4096,
                max_position_embeddings=514,
                architectures=["RobertaForMaskedLM"],
            ),
        ),
        (
            "llama",
            "llama",
            hf.LlamaConfig(
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
                vocab_size=32000,
                max_position_embeddings=4096,
                architectures=["LlamaForCausalLM"],
            ),
        ),
    ):
        made[name] = tmp_path_factory.mktemp(name)
        settings.save_pretrained(made[name])
        hf.AutoTokenizer.from_pretrained(files[family]).save_pretrained(made[name])
    return made


# KiB of one factor in fp32 (2 projections × blocks × r × 1024 × 4 bytes; Llama: 4 × 6 or 8 blocks ×
# r × 4096 × 4 bytes).
FIGURES = {
    "sst2-3-r4": 192,
    "qnli-50-r4": 288,
    "qnli-50-r8": 576,
    "mnli-20-r4": 288,
    "qqp-3-r8": 576,
    "rte-50-r4": 256,
    "commonsense": 3072,
    "alpaca": 4096,
    "codealpaca": 4096,
}


@pytest.mark.parametrize("preset", FIGURES)
def test_the_plan_has_the_paper_s_figures(preset, shapes, tmp_path, call):
    benchmark = presets.PRESETS[preset]["benchmark"]
    if benchmark == "commonsense":
        data = write_commonsense(tmp_path / "data", rows=20)
    elif benchmark in HUB_COLUMNS:
        data = write_glue(tmp_path / "data", benchmark, count=120)
    else:
        data = tmp_path / "data"
        data.mkdir()
        data.joinpath("train.jsonl").write_text(
            (json.dumps({"instruction": "a", "input": "", "output": "b"}) + "\n") * 200
        )
    model = shapes["roberta" if benchmark in HUB_COLUMNS else "llama"]
    code, out, err = call("--preset", preset, "--model", model, "--dataset", data, "--dry-run")
    assert (code, err) == (0, "")
    kib = FIGURES[preset]
    assert f"factors in fp32: A: {kib:,} KiB, B: {kib:,} KiB" in out
    if model == shapes["llama"]:
        assert "6,7" in out.split("frozen parameters")[0].splitlines()[-1], "Llama-2-7B's own count"
        assert (
            f"{2 * kib * 256:,} factor parameters" in out
            and f"{kib * 1024 // 2:,} bytes up a client and round" in out
        )
    clients, rounds = presets.PRESETS[preset]["clients"], presets.PRESETS[preset]["rounds"]
    assert f"clients: {clients}, {clients} a round" in out and f"rounds: {rounds} of rolora" in out


@pytest.mark.parametrize(
    "args, message",
    [
        (("--benchmark", "cola"), "--benchmark 'cola' is not one of"),
        (
            ("--preset", "qnli-50-r4", "--train-file", "x.tsv"),
            "--benchmark qnli reads its own data",
        ),
        (("--preset", "qnli-50-r5"), "preset 'qnli-50-r5' is not one of"),
        (
            ("--benchmark", "rte", "--dataset", "{empty}", "--model", "{roberta}"),
            "has no train file",
        ),
    ],
)
def test_bad_input(args, message, files, tmp_path, call):
    (tmp_path / "empty").mkdir()
    code, _, err = call(
        *(a.format(empty=tmp_path / "empty", roberta=files["roberta"]) for a in args),
        "--output-dir",
        tmp_path / "new",
    )
    assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "new").exists()
