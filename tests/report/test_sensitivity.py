"""The section of the tuned: scores over the grid, what was chosen, edges, budgets of all trials; and what is never shown."""

import json
import re
import shutil
from collections import Counter

import pytest
import yaml

from tests.conftest import ROOT
from tests.support import report_world
from workflow_scripts.report import sensitivity

ACCURACY = {
    "dpo_t1": 0.3,
    "dpo_t3": 0.9,
    "dpo_t4": 0.5,
    "kto_t1": 0.2,
    "kto_t3": 0.5,
    "kto_t4": 0.95,
    "dpo_tuned": 0.7,
    "kto_tuned": 0.7,
}


def overlay(**tune) -> dict:
    """The shipped overlay with two methods: dpo's best rate is inside the grid, kto's at its end."""
    found = yaml.safe_load((ROOT / "config/tuned.yaml").read_text())
    found["tune"] |= {"experiments": {"dpo": {}, "kto": {}}} | tune
    found["report"]["families"] = {
        "primary": {"runs": ["dpo_tuned", "kto_tuned"]},
        "methods": {"pairs": ["dpo_tuned", "kto_tuned", "ppo"]},
    }
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    config = report_world.write_config(folder, overlay=overlay(curve=True))
    plan = report_world.make(folder, config, accuracy=ACCURACY)
    return folder, plan, report_world.report(folder, plan)


def section(html: str, start: str, end: str) -> str:
    return html[html.index(f'id="{start}"') : html.index(f'id="{end}"')]


def test_each_point_has_a_row_with_its_interval_and_the_choice_of_the_seeds(made):
    rows = re.findall(r"<tr><td>(\w+)</td>(.*?)</tr>", section(made[2], "sensitivity", "kinds"), flags=re.S)
    assert [name for name, _ in rows] == ["dpo_tuned"] * 4 + ["kto_tuned"] * 4
    cells = [[re.sub(r"\s+", " ", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, flags=re.S)] for _, row in rows]
    assert [row[0] for row in cells] == ["dpo_t1", "dpo", "dpo_t3", "dpo_t4", "kto_t1", "kto", "kto_t3", "kto_t4"]
    assert [row[1] for row in cells[:4]] == [f"learning_rate {rate}" for rate in ("0.00015", "0.0005", "0.0015", "0.005")]
    assert [row[5] for row in cells] == ["", "", "3 of 3", "", "", "", "", "3 of 3"]
    low, high = map(float, cells[2][3].split(" to "))
    assert 80 < low < float(cells[2][2]) < high <= 100
    verdicts = [
        json.loads((made[0] / f"results/dev_dpo_t3{seed}.json").read_text())["per_prompt"] for seed in ("", ".seed2", ".seed3")
    ]
    assert float(cells[2][2]) == pytest.approx(sum(100 * row["correct"] for one in verdicts for row in one) / 600, abs=0.05)


def test_the_picture_names_the_points_in_full_and_rings_the_choice(made):
    """0.00015, which was cut to 0.00 as coordinates are; one ring for each experiment with the number of seeds."""
    svg = re.search(r"<svg.*?</svg>", section(made[2], "sensitivity", "kinds"), flags=re.S)[0]
    texts = [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]
    assert texts.count("0.00015") == 2 and texts.count("0.005") == 2 and texts.count("learning_rate") == 2
    assert texts.count("3") == 2 and "dpo_tuned, by prompt_level_strict_acc" in texts
    assert not re.search(r"\d\.\d{3}", re.sub(r">[^<]*<", "><", svg)), "coordinates of more than hundredths"


def test_an_edge_of_the_grid_is_said_and_a_maximum_inside_is_not(made):
    said = re.findall(r"<p><strong>(\w+)</strong>: (the best [^<]*)\.</p>", made[2])
    assert said == [
        ("kto_tuned", "the best learning_rate is the largest that was tried (0.005) in 3 of 3 seeds: widen the grid, upwards")
    ]


