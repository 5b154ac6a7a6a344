"""The choice among trials: which one, by how much, the same bytes, killed or not; and by the rules, what a new point makes."""

import json
import shutil
from pathlib import Path

import pytest
from scipy import stats

from tests.conftest import Clone
from tests.support import laid_out, small_steps
from tests.support.slicer import QUESTION, Slicer
from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.manifests import Job
from workflow_scripts.data.slicing import check_apart
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import select, slice_data

NO_COMMA = "punctuation:no_comma"


def adapter(folder: Path, run: str, change: dict | None = None) -> Path:
    """An adapter of made-up bytes, with the facts that a training leaves."""
    place = folder / run / "adapter"
    place.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (place / name).write_text(f"{name} of {run}")
    (place / "metrics.csv").write_text(f"step,loss\n1,{len(run)}\n")
    facts = {"base": {"path": "start", "weights_sha256": "0"}, "distance": {"kl": len(run)}, "adapter_moved": 1.0}
    facts["objective"] = {"before": {}, "after": {}, "change": change or {}}
    files = ["adapter_model.safetensors", "adapter_config.json"]
    return small_steps.write_manifest(place / "manifest.json", "adapter", f"adapter of {run}", files, **facts)


def scores(folder: Path, run: str, passes: list[int], keys: list | None = None) -> Path:
    rows = [{"key": key, "correct": bool(one)} for key, one in zip(keys or range(len(passes)), passes, strict=True)]
    folder.mkdir(exist_ok=True)
    path = folder / f"dev_{run}.json"
    path.write_text(manifests.dump({"fingerprint": f"scores of {run}", "files": {}, "per_prompt": rows}))
    return path


def job(folder: Path, passes: dict[str, list[list[int]]], by: dict | None = None, **more) -> Job:
    """The choice of seed 1 among trials; passes: trial -> run by run what its prompts came to. Runs are seeds from 1 on."""
    trials, inputs, parents = [], [], {}
    for name, runs in passes.items():
        judged = [name if seed == 1 else f"{name}.seed{seed}" for seed in range(1, len(runs) + 1)]
        trials.append({"name": name, "point": {"train.learning_rate": len(trials)}, "run": name, "judged": judged})
        for run, one in zip(judged, runs, strict=True):
            inputs.append(scores(folder, run, one))
            parents[f"score {run}"] = f"scores of {run}"
        inputs.append(adapter(folder, name))
        parents[f"adapter {name}"] = f"adapter of {name}"
    config = {"method": "dpo", "trials": trials, "by": by or {"task": ["gsm8k"]}, "per_seed": True}
    step = {"step": "select", "config": config, "parents": parents, "packages": {}} | more
    return Job(step, inputs, folder / "dpo_tuned/adapter/manifest.json", folder / ".work")


def made(one: Job) -> dict:
    select.main(one)
    return json.loads(one.out.read_text())


WORSE, BETTER = [0] * 60 + [1] * 40, [0] * 30 + [1] * 70


