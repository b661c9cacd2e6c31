"""What the tests of commands share."""

import json
import sys

TIMELY = ("seconds", "peak_memory_bytes")


def small(files, family="llama", **extra):
    flags = {
        "model": files[family],
        "train-file": files["train"],
        "eval-file": files["eval"],
        "rounds": 4,
        "clients": 3,
        "local-steps": 2,
        "batch-size": 8,
        "rank": 4,
        "max-length": 32,
        "lr": 1e-2,
        "engine": "sequential",
    } | extra
    return [
        part
        for name, value in flags.items()
        for part in ((f"--{name}", value) if value is not True else (f"--{name}",))
    ]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def bits(folder):
    timeless = [{k: v for k, v in row.items() if k not in TIMELY} for row in rows(folder)]
    return timeless, [
        path.read_bytes()
        for path in sorted((folder / "adapter").rglob("adapter_model.safetensors"))
    ]


def command_line(*args):
    return [sys.executable, "-m", "rolora.train", *map(str, args)]