def test_of_two_keys_each_edge_is_said_and_words_have_none():
    points = {
        f"t{i}": {"train.learning_rate": rate, "train.loss_type": word}
        for i, (rate, word) in enumerate([(1, "a"), (2, "a"), (1, "b")])
    }
    assert sensitivity.edges(points, Counter({"t0": 1})) == [
        "the best learning_rate is the smallest that was tried (1): widen the grid, downwards"
    ]
    assert sensitivity.edges({"a": {"x.y": 1}, "b": {"x.y": 2}, "c": {"x.y": 3}}, Counter({"b": 2})) == []


def test_the_report_is_made_with_the_fingerprint_that_was_planned(made):
    manifest = json.loads((made[0] / "results/report/manifest.json").read_text())
    assert manifest["fingerprint"] == made[1].fingerprint("report", "") and manifest["step"] == made[1].step("report", "")


def test_budgets_are_those_of_all_trials(made):
    """Steps, tokens and seconds of four trials; the experiment itself has those of one."""
    rows = dict(re.findall(r"<tr><td>(\w+)</td>(.*?)</tr>", section(made[2], "budget", "cost"), flags=re.S))
    assert re.findall(r">([^<]+)</td>", rows["dpo"]) == ["dpo", "pairs", "1", "300", "19", "16", "12,600", "33"]
    assert re.findall(r">([^<]+)</td>", rows["dpo_tuned"]) == ["dpo", "pairs", "4", "300", "76", "16", "50,400", "132"]


def test_a_family_of_tuned_and_untuned_methods_says_so(made):
    said = re.findall(r"<strong>Differs in tuning</strong>: ([^<]*)\. More trials", made[2])
    assert said == ["ppo: at one setting, not tuned; dpo_tuned, kto_tuned: the best of 4 trials"]


def test_trials_stand_in_no_other_section_and_a_copy_of_the_choice_is_no_warning(made):
    html = made[2]
    outside = html.replace(section(html, "sensitivity", "kinds"), "")
    assert not re.search(r"\bdpo_t\d\b", outside) and "Something is wrong" not in html
    assert "the best of 4 trials" in section(html, "graph", "how")


@pytest.mark.slow
def test_the_answers_of_the_chosen_trial_are_those_of_the_tuned_one_and_no_warning(made, tmp_path):
    """As in a real run, where the chosen trial is also scored for the curve: the same verdicts."""
    folder = shutil.copytree(made[0], tmp_path / "copy")
    plan = made[1]
    for seed in ("", ".seed2", ".seed3"):
        ours, theirs = folder / f"results/ifeval_dpo_tuned{seed}.json", folder / f"results/ifeval_dpo_t3{seed}.json"
        same = json.loads(theirs.read_text())
        ours.write_text(
            json.dumps(json.loads(ours.read_text()) | {key: same[key] for key in ("per_prompt", "prompt_level_strict_acc")})
        )
    assert "Something is wrong" not in report_world.report(folder, plan)


@pytest.mark.slow
def test_a_tuned_one_and_its_trial_are_alike_in_a_view_too(tmp_path):
    """`dpo` is the best trial, and both are judged in NF4: the same adapter on the same base."""
    given = overlay()
    given["report"]["families"]["methods"] = {"pairs": ["dpo_tuned_nf4", "dpo_nf4", "kto_tuned"]}
    plan = report_world.make(
        tmp_path, report_world.write_config(tmp_path, seeds=1, overlay=given), accuracy=ACCURACY | {"dpo": 0.95, "dpo_nf4": 0.7}
    )
    ours, theirs = (tmp_path / f"results/ifeval_{name}.json" for name in ("dpo_tuned_nf4", "dpo_nf4"))
    same = {key: json.loads(theirs.read_text())[key] for key in ("per_prompt", "prompt_level_strict_acc")}
    ours.write_text(json.dumps(json.loads(ours.read_text()) | same))
    html = report_world.report(tmp_path, plan)
    assert "dpo_tuned: dpo by" in html and "Something is wrong" not in html