def test_the_best_is_taken_byte_for_byte_with_its_facts_and_curves(tmp_path):
    manifest = made(job(tmp_path, {"dpo_t1": [WORSE], "dpo": [BETTER], "dpo_t3": [WORSE]}))
    ours, theirs = tmp_path / "dpo_tuned/adapter", tmp_path / "dpo/adapter"
    for name in ("adapter_model.safetensors", "adapter_config.json", "metrics.csv"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    chosen = json.loads((theirs / "manifest.json").read_text())
    assert (manifest["kind"], manifest["files"]) == ("adapter", chosen["files"])
    assert all(manifest[key] == chosen[key] for key in ("base", "objective", "distance", "adapter_moved"))
    assert manifest["parents"]["adapter dpo_t3"]["fingerprint"] == "adapter of dpo_t3"
    assert manifest["selection"]["chosen"] == manifest["selection"]["run"] == "dpo"
    assert [(one["name"], one["mean"], one["n"]) for one in manifest["selection"]["trials"]] == [
        ("dpo_t1", 0.4, 100), ("dpo", 0.7, 100), ("dpo_t3", 0.4, 100),
    ]  # fmt: skip
    assert manifest["selection"]["trials"][0]["stderr"] == pytest.approx((0.24 / 99) ** 0.5)


def test_how_much_it_won_is_paired_by_prompt_for_all_pairs_at_once(tmp_path):
    """Ten prompts more of 100, none lost: the difference's own spread, and the quantile of three pairs at once."""
    won = made(job(tmp_path, {"a": [WORSE], "b": [WORSE[10:] + [1] * 10], "c": [[0] * 100]}))["selection"]["won"]
    error = (sum((d - 0.1) ** 2 for d in [1] * 10 + [0] * 90) / 99 / 100) ** 0.5
    shifted = [one - other for one, other in zip(WORSE[10:] + [1] * 10, WORSE, strict=True)]
    assert sorted(shifted) == [0] * 90 + [1] * 10
    assert (won["over"], won["paired"], won["difference"]) == ("a", True, pytest.approx(0.1))
    assert won["stderr"] == pytest.approx(error)
    reach = stats.t.ppf(1 - 0.05 / 3 / 2, 99) * error
    assert won["interval"] == pytest.approx([0.1 - reach, 0.1 + reach]) and won["told"] is True


@pytest.mark.parametrize(("more", "told"), [(2, False), (12, True)])
def test_a_lead_that_chance_may_have_made_is_said(tmp_path, more, told):
    won = made(job(tmp_path, {"a": [WORSE], "b": [[0] * (60 - more) + [1] * (40 + more)]}))["selection"]["won"]
    assert won["told"] is told and won["difference"] == pytest.approx(more / 100)


def test_of_equal_scores_the_first_of_the_grid_is_taken(tmp_path):
    assert made(job(tmp_path, {"dpo_t1": [WORSE], "dpo": [BETTER], "dpo_t3": [BETTER[::-1]]}))["selection"]["chosen"] == "dpo"


def test_over_all_seeds_their_mean_chooses_and_a_prompt_s_runs_are_one_cluster(tmp_path):
    one = job(tmp_path, {"a": [[1, 1, 1, 0], [0, 0, 0, 0]], "b": [[1, 1, 0, 0], [1, 1, 0, 0]]})
    manifest = made(one)
    assert manifest["selection"]["chosen"] == "b" and manifest["selection"]["trials"][0]["mean"] == 3 / 8
    assert manifest["selection"]["trials"][1]["stderr"] == pytest.approx((4 * 0.25 / 3 / 4) ** 0.5)  # of four prompts, not eight


def of_objective(folder: Path, value: str, good: str, changes: dict[str, dict | None]) -> Job:
    trials, inputs, parents = [], [], {}
    for name, change in changes.items():
        trials.append({"name": name, "point": {}, "run": name, "judged": [name]})
        inputs.append(adapter(folder, name, {value: change} if change else {}))
        parents[f"adapter {name}"] = f"adapter of {name}"
    step = {
        "step": "select",
        "config": {"trials": trials, "by": {"objective": [value, good]}},
        "parents": parents,
        "packages": {},
    }
    return Job(step, inputs, folder / "sft_tuned/adapter/manifest.json", folder / ".work")


@pytest.mark.parametrize(("value", "good", "chosen"), [("loss", "down", "low"), ("accuracy", "up", "high")])
def test_the_own_objective_chooses_its_good_way_and_says_that_nothing_is_paired(tmp_path, value, good, chosen):
    changes = {"low": {"mean": -0.4, "stderr": 0.03, "n": 50}, "high": {"mean": 0.1, "stderr": 0.04, "n": 50}}
    selection = made(of_objective(tmp_path, value, good, changes))["selection"]
    assert selection["chosen"] == chosen and selection["by"] == value
    assert (selection["won"]["stderr"], selection["won"]["paired"]) == (pytest.approx(0.05), False)


def test_what_can_t_be_chosen_by_is_said(tmp_path):
    with pytest.raises(InputError, match=r"a/adapter/manifest.json: says no change of accuracy, by which trials are chosen"):
        select.main(of_objective(tmp_path / "one", "accuracy", "up", {"a": None, "b": None}))
    other = job(tmp_path / "two", {"a": [WORSE], "b": [BETTER]})
    scores(tmp_path / "two", "b", BETTER, [*range(99), "another"])
    with pytest.raises(InputError, match=r"dev_b.json: other prompts than .*dev_a.json"):
        select.main(other)
    other.inputs.pop()
    with pytest.raises(InputError, match="none of its inputs is the adapter b that it was planned with"):
        select.main(other)
    assert not other.out.exists()


def test_an_altered_adapter_is_refused(tmp_path):
    one = job(tmp_path, {"a": [WORSE], "b": [BETTER]})
    (tmp_path / "b/adapter/adapter_model.safetensors").write_text("other bytes")
    with pytest.raises(InputError, match="altered since it was made"):
        select.main(one)


def test_killed_at_any_file_it_leaves_nothing_and_ends_the_same_when_it_goes_on(tmp_path, monkeypatch):
    one = job(tmp_path, {"a": [WORSE], "b": [BETTER]})
    right = shutil.copyfile
    for last in range(3):
        copied = []

        def until_killed(source, to, last=last, copied=copied):
            if len(copied) == last:
                raise KeyboardInterrupt
            copied.append(right(source, to))

        monkeypatch.setattr(shutil, "copyfile", until_killed)
        with pytest.raises(KeyboardInterrupt):
            select.main(one)
        assert not one.out.parent.exists()
    monkeypatch.setattr(shutil, "copyfile", right)
    select.main(one)
    whole = one.out.read_bytes()
    shutil.rmtree(tmp_path / ".work")
    select.main(one)
    assert one.out.read_bytes() == whole


# -- the development slice --------------------------------------------------------------------------------------------

TEXT = "write a long letter to the mayor of the old town about the broken bridge over the river and end with a wish"
RULES = [{"rule": "ngram", "ngram": 8, "share": 0.5}, {"rule": "whole_prompt", "ngram": 8, "share": 0.5}]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["rule"])
def test_a_prompt_of_an_evaluation_is_refused_up_to_case_and_spaces(rule):
    rows = [{"id": "a", "prompt": "something else"}, {"id": "b", "prompt": f"  {TEXT.upper()} "}]
    with pytest.raises(InputError, match=r"mine: 1 of 2 development prompts share a prompt with an evaluation, .*such as row b;"):
        check_apart(rows, [{"key": 1, "prompt": TEXT}], rule, "mine")
    check_apart(rows[:1], [{"key": 1, "prompt": TEXT}], rule, "mine")


