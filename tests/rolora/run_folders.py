"""Run folders as `train` leaves them, without training."""

import json

import tomli_w

from rolora import config


def made(folder, name, rounds=3, scale=1.0, summary=None, **options):
    path = folder / name
    path.mkdir(parents=True)
    tables = config.Config().with_values(**options).to_tables()
    (path / "config.toml").write_text(tomli_w.dumps(tables))
    rows = [
        {
            "round": number,
            "eval": {"accuracy": 0.1 * number, "loss": 2.0 / (number + 1)},
            "train_loss": 1.0 if number else None,
            "bytes_up": 1000 * scale if number else 0,
            "bytes_down": 3000 * scale if number else 0,
            "seconds": 2.0 * scale,
            "client_loss": [0.5, 1.0, 2.0] if number else None,
        }
        for number in range(rounds + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path
