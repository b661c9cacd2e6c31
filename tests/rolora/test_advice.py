"""What is said of a run that does not learn, and the rate of one that names none."""

import re

import pytest

from rolora.federated.rates import fitting_rate
from rolora.run.advice import advice
from tests.rolora.commands import small


@pytest.mark.parametrize(
    "losses, said",
    [
        ((2.0, None, 1.0), None),
        ((2.0, 1.7), None),
        ((2.0,), None),
        ((2.0, None, 1.95), "fell only from 2.000 to 1.950: .*try --lr 0.04"),
        ((2.0, 2.0), "fell only from 2.000 to 2.000"),
        ((2.0, 1.0, 2.4), "rose from 2.000 to 2.400: try --lr 0.0025"),
    ],
)
def test_a_flat_curve_is_told_with_a_rate_to_try(losses, said):
    rows = [{"eval": None if loss is None else {"loss": loss}} for loss in losses]
    line = advice(rows, 0.01)
    assert line is None if said is None else re.search(said, line)


def test_the_rate_falls_with_the_width_and_with_the_scaling():
    """A step of AdamW moves every entry by the rate, whatever the gradient: the same change of an
    output needs a rate inverse to both.
    """
    assert fitting_rate("adamw", 4096, 2.0) == pytest.approx(
        fitting_rate("adamw", 1024, 2.0) / 4, rel=0.05
    )
    assert fitting_rate("adamw", 1024, 4.0) == pytest.approx(
        fitting_rate("adamw", 1024, 1.0) / 4, rel=0.05
    )
    assert 1e-4 < fitting_rate("adamw", 4096, 2.0) < 1e-3, "what papers take for 7B"


def without_rate(files, **extra):
    given = small(files, **extra)
    at = given.index("--lr")
    return given[:at] + given[at + 2 :]


def test_the_plan_and_the_run_folder_show_the_rate(files, tmp_path, call):
    given = without_rate(files, **{"output-dir": tmp_path / "run"})
    code, out, err = call(*given, "--dry-run")
    assert (code, err) == (0, "")
    shown = float(re.search(r"lr ([0-9.e-]+)", out)[1])
    assert call(*given)[0] == 0
    assert f"lr = {shown:g}" in (tmp_path / "run" / "config.toml").read_text()
    twice = without_rate(files, alpha=64, **{"output-dir": tmp_path / "other"})
    scaled = re.search(r"lr ([0-9.e-]+)", call(*twice, "--dry-run")[1])[1]
    assert float(scaled) < shown


def test_a_run_that_learns_nothing_says_so(files, tmp_path, call):
    code, out, err = call(*small(files, lr=1e-9, **{"output-dir": tmp_path / "run"}))
    assert (code, err) == (0, "") and "try --lr 4e-09 (it is 1e-09)" in out