def test_half_of_a_prompt_s_8_grams_is_refused_whichever_of_both_is_the_longer():
    half, less = " ".join(TEXT.split()[:15]), " ".join(TEXT.split()[:11])  # 22 words: 15 8-grams, of which 8, and 4
    for one, other in ((half + " now", TEXT), (TEXT, half)):
        with pytest.raises(InputError, match="1 of 1 development prompts"):
            check_apart([{"id": "a", "prompt": one}], [{"key": 1, "prompt": other}], RULES[0], "mine")
    check_apart(
        [{"id": "a", "prompt": less + " and nothing of the rest, but other words"}],
        [{"key": 1, "prompt": TEXT}],
        RULES[0],
        "mine",
    )


@pytest.mark.parametrize(("prompts", "refused"), [([QUESTION.upper(), "another"], True), (["one", "another"], False)])
def test_the_slice_itself_is_refused_before_anything_is_written(tmp_path, prompts, refused):
    """By the step, as the plan hands it over: the rule in its config, the evaluation's prompts among its parents."""
    slicer = Slicer(tmp_path)
    rows = [{"key": i, "prompt": prompt, "instruction_id_list": [NO_COMMA], "kwargs": [{}]} for i, prompt in enumerate(prompts)]
    one = slicer.job(rows, "ifeval", decontaminate=RULES[1])
    one.step["parents"] = {"ifeval_prompts": f"{'ifeval_prompts':0>32}"}
    one.inputs += [slicer.parents["ifeval_prompts"], slicer.results / "data/ifeval.jsonl"]
    if refused:
        with pytest.raises(InputError, match="1 of 2 development prompts share a prompt with an evaluation"):
            slice_data.main(one)
    else:
        slice_data.main(one)
    assert one.out.exists() is not refused and (slicer.results / "data/made.jsonl").exists() is not refused


