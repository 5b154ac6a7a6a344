"""`tune:` in a config: which trials it declares, with which names and steps, what stays as it is, and what is refused."""

import json
import re

import pytest

from tests.conftest import ROOT, make_clone
from workflow_scripts.config.config import Config, load
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import differences, graph

DEFAULT, SWEEP, TUNED = ROOT / "config/config.yaml", ROOT / "config/rank_sweep.yaml", ROOT / "config/tuned.yaml"
DEV = "data: {slices: {dev: {kind: ifeval, source: {tiny: {split: dev}}, rows: 200, seed: 1}}}"
RATES = "{train: {learning_rate: {times: [0.3, 1, 3, 10]}}}"
SIX = ["sft_v2", "dpo", "kto", "ppo", "grpo", "rloo"]


def tune(
    experiments: str = "dpo: {}", grid: str = RATES, trials: int = 4, choose: str = "{task: ifeval, prompts: dev}", more=""
) -> str:
    keys = f"trials: {trials}, grid: {grid}, experiments: {{{experiments}}}, choose: {choose}, per_seed: true"
    return f"{{{DEV}, tune: {{{keys}{more}}}}}"


@pytest.fixture
def over(tmp_path):
    """over(text, ...): the default config with these overlays; the last is called overlay.yaml in errors."""

    def of(*texts: str) -> Config:
        files = [tmp_path / f"{i}.yaml" for i in range(len(texts) - 1)] + [tmp_path / "overlay.yaml"]
        for file, text in zip(files, texts, strict=True):
            file.write_text(text)
        return load(DEFAULT, *files)

    return of


# -- the trials -------------------------------------------------------------------------------------------------------


def test_the_shipped_overlay_tunes_six_methods_over_four_rates_each():
    config = load(DEFAULT, TUNED)
    assert {body.of: len(body.trials) for body in config.tuned.values()} == dict.fromkeys(SIX, 4)
    own = {name: load(DEFAULT).experiments[name]["train"]["learning_rate"] for name in SIX}
    for body in config.tuned.values():
        rates = [config.experiments[trial]["train"]["learning_rate"] for trial in body.trials]
        assert rates == pytest.approx([factor * own[body.of] for factor in (0.3, 1, 3, 10)])
    Plan(config).check()


def test_a_trial_differs_by_its_point_alone_and_the_own_setting_is_the_experiment_itself(over):
    config = over(tune())
    assert list(config.tuned["dpo_tuned"].trials) == ["dpo_t1", "dpo", "dpo_t3", "dpo_t4"]
    for trial, rate in (("dpo_t1", 1.5e-4), ("dpo_t3", 1.5e-3), ("dpo_t4", 5e-3)):
        body = json.loads(json.dumps(config.experiments[trial]))
        assert body["train"].pop("learning_rate") == rate  # and not 0.00015000000000000001
        own = json.loads(json.dumps(config.experiments["dpo"]))
        own["train"].pop("learning_rate")
        assert body == own
    assert config.trials == {"dpo_t1": "dpo", "dpo_t3": "dpo", "dpo_t4": "dpo"}


def test_a_grid_may_have_several_keys_values_and_keys_of_ppo(over):
    grid = "{train: {learning_rate: [1.0e-4, 2.0e-4]}, ppo: {kl_coef: {times: [0.5, 2]}}}"
    trials = over(tune("ppo: {}", grid)).tuned["ppo_tuned"].trials
    assert [tuple(point.values()) for point in trials.values()] == [(1e-4, 0.05), (1e-4, 0.2), (2e-4, 0.05), (2e-4, 0.2)]
    assert list(trials) == ["ppo_t1", "ppo_t2", "ppo_t3", "ppo_t4"]


def test_multiples_of_a_count_are_counts(over):
    config = over(tune("grpo: {}", "{train: {max_steps: {times: [0.5, 1, 2, 3]}}}"))
    assert [config.experiments[name]["train"]["max_steps"] for name in config.tuned["grpo_tuned"].trials] == [10, 20, 40, 60]


