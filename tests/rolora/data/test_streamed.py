"""Many rows and examples: read from disk when they are asked for, and the same as in memory."""

import gzip
import json
import os
import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest

from rolora.config import resolve
from rolora.data import files, streamed
from rolora.data.stored import Stored, Unstorable, column, store
from rolora.data.streamed import Streamed, chosen
from rolora.errors import BadInput
from rolora.federated import partition
from rolora.recipes.answer_sentence import Written
from rolora.recipes.causal_lm import Completion
from rolora.recipes.classification import Labelled
from rolora.recipes.multiple_choice import Question
from rolora.recipes.preference import Pair
from rolora.recipes.spans import Marked
from rolora.run import digest, examples
from rolora.run.job import prepare
from tests.rolora.commands import bits, small

ROWS = [{"text": f"row {n}", "label": n % 3, "more": [n, None, 0.1 * n]} for n in range(57)]
PLAIN = files.with_numbers(ROWS)


def numbers(rows):
    return [row.number for row in rows]


def test_rows_that_are_streamed_are_a_list_that_is_read():
    many = Streamed(lambda: iter(ROWS), len(ROWS))
    assert len(many) == 57 and list(many) == PLAIN and numbers(many) == list(range(1, 58))
    for index in (0, 5, 56, -1, -57, np.int64(3)):
        assert many[index] == PLAIN[index] and many[index].number == PLAIN[index].number
    for cut in (slice(4), slice(3, 9), slice(1, None, 5), slice(-3, None), slice(60, None)):
        assert many[cut] == PLAIN[cut] and numbers(many[cut]) == numbers(PLAIN[cut])
    for wrong in (57, -58):
        with pytest.raises(IndexError):
            many[wrong]
    rng = np.random.default_rng(0)
    some = np.sort(rng.permutation(57)[:30])
    fewer = np.sort(rng.permutation(30)[:11])
    expected = chosen(chosen(PLAIN, some), fewer)
    found = chosen(chosen(many, some), fewer)
    assert isinstance(found, Streamed) and list(found) == expected
    assert numbers(found) == numbers(expected) and found[4] == expected[4]
    with pytest.raises(ValueError, match="forward"):
        many[::-1]


def write(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10)
    else:
        path.write_text(lines)


@pytest.mark.parametrize(
    "name", ["r.jsonl", "r.jsonl.gz", "r.parquet", "r.json", "r.csv", "a.json"]
)
def test_a_file_with_many_rows_is_read_anew_at_every_pass(name, tmp_path, monkeypatch):
    path = tmp_path / name
    if name == "r.csv":
        path.write_text("text,label\n" + "".join(f"row {n},{n % 3}\n" for n in range(57)))
    elif name == "a.json":
        path.write_text(json.dumps(ROWS))
    else:
        write(path, ROWS)
    whole = files.read_file(path)
    monkeypatch.setattr(streamed, "IN_MEMORY", 56)
    many = files.read_file(path)
    assert isinstance(whole, list) and list(many) == whole and list(many) == whole
    assert isinstance(many, Streamed) == (name != "a.json")  # an array is parsed as a whole
    monkeypatch.setattr(streamed, "IN_MEMORY", 57)
    assert isinstance(files.read_file(path), list)


def test_a_file_that_changes_between_two_passes_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    write(path, ROWS)
    monkeypatch.setattr(streamed, "IN_MEMORY", 10)
    many = files.read_file(path)
    write(path, ROWS[:-1])
    with pytest.raises(BadInput, match=r"r\.jsonl was changed while it was read: start anew"):
        list(many)


def test_reading_many_rows_takes_no_memory_for_them(tmp_path, monkeypatch):
    """Of 30,000 rows no more than a hundred are in memory at any time."""
    path = tmp_path / "r.jsonl"
    write(path, [{"text": f"{n} " * 30, "label": n % 7} for n in range(30_000)])
    monkeypatch.setattr(streamed, "IN_MEMORY", 100)
    tracemalloc.start()
    many = files.read_file(path)
    columns = {
        "--text-column": files.Column("text", str),
        "--label-column": files.Column("label", str),
    }
    files.require_columns(files.with_numbers(many), columns, str(path))
    rest = chosen(many, np.arange(0, 30_000, 2))
    clients = partition.column(row["label"] for row in rest)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(clients) == 7 and sum(map(len, clients)) == 15_000
    assert peak < 2_000_000, "the rows together are over 10 MB"


def test_a_client_for_every_value_is_as_comparing_texts_has_it():
    drawn = np.random.default_rng(0).choice(["b", "a", "ä", "10", "9", "Z"], 200).tolist()
    values = [*drawn, 3, 10]
    texts = np.asarray([str(value) for value in values])
    expected = [np.flatnonzero(texts == text) for text in np.unique(texts)]
    found = partition.column(iter(values))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other)