# -- through the rules ------------------------------------------------------------------------------------------------

OVERLAY = """
data: {slices: {dev: {kind: ifeval, source: {tiny: {split: dev}}, rows: 20, seed: 1}}}
tune:
  trials: 3
  grid: {train: {learning_rate: {times: [0.3, 1, 3]}}}
  experiments: {dpo: {}}
  choose: {task: ifeval, prompts: dev}
  per_seed: true
"""
TARGET = "results/ifeval_dpo_tuned.json"


@pytest.fixture
def tuned(made: Clone) -> Clone:
    """Results that look made, with a choice among three trials."""
    made.overlay(OVERLAY)
    laid_out.lay_out(made, laid_out.plan_of(made, "overlay.yaml"), ("score_ifeval", "dpo_tuned"))
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "planned"),
    [
        ("", "", {}),
        ("1, 3]", "1, 3, 10]",
         {"train_dpo": 1, "generate": 2, "score_development": 1, "select": 1, "score": 1}),
        ("1, 3]", "1, 4]", {"train_dpo": 1, "generate": 2, "score_development": 1, "select": 1, "score": 1}),
        ("per_seed: true", "per_seed: false", {"select": 1, "generate": 1, "score": 1}),
        ("rows: 20", "rows: 19", {"slice_data": 1, "generate": 4, "score_development": 3, "select": 1, "score": 1}),
    ],
)  # fmt: skip
def test_a_change_plans_its_own_trials_the_choice_and_what_follows(tuned, old, new, planned):
    changed = OVERLAY.replace(old, new) if old else OVERLAY
    trials = 4 if "10]" in changed else 3
    assert tuned.plan(TARGET, configs=tuned.overlay(changed.replace("trials: 3", f"trials: {trials}"))) == planned


@pytest.mark.slow
def test_a_trial_whose_adapter_is_gone_is_no_reason_to_do_anything(tuned):
    for file in (tuned.folder / "results/dpo_t1/adapter").glob("adapter_model*"):
        file.unlink()
    assert tuned.plan(TARGET, configs=tuned.overlay(OVERLAY)) == {}


@pytest.mark.slow
@pytest.mark.long
def test_trials_are_trained_one_is_chosen_and_others_are_built_upon_it(clone):
    """For real, on the micro world: the choice's bytes, its answers, a merge of it, and a score of a trial on demand."""
    configs = clone.overlay(OVERLAY + "experiments: {again: {method: kto, start_from: dpo_tuned}}\n")
    targets = [TARGET, "results/again/adapter/manifest.json", "results/ifeval_dpo_t1.json", "results/ifeval_dpo_tuned_nf4.json"]
    clone.snakemake(*targets, configs=configs)
    results = clone.folder / "results"
    manifest = json.loads((results / "dpo_tuned/adapter/manifest.json").read_text())
    chosen = results / manifest["selection"]["run"] / "adapter/adapter_model.safetensors"
    assert (results / "dpo_tuned/adapter/adapter_model.safetensors").read_bytes() == chosen.read_bytes()
    again = json.loads((results / "again/adapter/manifest.json").read_text())
    assert again["base"]["path"] == "results/dpo_tuned/merged"
    assert "the best of 3 trials by prompt_level_strict_acc" in (results / "dpo_tuned/adapter/README.md").read_text()
    assert clone.plan(*targets, configs=configs) == {}
    clone.run("python", "-m", "workflow_scripts.tools.verify", "results")
    for words in ("made", "dpo_tuned"):
        assert words in clone.run("python", "-m", "workflow_scripts.tools.status", "results").stdout
