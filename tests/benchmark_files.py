"""The files of benchmarks as their authors distribute them, a few rows each."""

import json

from rolora.recipes import glue

HUB_COLUMNS = {  # as in nyu-mll/glue
    "sst2": ("sentence",),
    "qnli": ("question", "sentence"),
    "mnli": ("premise", "hypothesis"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
}
COMMONSENSE = {  # one row of every set in its hub columns, and the answer
    "boolq": (dict(question="is the sea wet", passage="The sea is water.", answer=True), "true"),
    "piqa": (dict(goal="dry a plate", sol1="use a towel", sol2="use soup", label=0), "use a towel"),
    "siqa": (
        dict(
            context="A left.",
            question="Why?",
            answerA="no",
            answerB="late",
            answerC="cold",
            label="2",
        ),
        "late",
    ),
    "hellaswag": (
        dict(
            ctx="A man sits", endings=["and stands", "and flies", "and rains", "and is"], label="0"
        ),
        "and stands",
    ),
    "winogrande": (
        dict(sentence="The _ is big", option1="cup", option2="house", answer="2"),
        "house",
    ),
    "arc_easy": (
        dict(
            question="Which is hot?",
            choices=dict(text=["ice", "fire"], label=["A", "B"]),
            answerKey="B",
        ),
        "fire",
    ),
    "arc_challenge": (
        dict(
            question="Which?",
            choices=dict(text=["p", "q", "r"], label=["1", "2", "3"]),
            answerKey="3",
        ),
        "r",
    ),
    "openbookqa": (
        dict(
            question_stem="Sun is",
            choices=dict(text=["hot", "wet"], label=["A", "B"]),
            answerKey="A",
        ),
        "hot",
    ),
}


def write_commonsense(folder, rows=6):
    for name, (row, _) in COMMONSENSE.items():
        (folder / name).mkdir(parents=True)
        for part in ("train", "validation"):
            (folder / name / f"{part}.jsonl").write_text((json.dumps(row) + "\n") * rows)
    return folder


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
