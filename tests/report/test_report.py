"""The report's step on results that were drawn, not trained: what it says, what it refuses, what makes it stale."""

import csv
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, make_clone
from tests.support import report_world
from workflow_scripts.config import config as configs
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.report import collect, judge
from workflow_scripts.report import page as pages


@pytest.fixture(scope="module")
def made(compared):
    return compared, report_world.plan_of(compared)


@pytest.fixture(scope="module")
def html(made) -> str:
    return report_world.page_of(made[0])


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the results that a test may damage, and its plan."""
    folder, plan = made
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", plan


def alter(folder: Path, name: str, change) -> None:
    path = folder / "results" / name
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def findings(html: str) -> dict[str, str]:
    """Method -> verdict of the first box."""
    box = html[html.index('<div class="box">') : html.index("<h3>Controls")]
    return dict(re.findall(r"<li><strong>(\w+)</strong> against sft_v2_merged: <span class=\"([^\"]+)\">", box))


@pytest.mark.slow
def test_known_effects_are_better_and_an_equal_method_cannot_be_told(html, tmp_path):
    """With five seeds. Three may not show even these: docs/report_simulation.md."""
    five = report_world.report(tmp_path, report_world.make(tmp_path, report_world.write_config(tmp_path, seeds=5)))
    assert findings(five) == {"dpo": "better", "kto": "better", "ppo": "cannot tell", "grpo": "better", "rloo": "better"}
    assert "null: passed" in html and "negative: passed" in html and "positive: passed" in html
    assert "Do not trust" not in html and "Something is wrong" not in html and "One seed" not in html


def test_without_a_judge_or_a_sweep_the_report_says_nothing_of_win_rates_or_capacity(html):
    assert 'id="wins"' not in html and "capacity" not in html.lower()


def test_a_family_that_compares_data_too_says_so_from_the_config(html, made):
    """GRPO and RLOO learn from a verifier here, DPO and KTO from pairs: that is no comparison of methods alone."""
    said = re.findall(r"<strong>Differs in data</strong>: ([^<]+)\. A difference", html)
    assert said[0] == "dpo, kto from pairs; ppo from rm_pairs; grpo, rloo from ifeval on instructions"
    config = json.loads(Plan(configs.load(ROOT / "config/smollm2.yaml")).report())["config"]
    world = collect.World({"experiments": config["experiments"]}, {}, {})
    families = {family["name"]: family for family in config["report"]["families"]}
    assert {name: bool(judge.mixed(world, family)) for name, family in families.items()} == {
        "primary": False, "methods": False, "base": True, "precision": False, "gsm8k": True,
        "instructions": False, "placebo": True, "reference_free": False, "losses": False,
        "self_made": False, "on_policy": False,
    }  # fmt: skip


@pytest.mark.slow
def test_a_verdict_that_turns_with_the_base_is_flagged(tmp_path):
    """The same two runs, judged in full precision and on an NF4 base, in a family each."""
    families = {
        "primary": {"runs": ["dpo", "kto"]},
        "on_nf4": {"title": "On NF4", "task": "ifeval", "reference": "sft_v2_nf4", "runs": ["dpo_nf4", "kto_nf4"]},
    }
    primary = {"reference": "sft_v2", "runs": ["dpo", "kto"]}
    overlay = {"report": {"families": families | {"primary": families["primary"] | primary}}}
    config = report_world.write_config(tmp_path, seeds=5, overlay=overlay)
    accuracy = {"dpo": 0.8, "kto": 0.8, "sft_v2": 0.2, "dpo_nf4": 0.8, "kto_nf4": 0.2, "sft_v2_nf4": 0.2}
    page = report_world.report(tmp_path, report_world.make(tmp_path, config, accuracy=accuracy))
    lines = re.findall(r"turns with the base that is judged on</strong>: ([^<]+)\.</p>", page)
    assert lines == ["kto against sft_v2: better (primary); kto_nf4 against sft_v2_nf4: cannot tell (on_nf4)"]


def test_answers_under_other_settings_of_decoding_are_refused_in_a_family(copy):
    folder, plan = copy
    for run, settings in (("dpo", {"repetition_penalty": 1.1, "eos_token_id": 2}), ("kto", {"eos_token_id": [2, 0]})):
        path = folder / f"results/{run}/ifeval_responses.manifest.json"
        path.write_text(json.dumps({"generation_config": settings}))
    with pytest.raises(InputError, match=r"report.families.primary: kto answered with greedy decoding alone, dpo with .*1.1"):
        report_world.report(folder, plan)


def test_a_method_that_did_not_move_its_own_objective_is_marked(html):
    table = html[html.index('id="trained"') : html.index("Every run, with the interval")]
    rows = re.findall(r"<tr><td>(\w+)</td>(.*?)</tr>", table, flags=re.S)
    assert len(rows) == 13
    assert [name for name, row in rows if "no change that its held-out rows show" in row] == ["dpo_ipo"]
    assert [name for name, row in rows if "moved the other way, as it should" in row] == ["dpo_flipped"]
    assert all(f'<span class="{"worse" if name == "dpo_ipo" else "better"}">' in row for name, row in rows)


def test_the_table_has_a_row_for_each_comparison_with_the_page_s_numbers(made, html):
    rows = list(csv.DictReader(io.StringIO((made[0] / "results/report/comparison.csv").read_text())))
    assert [row["family"] for row in rows].count("primary") == 5 and [row["family"] for row in rows].count("methods") == 10
    (dpo,) = [row for row in rows if (row["family"], row["after"]) == ("primary", "dpo")]
    score = [json.loads((made[0] / f"results/ifeval_dpo{seed}.json").read_text()) for seed in ("", ".seed2", ".seed3")]
    assert float(dpo["mean_after"]) == pytest.approx(sum(one["prompt_level_strict_acc"] for one in score) / 3)
    assert f"{100 * float(dpo['difference']):+.1f}" in html and dpo["verdict"] == "better"


def test_one_family_is_confirmatory_on_the_page_and_in_the_table_and_the_others_are_exploratory(made, html):
    rows = csv.DictReader(io.StringIO((made[0] / "results/report/comparison.csv").read_text()))
    roles = {row["family"]: row["role"] for row in rows}
    assert roles == {"primary": "confirmatory", "methods": "exploratory", "base": "exploratory", "gsm8k": "exploratory"}
    assert re.findall(r"\((\w+): [^()]*, (confirmatory|exploratory)\)</span></h3>", html) == list(roles.items())


def test_better_by_quotes_the_interval_of_the_whole_family(made, html):
    rows = csv.DictReader(io.StringIO((made[0] / "results/report/comparison.csv").read_text()))
    (dpo,) = [row for row in rows if (row["family"], row["after"]) == ("primary", "dpo")]
    low, high = (100 * float(dpo[key]) for key in ("low_simultaneous", "high_simultaneous"))
    assert f"(95 % interval for all 5 comparisons at once {low:.1f} to {high:.1f})" in html


def test_the_line_of_links_names_each_section_in_the_page_s_order(html):
    links = re.findall(r'href="#(\w+)"', html[html.index("<nav") : html.index("</nav>")])
    assert links == re.findall(r'<h2 id="(\w+)"', html) and {"trained", "budget", "how"} < set(links)


@pytest.mark.slow
def test_the_same_results_give_the_same_bytes(copy, html):
    assert report_world.report(*copy) == html


@pytest.fixture(scope="module")
def alarmed(tmp_path_factory) -> str:
    """A page with two alarms: a control that failed, and two runs with the same verdicts."""
    folder = tmp_path_factory.mktemp("alarmed")
    plan = report_world.make(folder, report_world.write_config(folder), accuracy={"dpo_flipped": 0.6})
    repeat(folder, "kto")
    return report_world.report(folder, plan)


def repeat(folder: Path, other: str) -> None:
    """Another run's answers get the verdicts of DPO's."""
    dpo = json.loads((folder / "results/ifeval_dpo.json").read_text())
    copied = {key: dpo[key] for key in ("per_prompt", "prompt_level_strict_acc")}
    alter(folder, f"ifeval_{other}.json", lambda data: data.update(copied))


def repeated(html: str, other: str) -> bool:
    found = re.search(rf"(dpo and {other}|{other} and dpo) have the same verdict on each of 200 prompts", html)
    return "Something is wrong with the data." in html and bool(found)


@pytest.mark.slow
def test_a_failed_control_says_in_red_that_the_comparison_is_not_to_be_trusted(alarmed):
    assert 'class="box alarm"><strong>Do not trust this comparison:' in alarmed and "negative: FAILED" in alarmed


@pytest.mark.slow
def test_two_runs_with_the_same_verdicts_are_a_warning(alarmed):
    assert repeated(alarmed, "kto")


@pytest.mark.long
def test_two_seeds_with_the_same_verdicts_are_a_warning(copy):
    folder, plan = copy
    repeat(folder, "dpo.seed2")
    assert repeated(report_world.report(folder, plan), "dpo.seed2")


@pytest.mark.slow
def test_with_a_margin_what_is_surely_within_it_is_equivalent(tmp_path):
    config = report_world.write_config(tmp_path, seeds=5, overlay={"report": {"margin": 30}})
    html = report_world.report(tmp_path, report_world.make(tmp_path, config))
    assert findings(html)["ppo"] == "equivalent" and "equivalent within 30 points (difference " in html
    table = csv.DictReader(io.StringIO((tmp_path / "results/report/comparison.csv").read_text()))
    found = {row["after"]: (row["verdict"], float(row["margin"])) for row in table if row["family"] == "primary"}
    assert found["ppo"] == ("equivalent", 0.3) and found["dpo"] == ("better", 0.3)


@pytest.fixture(scope="module")
def costs(tmp_path_factory) -> dict[str, list[str]]:
    """Run -> its cells, where there is a GPU and a price. One training of DPO shared its card: 11 of its 33 s were its own."""
    folder = tmp_path_factory.mktemp("costs")
    overlay = {"device": "cuda", "precision": "bf16", "report": {"price": 36.0, "currency": "EUR"}}
    plan = report_world.make(folder, report_world.write_config(folder, overlay=overlay))
    alter(folder, "dpo/adapter/run.json", lambda run: run.update(gpu_seconds=11.0, gpu_jobs=3.0))
    html = report_world.report(folder, plan)
    rows = re.findall(r"<tr><td>(\w+)</td>(.*?)</tr>", html[html.index('id="cost"') : html.index('id="graph"')], flags=re.S)
    return {name: re.findall(r"<td>(.*?)</td>", row) for name, row in rows}


@pytest.mark.slow
def test_costs_are_gpu_hours_and_money_where_there_is_a_gpu_and_a_price(costs):
    """A KTO run trains 33 s and answers two tasks in 12.5 s each: 58 s for each of three seeds."""
    assert costs["kto"] == ["3", "99 s", "75 s", "", "3.00", "0.05", "1.74 EUR"]


@pytest.mark.slow
def test_a_job_that_shared_its_card_is_counted_with_its_share(costs):
    assert costs["dpo"] == ["3", "99 s", "75 s", "", "3.00", "0.04", "1.52 EUR"]


def test_budgets_are_means_over_seeds_of_what_each_training_was_given(html):
    budgets = html[html.index('id="budget"') : html.index('id="cost"')]
    rows = dict(re.findall(r"<tr><td>(\w+)</td>(.*?)</tr>", budgets, flags=re.S))
    assert re.findall(r">([^<]+)</td>", rows["dpo"]) == ["dpo", "pairs", "300", "19", "16", "12,600", "33"]
    # 19 steps of 64 answers, each used once; of 16, each used in two epochs
    assert [re.findall(r"<td>([\d,]*)</td>", rows[name])[1:5] for name in ("grpo", "ppo", "kto")] == [
        ["19", "64", "12,600", "1,216"], ["19", "16", "12,600", "152"], ["19", "16", "12,600", ""]
    ]  # fmt: skip
    assert "base" not in rows and "rm" in rows and "<th>seconds</th>" in budgets


@pytest.mark.slow
def test_one_seed_is_said_loudly(tmp_path):
    html = report_world.report(tmp_path, report_world.make(tmp_path, report_world.write_config(tmp_path, seeds=1)))
    assert 'class="box alarm"><strong>One seed: no verdicts.</strong>' in html and "null: not judged" in html
    assert set(findings(html).values()) == {"no verdict"} and html.count("over prompts, one seed: no verdict") > 20
    verdicts = html[html.index('id="verdicts"') : html.index('id="trained"')]
    assert not re.search(r"better by|worse by|cannot tell|equivalent|p, family|Minimum detectable", verdicts)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results/report/comparison.csv").read_text())))
    assert {(row["verdict"], row["p"], row["p_family"], row["mde"]) for row in rows} == {("no verdict", "", "", "")}


def test_a_seed_that_is_a_copy_of_another_is_refused(copy):
    folder, plan = copy
    shutil.copy(folder / "results/ifeval_dpo.json", folder / "results/ifeval_dpo.seed2.json")
    with pytest.raises(InputError, match=r"ifeval_dpo\.seed2\.json: not the scores that the report was planned with"):
        report_world.report(folder, plan)


def drop(data: dict) -> None:
    del data["per_prompt"][5:8]
    data["n_prompts"] -= 3
    passed = [all(row["follow_instruction_list_strict"]) for row in data["per_prompt"]]
    data["prompt_level_strict_acc"] = sum(passed) / len(passed)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            drop,
            r"ifeval_kto\.json: other prompts than .*ifeval_base\.json: it lacks 3 of them, such as 5\. Scores over different",
        ),
        (lambda data: data["per_prompt"].pop(), r"says 200 prompts and has 199"),
        (lambda data: data["per_prompt"].__setitem__(1, data["per_prompt"][0]), r"prompt 0 has two verdicts"),
        (lambda data: data.update(prompt_level_strict_acc=0.9), r"prompt_level_strict_acc is 0\.900000, and its verdicts make"),
        (lambda data: data.update(fingerprint="0" * 32), r"not the scores that the report was planned with"),
    ],
)
def test_what_can_t_be_compared_is_refused(copy, change, message):
    folder, plan = copy
    alter(folder, "ifeval_kto.json", change)
    before = sorted(path.stat().st_mtime_ns for path in folder.glob("results/report/*"))
    with pytest.raises(InputError, match=message):
        report_world.report(folder, plan)
    assert sorted(path.stat().st_mtime_ns for path in folder.glob("results/report/*")) == before


@pytest.mark.slow
def test_answers_and_curves_may_be_gone(copy, html):
    folder, plan = copy
    for path in [*folder.glob("results/*/adapter/metrics.csv"), *folder.glob("results/*/ifeval_responses.jsonl")]:
        path.unlink()
    assert findings(report_world.report(folder, plan)) == findings(html)


@pytest.mark.parametrize("value", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_a_cell_that_a_spreadsheet_would_run_is_text(value):
    assert pages.cell(value) == "'" + value and pages.cell(-1.5) == -1.5


@pytest.mark.parametrize(
    "overlay, message",
    [
        (
            {"families": {"primary": {"runs": ["dbo"]}}},
            r"report\.families\.primary\.runs: found 'dbo', expected one of base, dpo",
        ),
        ({"families": {"primary": {"runs": ["rm"]}}}, r"found 'rm', expected one of"),
        (
            {"families": {"primary": {"task": "mmlu"}}},
            r"report\.families\.primary\.task: found 'mmlu', expected what `eval:` has",
        ),
        ({"confirmatory": "first"}, r"report\.confirmatory: found 'first', expected one of the families: primary, methods, base"),
        ({"confirmatory": ["primary", "base"]}, r"report\.confirmatory: found a list, expected a string"),
        ({"families": {"primary": {"reference": "dpo"}}}, r"dpo is the reference: it can't be compared with itself"),
        (
            {"controls": {"negative": {"run": "dpo_flipped", "against": "dpo_flipped"}}},
            r"report\.controls\.negative\.against: found 'dpo_flipped', which is the run itself",
        ),
        (
            {"controls": {"null": {"run": "sft_v2", "seeds_from": 1, "alpha": 0.01}}},
            r"report\.controls\.null\.seeds_from: 1 added to seeds",
        ),
    ],
)
def test_a_report_of_what_the_config_lacks_is_refused(tmp_path, overlay, message):
    from workflow_scripts.plan.plan import Plan

    config = report_world.write_config(tmp_path, overlay={"report": overlay})
    with pytest.raises(InputError, match=message):
        Plan(configs.load(config)).check()


def test_several_families_need_the_name_of_the_confirmatory_one_and_a_single_one_does_not(tmp_path):
    from workflow_scripts.plan.plan import Plan

    path = report_world.write_config(tmp_path)
    data = yaml.safe_load(path.read_text())
    del data["report"]["confirmatory"]
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(InputError, match=r"report\.confirmatory: not given, and there are 4 families; name the one whose"):
        Plan(configs.load(path)).check()
    data["report"]["families"] = {"primary": data["report"]["families"]["primary"]}
    path.write_text(yaml.safe_dump(data))
    Plan(configs.load(path)).check()


def test_only_score_files_are_inputs_so_no_curve_or_time_makes_a_report_stale(made):
    assert all(re.fullmatch(r"results/((ifeval|gsm8k)_[\w.]+|rm[\w.]*/rm_eval)\.json", file) for file in made[1].report_inputs())


@pytest.mark.slow
def test_snakemake_plans_the_report_from_the_scores_of_every_run(tmp_path):
    clone = make_clone(tmp_path / "clone")
    planned = clone.plan("results/report/comparison.html", configs=["config/config.yaml"])
    runs = len(configs.load(clone.folder / "config/config.yaml").experiments)  # but rm; the base, the merge, the null control
    assert planned["report"] == 1 and planned["score"] == 2 * (runs + 2) and planned["eval_rm"] == 1
    assert planned["train_sft"] == 3
