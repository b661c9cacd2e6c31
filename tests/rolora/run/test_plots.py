"""The pictures of one run are painted, whatever its rows hold."""

import math

import pytest

pytest.importorskip("matplotlib")

from rolora.run import plots


def row(number, accuracy=0.5, loss=1.0, trained=1.0):
    evaluation = None if accuracy is None else {"accuracy": accuracy, "loss": loss}
    return {"round": number, "eval": evaluation, "train_loss": trained}


@pytest.mark.parametrize(
    "rows",
    [
        [row(0, trained=None)],
        [row(0, 0.1, 2.0, None), row(1, None), row(2, 0.3, 1.0), row(3, None, trained=None)],
        [row(0, trained=None), row(1, 0.0, math.inf, math.nan), row(2, math.nan, 1e38, math.inf)],
    ],
    ids=["before training", "rounds without an evaluation", "diverged"],
)
def test_every_picture_is_painted(rows, tmp_path):
    for headline in ("accuracy", "loss"):
        folder = tmp_path / headline
        painted = plots.draw(rows, headline, folder)
        assert {path.name for path in painted} == {f"{headline}.png", "loss.png"}
        for path in painted:
            assert path.stat().st_size > 5000 and path.read_bytes().startswith(b"\x89PNG")
