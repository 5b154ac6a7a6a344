"""The command behind `make test-processors`, on outcomes made by hand, and on a small test file under two switches."""

import json

import pytest

from tests.support import processors
from tests.support.processors import Figure


@pytest.mark.parametrize(
    ("limits", "value", "margin"),
    [
        ({"at_least": 0.1}, 0.3, 0.2),
        ({"at_least": 0.1}, 0.05, -0.05),
        ({"at_most": 1.0}, 0.25, 0.75),
        ({"at_most": 1.0}, 1.25, -0.25),
        ({"at_least": -1.0, "at_most": 2.0}, -0.5, 0.5),
        ({"at_least": -1.0, "at_most": 2.0}, 1.5, 0.5),
    ],
)
def test_a_figure_on_the_wrong_side_fails_and_says_both_numbers(limits, value, margin):
    one = Figure("gained", value, **limits)
    assert one.margin() == pytest.approx(margin)
    if margin > 0:
        return one.check()
    with pytest.raises(AssertionError, match=rf"^gained: found {value}, expected [<>]= [\d.]+$"):
        one.check()


def test_a_value_that_is_no_number_fails_and_a_figure_without_a_threshold_is_refused():
    with pytest.raises(AssertionError, match="found nan"):
        Figure("gained", float("nan"), at_least=0.1).check()
    with pytest.raises(AssertionError, match="no threshold"):
        Figure("gained", 1.0).check()


def outcome(value: float, passed: bool = True) -> dict:
    figure = {"name": "gained", "value": value, "at_least": 0.1, "at_most": None}
    return {"tests.rl.test_x::test_y": {"passed": passed, "said": [] if passed else ["gained: too little"], "figures": [figure]}}


def test_the_table_has_each_value_with_the_worst_margin_and_the_spread():
    lines, green = processors.table({"own.1": outcome(0.3), "own.2": outcome(0.2), "own.3": outcome(0.4)})
    (row,) = [line.split() for line in lines if line.startswith("  gained")]
    assert row == ["gained", "0.3", "0.2", "0.4", ">=", "0.1", "0.1", "0.1"] and green
    assert "tests that passed: own.1 1 of 1, own.2 1 of 1, own.3 1 of 1" in lines


@pytest.mark.parametrize("tests", [None, {}])
def test_a_run_without_an_outcome_is_red(tests):
    lines, green = processors.table({"own.1": outcome(0.3), "own.2": tests})
    assert not green and "RED own.2: no outcome" in lines


def test_a_test_that_ran_in_one_run_alone_is_red():
    lines, green = processors.table(
        {"own.1": outcome(0.3) | {"tests.x::y": {"passed": True, "figures": []}}, "own.2": outcome(0.3)}
    )
    assert not green and "RED own.2: 1 of 2 tests have not run, tests.x::y among them" in lines


def test_a_test_that_failed_is_red_with_what_it_said():
    lines, green = processors.table({"own.1": outcome(0.3), "own.2": outcome(0.05, passed=False)})
    assert not green and "RED own.2: tests.rl.test_x::test_y: gained: too little" in lines
    assert [line for line in lines if line.startswith("  gained")][0].endswith("RED")


PLANTED = """
import os

import pytest

from tests.support.processors import SEED


@pytest.mark.trained
def test_the_switches_and_the_seed_arrive(figure):
    figure("seed", SEED, at_most=1)
    assert os.environ.get("ATEN_CPU_CAPABILITY") == {"default": "default", "own": None}[os.environ["PLANTED"]]


def test_without_the_marker_nothing_is_run():
    raise AssertionError
"""


@pytest.fixture
def planted(tmp_path):
    """Beside the tests' own folder, which other tests copy meanwhile."""
    (tmp_path / "conftest.py").write_text("from tests.conftest import figure\n")
    (tmp_path / "test_planted.py").write_text(PLANTED)
    return tmp_path / "test_planted.py"


@pytest.mark.slow
def test_each_run_has_its_switches_and_its_seed_and_any_red_is_the_exit_status(planted, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")  # of whoever calls it: not those of the run
    for name, seed, code in (("default", 1, 0), ("own", 1, 0), ("own", 2, 1)):
        monkeypatch.setenv("PLANTED", name)
        given = ["--sets", name, "--seeds", str(seed), "--folder", str(tmp_path), str(planted)]
        assert processors.main(given) == code
        (test,) = json.loads((tmp_path / f"{name}.{seed}/tests.json").read_text()).items()
        assert test[0].endswith("::test_the_switches_and_the_seed_arrive") and test[1]["passed"] is (code == 0)
    capsys.readouterr()
    assert processors.main(["--show", "--sets", "own", "--seeds", "1", "2", "--folder", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "RED own.2: " in printed and "seed: found 2, expected <= 1" in printed and "own.1 1 of 1" in printed
