"""The same rows from every layout that a file of data comes in; what is damaged is one line."""

import csv
import gzip
import json
import shutil

import pytest

from rolora.data import files as data_files
from rolora.data import formats
from rolora.errors import BadInput
from tests.rolora.commands import rows as metrics
from tests.rolora.commands import small

ROWS = [{"text": "a; b, c", "label": "1"}, {"text": 'said "no"\nand went', "label": "0"}]


def lines(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows)


def separated(delimiter):
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


LAYOUTS = {
    "a.jsonl": lines(),
    "lines.json": lines(),
    "blank.jsonl": "\n\n" + lines().replace("\n", "\n\n"),
    "array.json": json.dumps(ROWS),
    "array.jsonl": json.dumps(ROWS),
    "spread.json": json.dumps(ROWS, indent=2),
    "a.csv": separated(","),
    "semicolons.csv": separated(";"),
    "tabs.csv": separated("\t"),
    "a.tsv": separated("\t"),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("upper", [False, True])
def test_every_layout_has_the_same_rows(name, mark, packed, upper, tmp_path):
    data = (mark + LAYOUTS[name]).encode()
    name += ".gz" if packed else ""
    path = tmp_path / (name.upper() if upper else name)
    path.write_bytes(gzip.compress(data) if packed else data)
    assert data_files.read_file(path) == ROWS


@pytest.mark.parametrize("upper", [False, True])
def test_parquet(upper, tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / ("A.PARQUET" if upper else "a.parquet")
    parquet.write_table(pa.Table.from_pylist(ROWS), path)
    assert data_files.read_file(path) == ROWS


def test_a_long_field(tmp_path):
    text = "long " * 100_000
    (tmp_path / "a.csv").write_text(f"text,label\n{text},1\n")
    assert data_files.read_file(tmp_path / "a.csv") == [{"text": text, "label": "1"}]


def test_files_of_a_folder_are_found_in_any_letters_and_packed(tmp_path):
    for name in ("TRAIN.CSV", "dev.jsonl.gz", "test-00000-of-00002.parquet", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    found = [data_files.find(tmp_path, [stem])[0].name for stem in ("train", "dev", "test")]
    assert found == ["TRAIN.CSV", "dev.jsonl.gz", "test-00000-of-00002.parquet"]
    with pytest.raises(BadInput, match="has no notes file"):
        data_files.find(tmp_path, ["notes"])


def damaged_parquet(path):
    """Pages overwritten, the footer whole."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"text": [f"row {n}" * 50 for n in range(2000)], "label": [1] * 2000})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[60:2000] = b"\xff" * 1940
    path.write_bytes(data)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
DAMAGED = {
    "pointer.jsonl": (POINTER, "is Git LFS's pointer to a file"),
    "pointer.parquet": (POINTER, "is Git LFS's pointer to a file"),
    "page.parquet": (damaged_parquet, "is not a Parquet file, or damaged"),
    "cut.parquet": (b"PAR1 and no more", "is not a Parquet file, or damaged"),
    "latin.csv": ("text,label\nä,1\n".encode("latin-1"), "is not UTF-8 text"),
    "wide.jsonl": ("\ufeff" + lines()).encode("utf-16"),
    "cut.jsonl.gz": (gzip.compress(lines().encode())[:-9], "is no whole gzip file"),
    "false.csv.gz": (b"text,label\na,1\n", "is no whole gzip file"),
    "few.csv": (b"text,label\na,1\nb\n", "few.csv, line 3: 1 fields, and the heading has 2"),
    "many.csv": (b"text;label\na;1\nb;1;2\n", "many.csv, line 3: 3 fields"),
    "twice.csv": (b"text,text,label\na,b,1\n", "has two columns 'text'"),
    "half.jsonl": (lines().encode() + b'{"text": "a', "half.jsonl, line 3 is not valid JSON"),
    "half.json": (b'[{"text": "a"},', "half.json is not valid JSON"),
    "numbers.json": (b"[1, 2]", "expected a list of objects"),
    "texts.jsonl": (b'"a"\n', "texts.jsonl, line 1: expected an object"),
    "object.json": (b'{\n "text": [1]\n}', "expected a list of objects, or an object a line"),
    "deep.jsonl": (b"[" * 100_000, "is not valid JSON"),
    "empty.csv": (b"", "holds no rows"),
    "heading.csv": (b"text,label\n", "holds no rows"),
    "a.parquet.gz": (b"", "is not a data file"),
    "a.txt": (b"", "is not a data file"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_one_line(name, tmp_path):
    content, message = DAMAGED[name] if name != "wide.jsonl" else (DAMAGED[name], "is not UTF-8")
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    with pytest.raises(BadInput) as told:
        data_files.read_file(path)
    assert message in str(told.value) and str(path) in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_what_cannot_be_opened_is_one_line(name, tmp_path):
    (tmp_path / name).mkdir()
    for path in (tmp_path / name, tmp_path / f"{'n' * 300}{name}", tmp_path / "file" / name):
        (tmp_path / "file").write_text("")
        with pytest.raises(BadInput, match=r"does not exist|is not a data file"):
            data_files.read_file(path)


def swapped(flags, **others):
    for name, value in others.items():
        flags[flags.index(f"--{name}") + 1] = value
    return flags


def test_a_csv_s_numbers_are_the_labels_that_they_were(files, tmp_path, call):
    """1.0 of a CSV in evaluation is the label 1 of training, and the client 1.0 is the client 1."""
    data = [json.loads(line) for line in files["train"].read_text().splitlines()]
    for name, form in (("train", "{}"), ("eval", "{}.0")):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file, delimiter=";")
            writer.writerow(["text", "label"] + (["owner"] if name == "train" else []))
            for place, row in enumerate(data):
                owner = [["0", "0.0", "1", "01"][place % 4]] if name == "train" else []
                writer.writerow([row["text"], form.format(row["answer"]), *owner])
    flags = swapped(
        small(files, rounds=1, partition="column", **{"output-dir": tmp_path / "run"}),
        **{"train-file": tmp_path / "train.csv", "eval-file": tmp_path / "eval.csv"},
    )
    code, out, err = call(*flags, "--client-column", "owner")
    assert (code, err) == (0, ""), "the evaluation file needs no client column"
    assert "clients: 2, 2 a round, 80 to 80 examples each" in out
    assert metrics(tmp_path / "run")[-1]["clients"] == 2


def test_rows_keep_their_numbers_through_a_split(files, tmp_path, call):
    """A label that only the held-out part has is told with the row of the file."""
    data = [json.loads(line) for line in files["train"].read_text().splitlines()]
    data[97]["label"] = "moon"
    (tmp_path / "train.jsonl").write_text(lines(data))
    errors = []
    for seed in range(8):
        flags = small(files, seed=seed)
        at = flags.index("--eval-file")
        del flags[at : at + 2]
        flags = swapped(flags, **{"train-file": tmp_path / "train.jsonl"})
        code, _, err = call(*flags, "--validation-fraction", 0.5, "--dry-run")
        errors += [err] if code else []
    assert errors, "one of eight halves holds it out"
    for err in errors:
        assert "label 'moon' (row 98) does not occur" in err and err.count("\n") == 1


def test_a_column_that_the_first_row_lacks(files, tmp_path, call):
    data = [json.loads(line) for line in files["train"].read_text().splitlines()]
    for change, message in (
        (lambda row: row.pop("label"), "row 1 has no value for column 'label'"),
        (lambda row: row.update(label=None), "row 1 has no value for column 'label'"),
    ):
        first = dict(data[0])
        change(first)
        (tmp_path / "train.jsonl").write_text(lines([first, *data[1:]]))
        flags = swapped(small(files), **{"train-file": tmp_path / "train.jsonl"})
        code, _, err = call(*flags, "--output-dir", tmp_path / "run")
        assert code == 2 and message in err and err.count("\n") == 1
    # A null in a column that nobody asks for is nothing.
    data[0]["owner"] = None
    (tmp_path / "train.jsonl").write_text(lines(data))
    assert call(*flags, "--dry-run")[0] == 0


def test_the_model_folder_and_data_may_be_upper_case(files, tmp_path, call):
    shutil.copy(files["train"], tmp_path / "TRAIN.JSONL")
    flags = swapped(small(files), **{"train-file": tmp_path / "TRAIN.JSONL"})
    assert call(*flags, "--dry-run")[0] == 0


def test_suffixes():
    from pathlib import Path

    assert formats.suffix_of(Path("a.B.JSONL.GZ")) == ".jsonl"
    assert formats.suffix_of(Path("a.gz")) is None and formats.suffix_of(Path("jsonl")) is None