COMPLETION = Completion([1, 2, 3], 2, 1)
EXAMPLES = {
    "labelled": [Labelled([5, 6], 1), Labelled([7], 0, "part", [0]), Labelled([1 << 30], 1, None)],
    "completion": [COMPLETION, Completion([], 0)],
    "marked": [Marked([1, 2, 3], ((0, 1), (2, 3)), 9), Marked([4], (), 1, "no turn")],
    "question": [Question([COMPLETION, COMPLETION], [3, 4], 1, "set"), Question([], [], 0)],
    "written": [Written([COMPLETION], [3], 0, None, names=("a", "b"))],
    "pair": [Pair(Marked([1], ((0, 1),), 1), Marked([2, 3], ((1, 2),), 2, "why"))],
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_examples_come_back_from_disk_as_they_were(kind):
    pytest.importorskip("datasets")
    made = EXAMPLES[kind] * 700
    kept = store([made[:900], made[900:901], made[901:]])
    assert isinstance(kept, Stored) and len(kept) == len(made) and list(kept) == made
    assert kept[0] == made[0] and kept[np.int64(3)] == made[3] and kept[-1] == made[-1]
    assert kept[5:9] == made[5:9] and kept[::300] == made[::300] and kept[5:5] == []
    assert repr(kept[1]) == repr(made[1])  # a tuple is a tuple again
    with pytest.raises(IndexError):
        kept[len(made)]
    one, other = digest.hashlib.sha256(), digest.hashlib.sha256()
    digest._add(one, kept)
    digest._add(other, made)
    assert one.hexdigest() == other.hexdigest()


def test_a_column_is_read_without_examples():
    pytest.importorskip("datasets")
    made = EXAMPLES["labelled"] * 5
    found = column(store([made]), "label")
    assert isinstance(found, np.ndarray) and found.tolist() == column(made, "label")


@dataclass
class Anything:
    value: object


def test_what_arrow_does_not_hold_stays_in_memory_and_says_so():
    pytest.importorskip("datasets")
    with pytest.raises(Unstorable, match="Arrow does not hold <class 'object'>"):
        store([[Anything(1)]])
    with pytest.raises(Unstorable, match="int is no dataclass"):
        store([[1, 2]])
    with pytest.raises(TypeError, match="not every example is a Labelled"):
        store([[EXAMPLES["labelled"][0], COMPLETION]])
    with pytest.raises(OverflowError, match="no Labelled"):
        store([[Labelled([1 << 31], 0)]])

    class Odd:
        def encode(self, rows):
            return [row["label"] for row in rows]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(streamed, "IN_MEMORY", 10)
        patched.setattr(examples, "_AT_ONCE", 7)
        found, rows, tally = examples.encode(Odd(), PLAIN, "drop", "r.jsonl")
    assert found == [row["label"] for row in ROWS] and list(rows) == PLAIN
    assert tally.text() == "in memory: int is no dataclass"


TASKS = {
    "classification": {"partition": "dirichlet"},
    "own clients": {"partition": "column", "client-column": "label"},
    "cut": {
        "task-type": "causal-lm",
        "prompt-column": "prompt",
        "response-column": "response",
        "max-length": 16,
    },
}


@pytest.mark.parametrize("kind", TASKS)
def test_a_run_whose_data_lie_on_disk_is_the_run_in_memory(
    kind, files, tmp_path, call, monkeypatch
):
    pytest.importorskip("datasets")
    flags = small(files, rounds=2, clients=3, **{"local-steps": 1, "batch-size": 2, **TASKS[kind]})
    values = {str(n)[2:].replace("-", "_"): v for n, v in zip(flags[::2], flags[1::2], strict=True)}
    values = {name: str(v) if isinstance(v, os.PathLike) else v for name, v in values.items()}
    if kind == "own clients":
        values.pop("clients")
        flags = [
            v
            for n, v in zip(flags[::2], flags[1::2], strict=True)
            for v in (n, v)
            if n != "--clients"
        ]
    memory = prepare(resolve(values))
    assert call(*flags, "--output-dir", tmp_path / "memory")[0] == 0
    monkeypatch.setattr(streamed, "IN_MEMORY", 5)
    monkeypatch.setattr(examples, "_AT_ONCE", 7)
    disk = prepare(resolve(values))
    assert isinstance(disk.train, Stored) and isinstance(disk.evaluation, Stored)
    assert digest.of(disk) == digest.of(memory)
    told = {name: tally.text() for name, tally in memory.tallies.items()}
    for name, tally in disk.tallies.items():
        assert tally.text() == "; ".join(filter(None, [told[name], "on disk"]))
    assert call(*flags, "--output-dir", tmp_path / "disk")[0] == 0
    assert bits(tmp_path / "disk") == bits(tmp_path / "memory")


def test_an_error_names_the_row_wherever_it_is_encoded(monkeypatch):
    class Picky:
        def encode(self, rows):
            for row in rows:
                if row["label"] == 9:
                    raise BadInput(f"row {row.number}: nine")
            return [COMPLETION for _ in rows]

    pytest.importorskip("datasets")
    monkeypatch.setattr(streamed, "IN_MEMORY", 10)
    monkeypatch.setattr(examples, "_AT_ONCE", 7)
    rows = [*ROWS[:40], {"text": "", "label": 9}]
    with pytest.raises(BadInput, match=r"^r\.jsonl: row 41: nine$"):
        examples.encode(Picky(), Streamed(lambda: iter(rows), 41), "drop", "r.jsonl")