def test_nothing_that_is_there_is_made_again_and_the_report_alone_changes(over):
    plain, tuned = Plan(load(DEFAULT)), Plan(over(tune()))
    steps = [("base", "base")] + [("slice", name) for name in plain.config.data["data"]["slices"]]
    steps += [(kind, name) for name in plain.config.experiments if name != "rm" for kind in ("train", "merge", "score_ifeval")]
    assert all(plain.fingerprint(*step) == tuned.fingerprint(*step) for step in steps)
    assert plain.report() != tuned.report() and "tune" not in plain.step("report", "")["config"]


def test_the_choice_s_parents_are_trials_and_their_development_scores(over):
    plan = Plan(over(tune()))
    names = ["dpo_t1", "dpo", "dpo_t3", "dpo_t4"]
    step = plan.step("train", "dpo_tuned.seed2")
    expected = {"start", "rows"} | {f"{role} {name}.seed2" for role in ("adapter", "score") for name in names}
    assert (step["step"], step["seed"], set(step["parents"])) == ("select", 2, expected)
    assert step["parents"]["score dpo_t3.seed2"] == plan.fingerprint("score_dev", "dpo_t3.seed2")
    assert step["parents"]["adapter dpo.seed2"] == plan.fingerprint("train", "dpo.seed2")
    assert "learning_rate" not in step["config"]["train"] and step["config"]["train"]["beta"] == 0.1
    dev = plan.step("score_dev", "dpo_t3")
    assert dev["step"] == "score_ifeval" and dev["parents"]["prompts"] == plan.fingerprint("slice", "dev")
    assert plan.step("score_ifeval", "dpo_tuned")["parents"].keys() == dev["parents"].keys()


def test_one_choice_over_all_seeds_reads_the_scores_of_all_and_the_adapters_of_its_own(over):
    plan = Plan(over("seeds: [1, 2]", tune().replace("per_seed: true", "per_seed: false")))
    parents = plan.step("train", "dpo_tuned.seed2")["parents"]
    assert {role for role in parents if "dpo_t1" in role} == {"adapter dpo_t1.seed2", "score dpo_t1", "score dpo_t1.seed2"}


def test_by_the_own_objective_no_development_score_is_read(over):
    plan = Plan(over(tune("dpo: {}, rm: {choose: objective}")))
    step = plan.step("train", "rm_tuned")
    assert not any(role.startswith("score") for role in step["parents"]) and step["config"]["by"] == {
        "objective": ["accuracy", "up"]
    }
    assert plan.step("eval_rm", "rm_tuned")["parents"]["adapter"] == plan.fingerprint("train", "rm_tuned")


def test_only_the_point_that_changes_and_the_choice_are_stale(over):
    before = Plan(over(tune()))
    after = Plan(over(tune(grid="{train: {learning_rate: {times: [0.3, 1, 3, 10, 30]}}}", trials=5)))
    both = set(before.config.experiments) & set(after.config.experiments)
    assert {name for name in both if before.train(name) != after.train(name)} == {"dpo_tuned"}
    assert set(after.config.experiments) - both == {"dpo_t5"}
    third = Plan(over(tune(grid="{train: {learning_rate: {times: [0.3, 1, 4, 10]}}}")))
    assert {name for name in both if before.train(name) != third.train(name)} == {"dpo_t3", "dpo_tuned"}


def test_others_start_from_the_chosen_one_and_learn_from_a_chosen_reward_model(over):
    more = "experiments: {again: {method: kto, start_from: dpo_tuned}, grpo: {reward: rm_tuned}}"
    plan = Plan(over(tune("dpo: {}, rm: {choose: objective}"), more))
    assert plan.step("train", "again")["parents"]["start"] == plan.fingerprint("merge", "dpo_tuned")
    assert plan.step("merge", "dpo_tuned")["parents"]["adapter"] == plan.fingerprint("train", "dpo_tuned")
    assert plan.step("train", "grpo")["parents"]["reward rm_tuned"] == plan.fingerprint("train", "rm_tuned")


