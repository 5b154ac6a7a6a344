"""Two protocols of one skill side by side, and tasks with several answers to a prompt, in the report."""

import json
import re
from itertools import combinations

import numpy
import pytest

from tests.conftest import ROOT
from tests.support import report_world
from workflow_scripts.evaluation import samples
from workflow_scripts.report import collect, judge, protocols
from workflow_scripts.stats.family import compare

ASKED = {"num_fewshot": 8, "chat_template": False, "fewshot_as_multiturn": False, "system": None, "limit": None}
FILES = {split: str(ROOT / f"data/gsm8k/{split}.jsonl") for split in ("train", "test")}
TASK = {"lm_eval": ASKED | {"task": "gsm8k", "data_files": FILES}, "metric": "exact_match,strict-match", "protocol_of": "gsm8k"}
OVERLAY = {"eval": {"gsm8k": {"samples": 4, "temperature": 0.7}, "tasks": {"lab_gsm8k": TASK}}}


def redraw(folder) -> None:
    """Score files of GSM8K as four answers to each prompt give them: of those that were drawn as right 3, of the others 1."""
    for path in (folder / "results").glob("gsm8k_*.json"):
        data = json.loads(path.read_text())
        verdicts = [[row["correct"]] * 3 + [not row["correct"]] for row in data["per_prompt"]]
        for row, each in zip(data["per_prompt"], verdicts, strict=True):
            row |= {"correct": each, "value": sum(each) / 4}
        data |= samples.several(verdicts) | {"majority": 0.125}
        data["exact_match"] = sum(row["value"] for row in data["per_prompt"]) / len(verdicts)
        path.write_text(json.dumps(data))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("protocols")
    plan = report_world.make(folder, report_world.write_config(folder, overlay=OVERLAY))
    redraw(folder)
    return folder, plan, report_world.report(folder, plan)


@pytest.fixture(scope="module")
def world(made):
    folder, plan, _ = made
    with report_world.contextlib.chdir(folder):
        return collect.read(report_world.job(plan))


def test_both_protocols_stand_side_by_side_with_what_each_moves(made, world):
    html = made[2]
    section = html[html.index('<h2 id="protocols">') : html.index('<h2 id="kinds">')]
    (found,) = protocols.protocols(world)
    assert [task["name"] for task in found["tasks"]] == ["gsm8k", "lab_gsm8k"]
    table = {}
    for row in found["rows"]:
        runs = world.seeded(row["name"])
        own, other = (numpy.mean([world.values(task, run) for run in runs]) for task in ("gsm8k", "lab_gsm8k"))
        assert row["moved"] == [f"{100 * (other - own):+.1f}"] and row["cells"][1].startswith(f"{100 * other:.1f} +- ")
        table[row["name"]] = (own, other)
    assert {"base", "dpo", "sft_v2"} <= set(table)
    by_protocol = numpy.mean([abs(other - own) for own, other in table.values()])
    pairs = [*combinations(table.values(), 2)]
    by_method = [numpy.mean([abs(one[at] - two[at]) for one, two in pairs]) for at in (0, 1)]
    turned = sum((one[0] - two[0]) * (one[1] - two[1]) < 0 for one, two in pairs)
    said = f"lab_gsm8k against gsm8k: the protocol moves a run by {100 * by_protocol:.1f} points, the method by "
    said += f"{100 * by_method[0]:.1f} (gsm8k) and {100 * by_method[1]:.1f} (lab_gsm8k). "
    said += f"Of {len(pairs)} pairs of runs, {turned} are the other way round."
    assert found["words"] == [said] and said in section
    assert re.search(r"<td>dpo</td><td>[^<]+</td><td>[^<]+</td><td>[+-][0-9.]+</td>", section)


def test_several_answers_have_a_table_and_families_take_their_share(made, world):
    folder, plan, html = made
    assert "GSM8K, exact match, mean of 4 answers" in html and "<th>pass@2</th>" in html and "<th>majority</th>" in html
    values = world.arm("gsm8k", "dpo")
    assert set(values.ravel()) == {0.25, 0.75}
    family = next(family for family in judge.families(world) if family.task == "gsm8k")
    named = judge.contrasts(next(one for one in world.config["report"]["families"] if one["task"] == "gsm8k"))
    verdicts = {name: (world.arm("gsm8k", name) > 0.5).astype(float) for pair in named for name in pair}
    by_hand = compare(verdicts, named)
    for one, other in zip(family.result.comparisons, by_hand.comparisons, strict=True):
        assert one.difference == pytest.approx(other.difference / 2) and one.se == pytest.approx(other.se / 2)
        assert one.verdict == other.verdict and one.mcnemar == other.mcnemar


@pytest.mark.slow
def test_without_other_protocols_and_with_one_answer_the_report_says_nothing_of_them(tmp_path):
    html = report_world.report(tmp_path, report_world.make(tmp_path, report_world.write_config(tmp_path, seeds=1)))
    assert 'id="protocols"' not in html and "pass@" not in html


def test_the_protocol_of_nothing_is_one_line():
    from workflow_scripts.config.config import Config, load
    from workflow_scripts.config.written import merge
    from workflow_scripts.plumbing.messages import InputError

    wrong = merge(OVERLAY, {"eval": {"tasks": {"lab_gsm8k": {"protocol_of": "gsm9k"}}}})
    with pytest.raises(InputError, match="eval.tasks.lab_gsm8k.protocol_of: found 'gsm9k', expected the evaluation that this is"):
        Config(merge(load("config/config.yaml").data, wrong))
