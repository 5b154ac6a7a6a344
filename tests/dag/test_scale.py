"""Planning a thousand experiments stays cheap: what a job adds is bounded, and the same at every size (docs/performance.md).

Function calls are counted, not seconds: they are the same on a busy machine. The measure is Snakemake's own work for as many
jobs of a DAG that does nothing. Snakemake tries every rule on every file, so each rule more costs each job a little.
"""

import pytest

from tests.support import scale
from tests.support.scale import costs

SEEDS = 3
SIZES = (4, 8, 16)
JOBS = [3 * (size + 1) * SEEDS for size in SIZES]  # training, answers and scores; the rest is the same at every size


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, dict]]:
    return [costs(tmp_path_factory.mktemp("scale") / str(size), size, SEEDS, scale.calls_alone) for size in SIZES]


def for_each_job(found: list[dict[str, dict]], what: str) -> list[float]:
    """Calls that one more job costs, from each size to the next."""
    counted = [one[what]["calls"] for one in found]
    return [(counted[i + 1] - counted[i]) / (JOBS[i + 1] - JOBS[i]) for i in range(len(counted) - 1)]


@pytest.mark.parametrize("what, times", [("from nothing", 2.85), ("same, --quiet", 1.7), ("no-op", 1.7)])
def test_a_job_costs_little_more_than_snakemake_itself_takes_and_the_same_at_every_size(found, what, times):
    first, last = for_each_job(found, what)
    assert last < times * for_each_job(found, "empty DAG")[-1]
    assert last < 1.05 * first


def test_one_target_does_not_pay_for_the_other_experiments(found):
    """Checking the config and one step of each experiment and kind is all that grows: a twentieth of planning them."""
    assert found[-1]["one target"]["calls"] - found[0]["one target"]["calls"] < 0.2 * (
        found[-1]["from nothing"]["calls"] - found[0]["from nothing"]["calls"]
    )


def test_what_was_planned_is_the_whole_config(found):
    for size, one in zip(SIZES, found, strict=True):
        table = one["from nothing"]["text"]
        assert f"train_dpo {size * SEEDS:>12}".split() in [line.split() for line in table.splitlines()]
        assert "Nothing to be done" in one["no-op"]["text"]