def test_a_rank_sweep_tunes_at_its_own_rank():
    config = load(DEFAULT, TUNED, SWEEP)
    body = config.tuned["dpo_tuned_r8"]
    assert (body.of, list(body.trials)) == ("dpo_r8", ["dpo_t1_r8", "dpo_r8", "dpo_t3_r8", "dpo_t4_r8"])
    assert config.lora("dpo_t4_r8")["r"] == config.lora("dpo_tuned_r8")["r"] == 8 and config.trials["dpo_t4_r8"] == "dpo_r8"
    assert config.experiments["dpo_t4_r8"]["start_from"] == "sft_v2_r8"


def test_trials_are_scored_on_demand_and_stand_in_no_report_but_as_a_curve(over):
    plan = Plan(over(tune()))
    assert not any("dpo_t1" in file for run in plan.shown() for file in plan.results_of(run))
    scores = [file for file in plan.report_inputs() if re.search(r"dpo_t\d", file)]
    assert (
        scores == [f"results/dev_dpo_t{number}.json" for number in (1, 3, 4)]
        and "results/ifeval_dpo_tuned.json" in plan.report_inputs()
    )
    assert plan.step("score_ifeval", "dpo_t1")["step"] == "score_ifeval"
    step = plan.step("report", "")["config"]
    assert not set(step["experiments"]) & set(plan.config.trials) and step["tune"]["experiments"]["dpo_tuned"]["of"] == "dpo"
    curve = Plan(over(tune(more=", curve: true")))
    judged = [file for file in curve.report_inputs() if re.search(r"/(ifeval|gsm8k)_dpo_t\d", file)]
    assert judged == [f"results/ifeval_dpo_t{number}.json" for number in (1, 3, 4)]  # what the curve shows, and no more
    sums = "{data: {slices: {dev_sums: {kind: numeric, source: {tiny: {split: dev}}, rows: 50, seed: 1}}}}"
    curve = Plan(over(sums, tune(choose="{task: gsm8k, prompts: dev_sums}", more=", curve: true")))
    assert {re.search(r"/(\w+?)_dpo_t\d", file)[1] for file in curve.report_inputs() if "dpo_t1" in file} == {"dev", "gsm8k"}


def test_the_development_slice_is_checked_against_every_evaluation(over):
    step = Plan(over(tune())).step("slice", "dev")
    assert (
        set(step["parents"]) == {"ifeval_prompts", "gsm8k_prompts"} and step["config"]["decontaminate"]["rule"] == "whole_prompt"
    )
    assert Plan(over(DEV)).step("slice", "dev")["parents"] == {}  # where nothing is chosen by it


def test_the_tools_graph_is_that_of_the_steps(over):
    plan = Plan(over("seeds: [1, 2]", tune("dpo: {}, rm: {choose: objective}", more=", curve: true")))
    phases = set(graph.phases_by_file(plan, ["results/report/comparison.html"]).values())
    assert {graph.Phase("score_dev", "dpo_t3.seed2"), graph.Phase("train", "dpo_tuned"), graph.Phase("slice", "dev")} <= phases
    for phase in phases:
        wanted = plan.step(*phase)["parents"]
        assert {role: plan.fingerprint(*one) for role, one in graph.parents(plan, phase).items()} == wanted, phase


def test_a_key_of_a_trial_is_named_where_it_stands(over):
    config = over(tune("dpo: {}, ppo: {grid: {ppo: {kl_coef: [0.05, 0.2, 0.3, 0.4]}}}"))
    assert differences.place(config, "train", "dpo_t3", ["train", "learning_rate"]) == "tune.grid.train.learning_rate"
    assert differences.place(config, "train", "dpo_t3", ["train", "beta"]) == "methods.dpo.train.beta"
    assert differences.place(config, "train", "ppo_t1.seed2", ["ppo", "kl_coef"]) == "tune.experiments.ppo.grid.ppo.kl_coef"
    assert differences.place(config, "train", "dpo_tuned", ["trials"]) == "tune.grid"
    assert differences.place(config, "train", "dpo_tuned", ["train", "beta"]) == "methods.dpo.train.beta"
    assert differences.place(config, "generate_dev", "dpo_t3", ["max_new_tokens"]) == "eval.ifeval.max_new_tokens"
    assert differences.place(config, "score_dev", "dpo_t3", ["strip_think"]) == "eval.ifeval.strip_think"