@pytest.mark.slow
def test_where_an_adapter_is_gone_the_other_seeds_keep_their_names(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "copy")
    (folder / "results/dpo_tuned/adapter/manifest.json").unlink()
    html = section(report_world.report(folder, made[1]), "sensitivity", "kinds")
    said = [(one, other) for one, other in re.findall(r"<li>([\w.]+): ([\w.]+) by", html) if one.startswith("dpo")]
    assert said == [("dpo_tuned.seed2", "dpo_t3.seed2"), ("dpo_tuned.seed3", "dpo_t3.seed3")]


@pytest.mark.slow
def test_without_a_curve_the_evaluation_of_trials_is_neither_asked_for_nor_shown(tmp_path):
    plan = report_world.make(tmp_path, report_world.write_config(tmp_path, seeds=1, overlay=overlay()), accuracy=ACCURACY)
    assert not [file for file in plan.report_inputs() if re.search(r"/(ifeval|gsm8k)_\w+_t\d", file)]
    html = report_world.report(tmp_path, plan)
    assert "Dashed" not in html and "<th>IFEval, %</th>" not in section(html, "sensitivity", "kinds")
    assert "(0.005): widen the grid" in html  # with one seed


@pytest.mark.slow
def test_another_number_of_trials_is_said_where_it_is_declared(tmp_path):
    more = {"grid": {"train": {"learning_rate": {"times": [1, 3]}}}, "trials": 2}
    given = overlay(experiments={"dpo": {}, "kto": more})
    html = report_world.report(tmp_path, report_world.make(tmp_path, report_world.write_config(tmp_path, seeds=1, overlay=given)))
    assert "<strong>kto_tuned had 2 trials</strong>, as the config declares" in html
    assert "kto_tuned: the best of 2 trials; dpo_tuned: the best of 4 trials" in html


@pytest.mark.slow
def test_by_the_own_objective_the_changes_are_shown(tmp_path):
    given = overlay(choose="objective", experiments={"dpo": {}, "kto": {}, "sft_v2": {}})
    html = report_world.report(tmp_path, report_world.make(tmp_path, report_world.write_config(tmp_path, seeds=1, overlay=given)))
    rows = re.findall(r"<tr><td>dpo_tuned</td>(.*?)</tr>", section(html, "sensitivity", "kinds"), flags=re.S)
    assert len(rows) == 4 and all("<td>+0.4000</td><td>+0.3581 to +0.4419</td>" in row for row in rows)  # t of 19 x 0.02
    said = re.search(r"By the own objective on held-out rows, the change from the start: ([^<]*)\.</p>", html)
    assert said and said[1] == "dpo_tuned by accuracy, kto_tuned by accuracy, sft_v2_tuned by loss (less is better)"


@pytest.mark.slow
def test_the_curve_is_of_the_task_that_chooses(tmp_path):
    given = overlay(curve=True, choose={"task": "gsm8k", "prompts": "dev_sums"})
    given["data"]["slices"]["dev_sums"] = {"kind": "numeric", "source": {"tiny": {"split": "dev"}}, "rows": 50, "seed": 1}
    plan = report_world.make(tmp_path, report_world.write_config(tmp_path, seeds=1, overlay=given), accuracy=ACCURACY)
    html = section(report_world.report(tmp_path, plan), "sensitivity", "kinds")
    score = json.loads((tmp_path / "results/gsm8k_dpo_t3.json").read_text())["exact_match"]
    assert "<th>GSM8K, %</th>" in html and "in the column GSM8K: the trials" in html
    assert re.search(rf"<td class=\"text\">dpo_t3</td>.*?<td>{100 * score:.1f} \+-", html, flags=re.S)
