"""The rows of KTO: pairs taken apart, an order that suits the estimate of the KL, and the weights of the classes."""

import json
from collections import Counter

import pytest

from workflow_scripts.data import unpaired
from workflow_scripts.tiny import world


def answers(prompts, each=2):
    """`each` answers to every one of `prompts` prompts, in the order in which TRL would take pairs apart."""
    return [
        {"id": f"{p}/{a}", "prompt": [{"role": "user", "content": f"write {p}"}], "label": a == 0}
        for a in range(each)
        for p in range(prompts)
    ]


def repeats(order, batch):
    """Rows whose prompt stands before them in their batch."""
    counts = [Counter(json.dumps(row["prompt"]) for row in order[i : i + batch]) for i in range(0, len(order), batch)]
    return sum(n - 1 for count in counts for n in count.values())


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("batch", [2, 3, 4, 16])
@pytest.mark.parametrize("prompts", [48, 50, 77])
def test_spread_keeps_every_row_and_no_batch_has_a_prompt_twice(prompts, batch, seed):
    rows = answers(prompts)
    order, twice = unpaired.spread(rows, batch, seed)
    ids, lone = [row["id"] for row in order], len(rows) % batch == 1
    assert len(set(ids)) == len(ids) == len(rows) - lone and set(ids) <= {row["id"] for row in rows}
    assert len(ids) % batch != 1  # no last batch of one, whose mismatched answer would be its own
    assert twice == repeats(order, batch) == 0
    assert repeats(rows, batch) == 0 and sum(row["label"] for row in order[: len(rows) // 2]) not in (0, prompts)  # both classes


def test_a_prompt_with_more_answers_than_there_are_batches_is_counted_where_it_must_stand_twice():
    order, twice = unpaired.spread(answers(1, each=7) + answers(5)[1:], 4, 1)
    assert len(order) == 16 and twice == repeats(order, 4) > 0
    order, twice = unpaired.spread(answers(3), 6, 1)  # one batch: each prompt is there twice, whatever the order
    assert len(order) == 6 and twice == 3


def test_the_order_is_decided_by_the_seed_alone():
    rows = answers(60)
    orders = {seed: [row["id"] for row in unpaired.spread(rows, 16, seed)[0]] for seed in (1, 2, 3)}
    assert orders[1] == [row["id"] for row in unpaired.spread(list(rows), 16, 1)[0]]
    assert orders[1] != orders[2] != orders[3] != orders[1]
    assert rows == answers(60)  # what was given stays as it was


def test_pairs_are_taken_apart_and_single_answers_stay():
    pairs = [{"id": f"pairs/{i}", **row} for i, row in enumerate(world.preference_rows(32, seed=1))]
    apart = unpaired.unpair(pairs)
    assert len(apart) == 64 and len({row["id"] for row in apart}) == 64
    for pair, (good, bad) in zip(pairs, zip(apart[::2], apart[1::2], strict=True), strict=True):
        assert good["label"] is True and bad["label"] is False and good["prompt"] == bad["prompt"] == pair["prompt"]
        assert (good["completion"], bad["completion"]) == (pair["chosen"], pair["rejected"])
    assert unpaired.unpair(apart) == apart


def test_the_rarer_class_weighs_more_so_that_both_count_the_same():
    rows = [{"label": i < 6} for i in range(8)]
    found = unpaired.weights(rows, "ratio", "here")
    assert found == {"desirable_weight": 1, "undesirable_weight": 3}
    assert unpaired.weights([{"label": not row["label"]} for row in rows], "ratio", "here")["desirable_weight"] == 3
    assert set(unpaired.weights(answers(5), "ratio", "here").values()) == {1}
    given = {"desirable": 0.5, "undesirable": 2.0}
    assert unpaired.weights(rows, given, "here") == {"desirable_weight": 0.5, "undesirable_weight": 2.0}