# -- what is refused --------------------------------------------------------------------------------------------------

FIVE = "{grid: {train: {learning_rate: {times: [0.3, 1, 3, 10, 30]}}}}"
LONG = "a" * 36
SAME = tune().replace("split: dev}}, rows: 200", "split: eval}}, rows: 400")


def and_(experiments: str, text: str = tune()) -> str:
    return f"{text[:-1]}, experiments: {{{experiments}}}}}"


REFUSED = {
    tune(f"dpo: {{}}, kto: {FIVE}"): (
        "tune.experiments.kto.grid: 5 points for kto, and tune.trials gives every method 4: more trials are an"
    ),
    tune(trials=3): "tune.grid: 4 points for dpo, and tune.trials gives every method 3",
    tune("dpo: {trials: 5}"): "tune.experiments.dpo.trials: found 5, and its grid has 4 points",
    tune(choose="{task: ifeval, prompts: ifeval}"): "tune.choose.prompts: found 'ifeval', which is what ifeval is",
    SAME: "tune.choose.prompts: found 'dev', which is what ifeval is",
    tune(choose="{task: ifeval, prompts: instructions}"): "tune.choose.prompts: found 'instructions', which is trained on",
    tune(choose="{task: ifeval, prompts: sums_eval}"): "tune.choose.prompts: found 'sums_eval', expected a slice of",
    tune(choose="{task: mmlu, prompts: dev}"): "tune.choose.task: found the string 'mmlu', expected one of ifeval, gsm8k",
    tune(choose="{task: ifeval}"): "tune.choose.prompts: missing",
    tune(choose="loss"): "tune.choose: found the string 'loss', expected .*objective",
    tune(grid="{lora: {r: [8, 16, 32, 64]}}"): "tune.grid.lora.r: refused: part of the constant block",
    tune(grid="{quant: {double: [true, false]}}"): "tune.grid.quant.double: refused: part of the constant block",
    tune(grid="{train: {optim: [adamw_torch, sgd]}}"): "tune.grid.train.optim: refused: part of the constant block",
    tune(grid="{train: {lora: [1, 2]}}"): "tune.grid.train.lora: refused: part of the constant block",
    tune(grid="{train: {learning_rat: [1.0e-3, 2.0e-3]}}"): "tune.grid.train.learning_rat: unknown key for method dpo; ",
    tune("sft_v2: {}", "{train: {beta: [0.1, 0.2]}}"): r"tune.grid.train.beta: unknown key for method sft; .*\(for sft_v2",
    tune(grid="{ppo: {kl_coef: [0.1, 0.2]}}"): "tune.grid.ppo: unknown key for method dpo",
    tune(grid="{reward: {rm: [1, 2]}}"): "tune.grid.reward: unknown key; known here: train, ppo",
    tune(grid="{train: {max_length: [64, 128]}}"): "tune.grid.train.max_length: refused: it decides which rows are whole",
    tune(grid="{train: {learning_rate: [5e-6, 1.0e-3]}}"): "tune.grid.train.learning_rate: found the string '5e-6'",
    tune(grid="{train: {learning_rate: [1.0e-3, 1.0e-3]}}"): "tune.grid: two points are one setting for dpo",
    tune(grid="{train: {loss_type: {times: [1, 2]}}}"): "tune.grid.train.loss_type: `times` multiplies .*dpo has 'sigmoid'",
    tune(grid="{train: {label_smoothing: {times: [1, 2]}}}"): "tune.grid.train.label_smoothing: `times` multiplies.*dpo has none",
    tune(grid="{train: {weight_decay: {times: [1, 2]}}}"): "tune.grid.train.weight_decay: .*that of dpo is 0",
    tune(grid="{train: {learning_rate: {times: []}}}"): "tune.grid.train.learning_rate.times: found an empty list, expect",
    tune(grid="{train: {learning_rate: 5.0e-4}}"): "tune.grid.train.learning_rate: found 0.0005, expected a list of values",
    tune("dbo: {}"): "tune.experiments.dbo: found 'dbo', expected one of dpo, ",
    tune("rm: {}"): "tune.experiments.rm.choose: missing: a reward model answers no prompts; set `choose: objective`",
    tune().replace("per_seed: true", "per_seed: 2"): "tune.per_seed: found 2, expected true or false",
    and_('dpo_t3: {extends: dpo}'): "experiments.dpo_t3: `tune:` gives this name to what",
    and_('dpo_tuned: {extends: dpo}'): "experiments.dpo_tuned: `tune:` gives this name",
    and_(LONG + ": {extends: dpo}", tune(LONG + ": {}")): f"tune.experiments.{LONG}: what is made of it",
    and_('dpo: {start_from: dpo_tuned}'): "experiments.dpo.start_from: a loop: dpo_tuned",
    and_('more: {extends: dpo, start_from: dpo_t1}'): "experiments.more.start_from: found 'dpo_t1'",
}  # fmt: skip


@pytest.mark.parametrize("overlay", REFUSED)
def test_what_is_refused_in_one_line_and_where(over, overlay):
    with pytest.raises(InputError) as caught:
        over(overlay)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 and re.search(rf"overlay\.yaml: {REFUSED[overlay]}", lines[0]), lines


def test_more_trials_are_taken_where_they_are_declared(over):
    config = over(tune(f"dpo: {{}}, kto: {FIVE[:-1]}, trials: 5}}"))
    assert len(config.tuned["kto_tuned"].trials) == 5
    assert {name: body.declared for name, body in config.tuned.items()} == {"dpo_tuned": False, "kto_tuned": True}


def test_kto_on_unpaired_rows_has_no_objective_to_be_chosen_by(over):
    unpaired = "data: {slices: {one: {kind: unpaired, source: {path: x.jsonl}, rows: 20, heldout: 4, seed: 1}}}"
    with pytest.raises(InputError, match=r"tune\.experiments\.kto\.choose: KTO on unpaired rows has no pairs to order"):
        over(unpaired, "methods: {kto: {slice: one}}", tune("kto: {choose: objective}"))


@pytest.mark.parametrize("name", ["dpo_t1", "dpo_t1_nf4"])
def test_a_trial_has_no_place_beside_verdicts(over, name):
    plan = Plan(over(f"{tune()[:-1]}, report: {{families: {{primary: {{runs: [dpo, {name}]}}}}}}}}"))
    with pytest.raises(
        InputError, match=rf"report\.families\.primary\.runs: found '{name}', a trial: it is judged by what chooses"
    ):
        plan.check()


# -- Snakemake --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return make_clone(tmp_path_factory.mktemp("clone") / "phaseline")


def test_the_target_plans_trials_their_development_scores_and_the_choice(clone):
    configs = ["config/config.yaml", "config/tuned.yaml"]
    assert clone.plan("results/ifeval_dpo_tuned.json", configs=configs) == {
        "slice_data": 5, "make_base": 1, "train_sft": 1, "merge": 1, "train_dpo": 4, "generate": 5, "score_development": 4,
        "select": 1, "score": 1,
    }  # fmt: skip


def test_the_default_target_scores_no_trial(clone):
    done = clone.snakemake("-n", "--quiet", "host", configs=["config/config.yaml", "config/tuned.yaml"])
    scored = set(re.findall(r"output: results/ifeval_([\w.]+)\.json", done.stdout + done.stderr))
    assert {"dpo", "dpo_tuned", "sft_v2_tuned"} <= scored and not any(re.search(r"_t\d$", name) for name in scored)
